"""Which teacher runs, and how: vLLM's engine arguments under vLLM's own names.

Imports neither torch, transformers nor vllm, so that a configuration can be read and refused before any of them loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from cache_builder.engine import Capture
from storage_schemas.errors import RequestError
from storage_schemas.records import EXTRAS, TokenSequence
from storage_schemas.settings import Settings


class EngineSettings(Settings):
    """A teacher and the engine that runs it.

    `max_model_len` is the longest sequence, in tokens, that can be scored (vLLM is given one more, for the token that
    it samples behind it); None is the model's own limit. `head_dtype` "float32" computes the lm_head in float32.
    `capture_path`: "worker" takes top-k inside vLLM's workers at the speed of prefill, "public" uses prompt_logprobs,
    "auto" is "worker" wherever its hook is found and "public", with a warning, elsewhere. `extra_args` are further
    vLLM engine arguments, passed through unchanged. None leaves vLLM's own default.
    """

    name: Literal["vllm", "hf"] = "vllm"
    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "half", "float"] = "auto"
    head_dtype: Literal["model", "float32"] = "model"
    quantization: str | None = None
    max_model_len: int | None = Field(default=None, ge=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    max_num_seqs: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    enforce_eager: bool = False
    trust_remote_code: bool = False
    seed: int = 0
    capture_path: Literal["auto", "worker", "public"] = "auto"
    extra_args: dict[str, Any] = Field(default_factory=dict)


def check_capture(capture: Capture, model_vocab_size: int) -> None:
    """Raise RequestError unless a model of that many ids can give what is asked."""
    if not 1 <= capture.top_k <= capture.vocab_size:
        raise RequestError(
            f"expected top_k from 1 to the vocabulary of {capture.vocab_size} ids, got {capture.top_k}; choose another"
        )
    if capture.vocab_size > model_vocab_size:
        raise RequestError(
            f"expected a vocabulary within the model's {model_vocab_size} ids, got {capture.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    unknown = sorted(set(capture.extras) - set(EXTRAS))
    if unknown:
        raise RequestError(f"unknown extras {', '.join(unknown)}; known are {', '.join(EXTRAS)}")


def check_sequences(sequences: Sequence[TokenSequence], vocab_size: int, max_length: int) -> None:
    """Raise RequestError for a sequence that is empty, too long, or has an id outside the vocabulary."""
    for sequence in sequences:
        count = len(sequence)
        if not 1 <= count <= max_length:
            raise RequestError(
                f"expected sequences of 1 to {max_length} tokens, got {count} in {sequence.sequence_id}; "
                "split it, or raise max_model_len as far as the model allows"
            )
        low, high = int(sequence.token_ids.min()), int(sequence.token_ids.max())
        if low < 0 or high >= vocab_size:
            raise RequestError(
                f"expected token ids below {vocab_size}, got {high if high >= vocab_size else low} in "
                f"{sequence.sequence_id}; use the teacher's tokenizer"
            )
