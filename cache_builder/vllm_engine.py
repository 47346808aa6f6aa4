"""The default teacher: vLLM, in this process, one closed batch at a time. The only file that imports vllm here."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import ValidationError

from cache_builder.engine import Answer, Capture, Sampling
from cache_builder.engine_settings import EngineSettings, check_capture, check_sequences
from cache_builder.prompt_logprobs import count_asked, read_output
from cache_builder.row_sink import RowSink
from cache_builder.scored_sequence import make_record
from cache_builder.vllm_arguments import engine_arguments
from cache_builder.vllm_capture import EXTRA_ARG
from storage_schemas.errors import RequestError
from storage_schemas.records import Int32, SequenceTopK, TokenSequence

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: a batch is closed before its first step
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_ONE_TOKEN_MORE = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}  # room for the sampled token, which is never read
_PREFILL = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "skip_reading_prefix_cache": True}
_MOST_BIASED_IDS = 1024
"""vLLM's own limit on logit_bias."""
_LOGGING = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
_set_num_threads = torch.set_num_threads  # vLLM's CPU worker puts a stub in its place
_EXPECTED_FROM = ("vllm.renderers.base", "vllm.engine.arg_utils", "vllm.config.model")
_EXPECTED = (
    "Chat template warmup failed",  # no tokenizer is loaded: ids in, ids out
    "Using None for EOS token id",
    "The global random seed is set",
    "User-specified max_model_len",  # see _ONE_TOKEN_MORE
)


