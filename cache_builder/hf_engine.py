"""The plain reference teacher: transformers, one sequence at a time, no padding, no cache, no approximation.

It is what the fast engine is tested against, and what runs where vLLM has no build.
"""

from __future__ import annotations

import copy
import gc
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from cache_builder.engine import Answer, Capture, Sampling
from cache_builder.engine_settings import EngineSettings, check_capture, check_sequences
from cache_builder.scored_sequence import make_record
from storage_schemas.errors import RequestError
from storage_schemas.records import Int32, SequenceTopK, TokenSequence

_USED = {"name", "model", "revision", "dtype", "head_dtype", "max_model_len", "trust_remote_code", "seed"}
_ROWS_PER_BLOCK = 128  # float64 rows held at once: 128 × 150k ids is 150 MB


class HFEngine:
    """A transformers teacher on the GPU if there is one, else on the CPU; `dtype` "auto" is float32.

    Equal logits are ordered, and at the k-th place chosen, by ascending id.
    Raises RequestError for settings that it has no use for and for a model that cannot be loaded.
    """

    def __init__(self, settings: EngineSettings, capture: Capture) -> None:
        defaults = EngineSettings(model=settings.model)
        idle = [
            name
            for name in EngineSettings.model_fields
            if name not in _USED and getattr(settings, name) != getattr(defaults, name)
        ]
        if idle:
            raise RequestError(f'the engine "hf" has no use for {", ".join(idle)}; drop them, or set name = "vllm"')
        self._capture = capture
        self._dtype = {"auto": torch.float32, "half": torch.float16, "float": torch.float32}.get(
            settings.dtype
        ) or getattr(torch, settings.dtype)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(settings.seed)
        try:
            self._model: torch.nn.Module | None = (
                transformers.AutoModelForCausalLM.from_pretrained(
                    settings.model,
                    revision=settings.revision or "main",
                    dtype=self._dtype,
                    trust_remote_code=settings.trust_remote_code,
                )
                .eval()
                .to(self._device)
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise RequestError(f"transformers cannot load the teacher {settings.model}: {reason}") from error
        # What a checkpoint suggests for sampling is no default of ours.
        self._model.generation_config = transformers.GenerationConfig()
        config = self._model.config.get_text_config()
        self._model_vocab_size = int(config.vocab_size)
        check_capture(capture, self._model_vocab_size)
        own_limit = int(getattr(config, "max_position_embeddings", 0) or 0)
        if settings.max_model_len and own_limit and settings.max_model_len > own_limit:
            self.close()
            raise RequestError(
                f"expected max_model_len of at most {own_limit}, the model's own limit, got {settings.max_model_len}"
            )
        self._max_length = settings.max_model_len or own_limit or 1 << 30
        if settings.head_dtype == "float32":
            head = copy.deepcopy(self._model.get_output_embeddings()).float()  # a copy: the weight may be tied
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            self._model.set_output_embeddings(head)

    def provenance(self) -> Mapping[str, str]:
        """Engine, versions and hardware."""
        return {
            "engine": "hf",
            "transformers": str(transformers.__version__),
            "torch": str(torch.__version__),
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if self._device.type == "cuda" else platform.machine(),
            "threads": str(torch.get_num_threads()),
        }

    def score(self, sequences: Sequence[TokenSequence]) -> Iterator[SequenceTopK]:
        """The distributions of every sequence, in the order given; nothing is shared between sequences."""
        check_sequences(sequences, self._capture.vocab_size, self._max_length)
        return (self._score_one(sequence) for sequence in sequences)

    def generate(self, prompts: Sequence[Int32], sampling: Sequence[Sampling]) -> list[Answer]:
        """An answer to each prompt, in the order given, one prompt at a time."""
        return [self._answer(prompt, own) for prompt, own in zip(prompts, sampling, strict=True)]

    @torch.inference_mode()
    def _answer(self, prompt: Int32, sampling: Sampling) -> Answer:
        assert self._model is not None, "generate() after close()"
        random = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or None,
        }
        config = transformers.GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            min_new_tokens=sampling.min_tokens,
            do_sample=sampling.temperature > 0,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=list(sampling.stop_token_ids) or None,
            pad_token_id=0,  # never read: a batch is one prompt
            suppress_tokens=list(range(self._capture.vocab_size, self._model_vocab_size)) or None,
            **(random if sampling.temperature > 0 else {}),
        )
        token_ids = torch.from_numpy(prompt.astype(np.int64)).to(self._device)[None]
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            generate: Any = self._model.generate
            whole = generate(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), generation_config=config)
        answer = whole[0, len(prompt) :].cpu().numpy().astype(np.int32)
        return Answer(answer, "stop" if int(answer[-1]) in sampling.stop_token_ids else "length")

    def close(self) -> None:
        """Free the model."""
        self._model = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _score_one(self, sequence: TokenSequence) -> SequenceTopK:
        assert self._model is not None, "score() after close()"
        token_ids = torch.from_numpy(sequence.token_ids.astype(np.int64)).to(self._device)
        logits = self._model(input_ids=token_ids[None], use_cache=False).logits[0, :, : self._capture.vocab_size]
        blocks = [
            _reduce_rows(rows, following, self._capture)
            for rows, following in zip(
                torch.split(logits, _ROWS_PER_BLOCK), torch.split(token_ids.roll(-1), _ROWS_PER_BLOCK), strict=True
            )
        ]
        arrays = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        main = {name: arrays.pop(name) for name in ("top_ids", "top_logprobs", "log_tail_mass", "label_logprob")}
        return make_record(sequence, **main, extras=arrays)


def _reduce_rows(logits: torch.Tensor, label_ids: torch.Tensor, capture: Capture) -> dict[str, np.ndarray]:
    """Everything that is kept of rows [n, V] of logits, in float64."""
    top_ids = _top_ids(logits, capture.top_k)
    logprobs = logits.double().log_softmax(dim=1)
    rest = logprobs.scatter(1, top_ids, -torch.inf)
    kept = {
        "top_ids": top_ids,
        "top_logprobs": logprobs.gather(1, top_ids),
        "log_tail_mass": rest.logsumexp(dim=1),
        "label_logprob": logprobs.gather(1, label_ids[:, None])[:, 0],
    }
    if "entropy" in capture.extras:
        kept["entropy"] = torch.special.entr(logprobs.exp()).sum(dim=1)
    if "log_rest_sqrt_sum" in capture.extras:
        kept["log_rest_sqrt_sum"] = (rest / 2).logsumexp(dim=1)
    return {name: values.cpu().numpy() for name, values in kept.items()}


def _top_ids(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Ids [n, k] of the largest logits, the smaller id first, and first to be chosen, among equals."""
    values, ids = logits.topk(top_k, dim=1)
    tied = ((logits >= values[:, -1:]).sum(dim=1) > top_k).nonzero()[:, 0]
    if len(tied):  # topk chooses among equals as it likes; a stable sort does not
        ids[tied] = logits[tied].sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return ids
