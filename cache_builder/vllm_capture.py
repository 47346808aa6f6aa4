"""What runs inside vLLM's workers: the lm_head at every position of a prompt, reduced on the spot.

vLLM computes prompt log-probabilities in one place of each of its two model runners, with the hidden states of the
step at hand. `CaptureExtension` wraps that place. Both are private to vLLM, so they are looked for, never assumed.
The module is imported in the workers by name; it imports vllm only in there.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.row_sink import RowSink
from cache_builder.topk import reduce_rows

EXTRA_ARG = "logitcask_first_row"
"""Key in SamplingParams.extra_args: the row of the sink that a request's first position goes to."""

V1_HOOK = "_get_prompt_logprobs_dict"
V2_HOOK = "prompt_logprobs_worker"

_CPU_LOGITS = 1 << 22  # logits computed at once: 16 MiB of float32; larger buffers cost more in page faults
_CUDA_LOGITS = 1 << 26
_PENDING = 8  # copies from the device that may be under way before the oldest is waited for


class Span(NamedTuple):
    """A request's share of one step: hidden rows [start, start + length) go to sink rows [row, row + length)."""

    start: int
    row: int
    length: int


class CaptureExtension:
    """Mixed into vLLM's worker class (`worker_extension_cls`); called by `collective_rpc`, for control only."""

    def install_capture(self) -> str | None:
        """Wrap the hook of this worker's model runner, once; what is missing, in words, where there is none."""
        from vllm.distributed import get_pp_group, get_tp_group

        worker: Any = self
        if not hasattr(worker, "logitcask_capture"):
            worker.logitcask_capture = None
            last_stage = get_pp_group().is_last_rank  # the others never see final hidden states
            worker.logitcask_writes = last_stage and get_tp_group().rank_in_group == 0
            worker.logitcask_defect = (
                wrap_runner(worker.model_runner, lambda: worker.logitcask_capture) if last_stage else None
            )
        defect: str | None = worker.logitcask_defect
        return defect

    def begin_capture(self, path: str, rows: int, vocab_size: int, top_k: int, extras: Sequence[str]) -> None:
        """Open the sink of a batch, on the one rank that writes."""
        worker: Any = self
        sink = RowSink.open(path, rows, top_k, extras) if worker.logitcask_writes else None
        worker.logitcask_capture = RowCapture(vocab_size, top_k, extras, sink)

    def end_capture(self) -> None:
        """Wait for what is still under way, and let go of the sink."""
        worker: Any = self
        capture, worker.logitcask_capture = worker.logitcask_capture, None
        if capture is not None:
            capture.drain(wait=True)


