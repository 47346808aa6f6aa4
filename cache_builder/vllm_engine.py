"""The default teacher: vLLM, in this process, one closed batch at a time. The only file that imports vllm here."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gc
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from cache_builder.engine import Capture
from cache_builder.engine_settings import EngineSettings, check_capture, check_sequences
from storage_schemas.errors import RequestError
from storage_schemas.records import SequenceTopK, TokenSequence, sort_rows

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: a batch is closed before its first step
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_ONE_TOKEN_MORE = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}  # room for the sampled token, which is never read
_OURS = {"name", "head_dtype", "capture_path", "extra_args"}
_LOGGING = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
_CPU_KV_CACHE_BYTES = 2 << 30
_SPARE_IDS = 16
_TAIL_FLOOR = 2.0**-23
"""Least tail mass that 1 − Σ of float32 probabilities can tell from none: the spacing of float32 at 1."""


class VLLMEngine:
    """A teacher in vLLM. See `EngineSettings` for `capture_path`.

    Raises RequestError for arguments that vLLM does not know and for a model that it cannot load.
    """

    def __init__(self, settings: EngineSettings, capture: Capture) -> None:
        os.environ |= {name: value for name, value in _LOGGING.items() if name not in os.environ}
        import vllm

        self._vllm = vllm
        self._capture = capture
        self._llm: Any = None
        arguments = _engine_arguments(settings)
        with _environment(_ENVIRONMENT), _refusals(settings):
            config = vllm.EngineArgs(**arguments).create_model_config()
            self._model_vocab_size = int(config.get_vocab_size())
            self._max_length = int(config.max_model_len)
            check_capture(capture, self._model_vocab_size)
            self._width = min(capture.top_k + _SPARE_IDS, self._model_vocab_size)
            self._check_public()
            with _environment(_ONE_TOKEN_MORE):
                arguments |= {"max_model_len": self._max_length + 1, "max_logprobs": self._width}
                self._llm = vllm.LLM(**arguments)
        self._dtype = str(config.dtype).removeprefix("torch.")
        self._head_dtype = str(config.head_dtype).removeprefix("torch.")

    def provenance(self) -> Mapping[str, str]:
        """Engine, versions and hardware."""
        return {
            "engine": "vllm",
            "vllm": str(self._vllm.__version__),
            "torch": str(torch.__version__),
            "dtype": self._dtype,
            "head_dtype": self._head_dtype,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "threads": str(torch.get_num_threads()),
            "capture_path": "public",
        }

    def score(self, sequences: Sequence[TokenSequence]) -> Iterator[SequenceTopK]:
        """The distributions of every sequence, in the order given; every request is queued before the first step."""
        check_sequences(sequences, self._capture.vocab_size, self._max_length)
        if not sequences:
            return iter(())
        return self._score_public(sequences)

    def close(self) -> None:
        """Free the teacher and end the processes that vLLM started for it."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()

    def _check_public(self) -> None:
        """Refuse what prompt_logprobs cannot give; warn of what it gives only in part."""
        if self._capture.extras:
            raise RequestError(
                f'expected no extras with capture_path = "public", got {", ".join(self._capture.extras)}; '
                "prompt_logprobs carries no sums over the whole row"
            )
        padding = self._model_vocab_size - self._capture.vocab_size
        if padding:
            warnings.warn(
                f"the model has {padding} ids beyond the tokenizer's {self._capture.vocab_size}: prompt_logprobs "
                "normalises over all of them, and what mass they hold stays in the tail",
                stacklevel=3,
            )

    def _score_public(self, sequences: Sequence[TokenSequence]) -> Iterator[SequenceTopK]:
        params = self._vllm.SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            flat_logprobs=True,
            logprobs=self._width,
            prompt_logprobs=self._width,
            skip_reading_prefix_cache=True,
        )
        prompts = [{"prompt_token_ids": sequence.token_ids.tolist()} for sequence in sequences]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        assert len(outputs) == len(sequences)
        return (self._public_record(sequence, output) for sequence, output in zip(sequences, outputs, strict=True))

    def _public_record(self, sequence: TokenSequence, output: Any) -> SequenceTopK:
        # One entry per row: the token that follows (or was sampled), then the top `width`. Entry 0 of the prompt is
        # empty, for nothing predicts the first token; the sampled token's entry is the last row.
        parts = (output.prompt_logprobs, output.outputs[0].logprobs)
        rows = (len(sequence), self._width + 1)
        ids = np.concatenate([np.asarray(part.token_ids, dtype=np.int64) for part in parts]).reshape(rows)
        logprobs = np.concatenate([np.asarray(part.logprobs, dtype=np.float64) for part in parts]).reshape(rows)
        label_logprob = logprobs[:, 0].copy()
        label_logprob[-1] = np.nan
        top_ids, top_logprobs = sort_rows(*self._without_padding(ids[:, 1:], logprobs[:, 1:]))
        return SequenceTopK(
            sequence_id=sequence.sequence_id,
            document_id=sequence.document_id,
            token_ids=sequence.token_ids.astype(np.int32),
            completion_mask=sequence.completion_mask,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            log_tail_mass=self._implied_tail(top_logprobs),
            label_logprob=label_logprob.astype(np.float32),
        )

    def _without_padding(
        self, ids: NDArray[np.int64], logprobs: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The first top_k columns that are no padding of the model's vocabulary."""
        padding = ids >= self._capture.vocab_size
        if padding.any():
            order = np.argsort(padding, axis=1, kind="stable")
            ids, logprobs = np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)
        top_k = self._capture.top_k
        if (ids[:, :top_k] >= self._capture.vocab_size).any():
            raise RequestError(
                f'expected at most {_SPARE_IDS} padded ids among the most likely, got more; use capture_path = "worker"'
            )
        return ids[:, :top_k], logprobs[:, :top_k]

    def _implied_tail(self, top_logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._capture.top_k == self._model_vocab_size:
            return np.full(len(top_logprobs), -np.inf, dtype=np.float32)
        mass = 1 - np.exp(top_logprobs.astype(np.float64)).sum(axis=1)
        floored: NDArray[np.float64] = np.log(np.maximum(mass, _TAIL_FLOOR))
        return floored.astype(np.float32)


def _engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Arguments of vllm.LLM; raises RequestError for one that vLLM does not know or that is set elsewhere."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    fixed = {
        "skip_tokenizer_init": True,  # ids in, ids out
        "enable_prefix_caching": False,  # a cached prefix is never computed, so its rows would be missing
        "max_logprobs": -1,
    }
    arguments = settings.model_dump(exclude_none=True, exclude=_OURS)
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in settings.extra_args:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see the fields of vllm.EngineArgs"
            raise RequestError(f"vLLM has no engine argument {name!r}; {hint}")
        if name in fixed or name in EngineSettings.model_fields:
            raise RequestError(f"expected no {name!r} in extra_args, where it cannot be set; drop it there")
    arguments |= {"use_tqdm_on_load": False, **settings.extra_args, **fixed}
    if settings.head_dtype == "float32":
        arguments["hf_overrides"] = {**arguments.get("hf_overrides", {}), "head_dtype": "float32"}
    sized = {"gpu_memory_utilization", "kv_cache_memory_bytes"} & arguments.keys()
    if current_platform.is_cpu() and not sized and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        # vLLM's default on the CPU is nearly all of the machine's memory.
        arguments["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
    return arguments


@contextlib.contextmanager
def _refusals(settings: EngineSettings) -> Iterator[None]:
    """vLLM's own objections to its arguments, as RequestError."""
    try:
        yield
    except RequestError:
        raise
    except (ValueError, OSError) as error:
        objection = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        sentence = objection.strip().partition("\n")[0].removeprefix("Value error, ")
        raise RequestError(f"vLLM refuses the teacher {settings.model}: {sentence}") from error


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