class VLLMEngine:
    """A teacher in vLLM. See `EngineSettings` for `capture_path`.

    Raises RequestError for arguments that vLLM does not know and for a model that it cannot load.
    """

    _alive: ClassVar[int] = 0

    def __init__(self, settings: EngineSettings, capture: Capture) -> None:
        os.environ |= {name: value for name, value in _LOGGING.items() if name not in os.environ}
        import vllm

        self._vllm = vllm
        self._capture = capture
        self._llm: Any = None
        from vllm.platforms import current_platform

        known = {field.name for field in dataclasses.fields(vllm.EngineArgs)}
        arguments = engine_arguments(settings, known, current_platform.is_cpu())
        with _environment(_ENVIRONMENT), _quiet(), _refusals(settings):
            config = vllm.EngineArgs(**arguments, max_model_len=settings.max_model_len).create_model_config()
            self._model_vocab_size = int(config.get_vocab_size())
            self._max_length = int(config.max_model_len)
            check_capture(capture, self._model_vocab_size)
            self._width = count_asked(capture, self._model_vocab_size)
            with _environment(_ONE_TOKEN_MORE):
                self._llm = vllm.LLM(**arguments, max_model_len=self._max_length + 1, max_logprobs=self._width)
                VLLMEngine._alive += 1
        self._dtype = str(config.dtype).removeprefix("torch.")
        self._head_dtype = str(config.head_dtype).removeprefix("torch.")
        try:
            self._capture_path = self._choose_path(settings.capture_path)
        except RequestError:
            self.close()
            raise

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
            "capture_path": self._capture_path,
        }

    def score(self, sequences: Sequence[TokenSequence]) -> Iterator[SequenceTopK]:
        """The distributions of every sequence, in the order given; every request is queued before the first step."""
        check_sequences(sequences, self._capture.vocab_size, self._max_length)
        if not sequences:
            return iter(())
        try:
            with _quiet():
                score = self._score_worker if self._capture_path == "worker" else self._score_public
                return score(sequences)
        except BaseException:
            self.close()  # half a batch is queued in there, and must not become part of the next
            raise

    def generate(self, prompts: Sequence[Int32], sampling: Sequence[Sampling]) -> list[Answer]:
        """One closed batch: an answer to each prompt, in the order given; every request is queued before the first
        step. The model's padded ids are kept out by logit_bias, of which vLLM takes 1,024."""
        padding = range(self._capture.vocab_size, self._model_vocab_size)
        bias = dict.fromkeys(padding, -math.inf) if 0 < len(padding) <= _MOST_BIASED_IDS else None
        params = [
            self._vllm.SamplingParams(
                **{**vars(own), "seed": own.seed if own.temperature else None, "stop_token_ids": [*own.stop_token_ids]},
                logit_bias=bias,
                ignore_eos=True,  # stop_token_ids has it
                detokenize=False,
            )
            for own in sampling
        ]
        inputs = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        answers = []
        try:
            with _quiet():
                for group in self._groups([len(prompt) for prompt in prompts]):
                    outputs = self._llm.generate(inputs[group], params[group], use_tqdm=False)
                    answers += [output.outputs[0] for output in outputs]
        except BaseException:
            self.close()
            raise
        assert len(answers) == len(prompts)
        return [Answer(np.array(answer.token_ids, dtype=np.int32), answer.finish_reason) for answer in answers]

    def _groups(self, lengths: Sequence[int]) -> Iterator[slice]:
        """All at once; on the CPU as many as one step prefills, for vLLM 0.32 cannot wind back the generator of a
        seeded request that is prefilled in chunks there ("CPU Generator does not use offset")."""
        from vllm.platforms import current_platform

        scheduler = self._llm.llm_engine.vllm_config.scheduler_config
        start, tokens = 0, 0
        for stop, length in enumerate(lengths if current_platform.is_cpu() else ()):
            if start < stop and (
                tokens + length > scheduler.max_num_batched_tokens or stop - start == scheduler.max_num_seqs
            ):
                yield slice(start, stop)
                start, tokens = stop, 0
            tokens += length
        if start < len(lengths):
            yield slice(start, len(lengths))

    def close(self) -> None:
        """Free the teacher and end the processes that vLLM started for it."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        VLLMEngine._alive -= 1
        if VLLMEngine._alive == 0:  # engines in one process share vLLM's process groups
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
            torch.set_num_threads = _set_num_threads

    def _choose_path(self, wanted: Literal["auto", "worker", "public"]) -> Literal["worker", "public"]:
        """Which path takes the rows; refuse what prompt_logprobs cannot give, warn of what it gives only in part."""
        if wanted != "public":
            defects = [defect for defect in self._llm.collective_rpc("install_capture") if defect is not None]
            if not defects:
                return "worker"
            found = f"vLLM {self._vllm.__version__} cannot capture in its workers ({defects[0]})"
            if wanted == "worker":
                raise RequestError(f'{found}; set capture_path = "public", or use a vLLM that is known to work')
            warnings.warn(f"{found}: falling back to prompt_logprobs, slower and less exact", stacklevel=3)
        if self._capture.extras:
            raise RequestError(
                f"expected no extras from prompt_logprobs, got {', '.join(self._capture.extras)}; "
                'use capture_path = "worker", or the engine "hf"'
            )
        padding = self._model_vocab_size - self._capture.vocab_size
        if padding:
            warnings.warn(
                f"the model has {padding} ids beyond the tokenizer's {self._capture.vocab_size}: prompt_logprobs "
                "normalises over all of them, and what mass they hold stays in the tail",
                stacklevel=3,
            )
        return "public"

    def _score_worker(self, sequences: Sequence[TokenSequence]) -> Iterator[SequenceTopK]:
        lengths = [len(sequence) for sequence in sequences]
        bounds = np.cumsum([0, *lengths])
        shape = (int(bounds[-1]), self._capture.top_k, self._capture.extras)
        sink = RowSink.create(*shape)
        try:
            following = [np.roll(sequence.token_ids, -1) for sequence in sequences]
            sink.columns["label_ids"][:] = np.concatenate(following)
            rows, top_k, extras = shape
            self._llm.collective_rpc(
                "begin_capture", args=(str(sink.path), rows, self._capture.vocab_size, top_k, extras)
            )
        finally:
            sink.unlink()
        self._generate(sequences, [{"extra_args": {EXTRA_ARG: int(first)}} for first in bounds[:-1]])
        self._llm.collective_rpc("end_capture")
        missing = np.flatnonzero(sink.columns["done"] == 0)
        if len(missing):
            late = sequences[int(np.searchsorted(bounds, missing[0], side="right")) - 1].sequence_id
            raise RuntimeError(f"vLLM left out {len(missing)} of {rows} positions, the first in the sequence {late}")
        return (
            _read_sink(sequence, sink, slice(first, last))
            for sequence, first, last in zip(sequences, bounds[:-1], bounds[1:], strict=True)
        )

    def _generate(self, sequences: Sequence[TokenSequence], params: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One closed batch through vLLM: every request is queued before the first step."""
        outputs: list[Any] = self._llm.generate(
            [{"prompt_token_ids": sequence.token_ids.tolist()} for sequence in sequences],
            [self._vllm.SamplingParams(**_PREFILL, **own) for own in params],
            use_tqdm=False,
        )
        assert len(outputs) == len(sequences)
        return outputs

    def _score_public(self, sequences: Sequence[TokenSequence]) -> Iterator[SequenceTopK]:
        asked = {"flat_logprobs": True, "logprobs": self._width, "prompt_logprobs": self._width}
        outputs = self._generate(sequences, [asked] * len(sequences))
        return (
            read_output(sequence, output, self._capture, self._model_vocab_size)
            for sequence, output in zip(sequences, outputs, strict=True)
        )


def _read_sink(sequence: TokenSequence, sink: RowSink, rows: slice) -> SequenceTopK:
    column = {name: values[rows] for name, values in sink.columns.items() if name not in ("label_ids", "done")}
    main = {name: column.pop(name) for name in ("top_ids", "top_logprobs", "log_tail_mass", "label_logprob")}
    return make_record(sequence, **main, extras=column)


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


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_EXPECTED)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop the warnings about what is done here on purpose."""
    loggers = [logging.getLogger(name) for name in _EXPECTED_FROM]
    for logger in loggers:
        logger.addFilter(_is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_news)


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