class RowCapture:
    """The capture of one batch on one rank. Without a sink the rank only takes its part in compute_logits."""

    def __init__(self, vocab_size: int, top_k: int, extras: Sequence[str], sink: RowSink | None) -> None:
        self._vocab_size, self._top_k, self._extras, self._sink = vocab_size, top_k, tuple(extras), sink
        self._pending: deque[tuple[Any, NDArray[np.int64], dict[str, Tensor]]] = deque()

    def capture(self, compute_logits: Callable[[Tensor], Tensor | None], hidden: Tensor, spans: Sequence[Span]) -> None:
        """Score the spans of one step. Every rank makes the same calls of compute_logits, for they communicate."""
        budget = _CUDA_LOGITS if hidden.is_cuda else _CPU_LOGITS
        for start, rows in _runs(spans, max(1, budget // self._vocab_size)):
            logits = compute_logits(hidden[start : start + len(rows)])
            if self._sink is None:
                continue
            assert logits is not None, "the writing rank has no logits"
            labels = torch.from_numpy(self._sink.columns["label_ids"][rows].astype(np.int64))
            if hidden.is_cuda:
                labels = labels.pin_memory().to(hidden.device, non_blocking=True)
            self._put(rows, reduce_rows(logits[:, : self._vocab_size], labels, self._top_k, self._extras))

    def _put(self, rows: NDArray[np.int64], kept: dict[str, Tensor]) -> None:
        """Hand rows over; from a device by asynchronous copies that later calls pick up."""
        if not kept["top_ids"].is_cuda:
            self._write(rows, kept)
            return
        pinned = {name: torch.empty_like(values, device="cpu", pin_memory=True) for name, values in kept.items()}
        for name, values in kept.items():
            pinned[name].copy_(values, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._pending.append((copied, rows, pinned))
        self.drain(wait=False)

    def drain(self, *, wait: bool) -> None:
        """Write the copies that have arrived; all of them with `wait`, and the oldest where too many are under way."""
        while self._pending:
            copied, rows, pinned = self._pending[0]
            if not copied.query():
                if not wait and len(self._pending) <= _PENDING:
                    return
                copied.synchronize()
            self._pending.popleft()
            self._write(rows, pinned)

    def _write(self, rows: NDArray[np.int64], kept: Mapping[str, Tensor]) -> None:
        assert self._sink is not None
        for name, values in kept.items():
            self._sink.columns[name][rows] = values.numpy()
        self._sink.columns["done"][rows] = 1  # last: what is done is there


def wrap_runner(runner: Any, current: Callable[[], RowCapture | None]) -> str | None:
    """Make a model runner capture every prompt position while `current()` is not None.

    Returns None, or what this vLLM lacks for it.
    """
    if hasattr(runner, V2_HOOK):
        return _wrap_v2(getattr(runner, V2_HOOK), current)
    if hasattr(runner, V1_HOOK):
        return _wrap_v1(runner, current)
    return f"{type(runner).__name__} has neither {V1_HOOK} nor {V2_HOOK}"


def _wrap_v1(runner: Any, current: Callable[[], RowCapture | None]) -> str | None:
    original = getattr(runner, V1_HOOK)
    missing = [name for name in ("model", "requests", "input_batch", "query_start_loc") if not hasattr(runner, name)]
    if missing or list(inspect.signature(original).parameters) != ["hidden_states", "num_scheduled_tokens"]:
        return f"{V1_HOOK} of {type(runner).__name__} is not the one that is known"

    def hook(hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        capture = current()
        if capture is not None:
            capture.capture(runner.model.compute_logits, hidden_states, list(spans(num_scheduled_tokens)))
        return original(hidden_states, num_scheduled_tokens)

    def spans(num_scheduled_tokens: dict[str, int]) -> Iterator[Span]:
        for index, req_id in enumerate(runner.input_batch.req_ids):
            request = runner.requests[req_id]
            first_row = _first_row(request.sampling_params)
            if first_row is not None and req_id in num_scheduled_tokens:
                computed = int(request.num_computed_tokens)
                count = min(num_scheduled_tokens[req_id], len(request.prompt_token_ids) - computed)
                if count > 0:
                    yield Span(int(runner.query_start_loc.np[index]), first_row + computed, count)

    setattr(runner, V1_HOOK, hook)
    return None


def _wrap_v2(worker: Any, current: Callable[[], RowCapture | None]) -> str | None:
    known = {
        "add_request": ["req_id", "req_idx", "sampling_params"],
        "remove_request": ["req_id"],
        "compute_prompt_logprobs": [
            "logits_fn",
            "hidden_states",
            "input_batch",
            "all_token_ids",
            "num_computed_tokens",
            "prompt_lens",
        ],
    }
    for name, parameters in known.items():
        if not hasattr(worker, name) or list(inspect.signature(getattr(worker, name)).parameters) != parameters:
            return f"{name} of {type(worker).__name__} is not the one that is known"
    add_request, remove_request, compute = (getattr(worker, name) for name in known)
    first_rows: dict[str, int] = {}

    def hook_add(req_id: str, req_idx: int, sampling_params: Any) -> None:
        first_row = _first_row(sampling_params)
        if first_row is not None:
            first_rows[req_id] = first_row
        add_request(req_id, req_idx, sampling_params)

    def hook_remove(req_id: str) -> None:
        first_rows.pop(req_id, None)
        remove_request(req_id)

    def hook_compute(
        logits_fn: Any,
        hidden_states: Tensor,
        input_batch: Any,
        all_token_ids: Any,
        num_computed_tokens: Any,
        prompt_lens: Any,
    ) -> Any:
        capture = current()
        if capture is not None:
            capture.capture(logits_fn, hidden_states, list(spans(input_batch, prompt_lens)))
        return compute(logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens)

    def spans(input_batch: Any, prompt_lens: Any) -> Iterator[Span]:
        for index, req_id in enumerate(input_batch.req_ids):
            if req_id in first_rows:
                computed = int(input_batch.num_computed_prefill_tokens_np[index])
                remaining = int(prompt_lens[input_batch.idx_mapping_np[index]]) - computed
                count = min(int(input_batch.num_scheduled_tokens[index]), remaining)
                if count > 0:
                    yield Span(int(input_batch.query_start_loc_np[index]), first_rows[req_id] + computed, count)

    worker.add_request, worker.remove_request, worker.compute_prompt_logprobs = hook_add, hook_remove, hook_compute
    return None


def _first_row(sampling_params: Any) -> int | None:
    extra_args = getattr(sampling_params, "extra_args", None)
    first_row: int | None = extra_args.get(EXTRA_ARG) if extra_args else None
    return first_row


def _runs(spans: Sequence[Span], most: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Adjoining spans as runs of at most `most` hidden rows: the first hidden row, and the sink row of each."""
    ordered = sorted(spans)
    begin = 0
    for end in range(1, len(ordered) + 1):
        if end < len(ordered) and ordered[end].start == ordered[end - 1].start + ordered[end - 1].length:
            continue
        rows = np.concatenate([np.arange(span.row, span.row + span.length) for span in ordered[begin:end]])
        for at in range(0, len(rows), most):
            yield ordered[begin].start + at, rows[at : at + most]
        begin = end
