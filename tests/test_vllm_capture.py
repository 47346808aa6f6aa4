"""The hooks of vLLM's two model runners, driven over scripted steps: every position once, whatever the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cache_builder import vllm_capture
from cache_builder.row_sink import RowSink
from cache_builder.topk import reduce_rows
from cache_builder.vllm_capture import EXTRA_ARG, RowCapture, Span, wrap_runner

HIDDEN, MODEL_VOCAB, VOCAB, TOP_K = 16, 320, 300, 8
EXTRAS = ("entropy",)
HEAD = torch.randn(HIDDEN, MODEL_VOCAB, generator=torch.Generator().manual_seed(0))


@dataclass
class Request:
    """A prompt of random hidden states, as if a model had computed them; without a first row, nobody captures it."""

    name: str
    length: int
    first_row: int | None
    prompt_token_ids: list[int] = field(init=False)
    hidden: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.length)
        self.hidden = torch.randn(self.length + 8, HIDDEN, generator=generator)  # a few decoded positions behind
        self.prompt_token_ids = torch.randint(0, VOCAB, (self.length,), generator=generator).tolist()

    @property
    def sampling_params(self) -> Any:
        extra_args = None if self.first_row is None else {EXTRA_ARG: self.first_row}
        return SimpleNamespace(extra_args=extra_args, prompt_logprobs=None, prompt_logprob_token_ids=None)


class Head:
    """compute_logits, counting its calls and the rows of the largest."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(hidden))
        return hidden @ HEAD.to(hidden.device)


Step = Sequence[tuple[Request, int, int]]  # request, tokens computed before, tokens of this step
Driver = Callable[[Sequence[Step]], None]


@pytest.fixture
def requests() -> list[Request]:
    return [Request("a", 1, 0), Request("b", 23, 1), Request("other", 9, None), Request("c", 40, 24)]


@pytest.fixture
def sink(requests: list[Request]) -> Iterator[RowSink]:
    sink = RowSink.create(64, TOP_K, EXTRAS)
    for request in requests:
        if request.first_row is not None:
            rows = slice(request.first_row, request.first_row + request.length)
            sink.columns["label_ids"][rows] = np.roll(request.prompt_token_ids, -1)
    yield sink
    sink.unlink()


class V1Runner:
    """What the hook reads of vLLM's first model runner."""

    def __init__(self) -> None:
        self.model = Head()
        self.requests: dict[str, Any] = {}
        self.input_batch = SimpleNamespace(req_ids=[])
        self.query_start_loc = SimpleNamespace(np=np.zeros(1, dtype=np.int32))
        self.original_calls = 0

    def _get_prompt_logprobs_dict(
        self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        self.original_calls += 1
        return {}

    def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self.requests = {
                request.name: SimpleNamespace(
                    sampling_params=request.sampling_params,
                    prompt_token_ids=request.prompt_token_ids,
                    num_computed_tokens=computed,
                )
                for request, computed, _ in step
            }
            self.input_batch.req_ids = [request.name for request, _, _ in step]
            self.query_start_loc.np = np.cumsum([0, *(tokens for _, _, tokens in step)])
            hidden = torch.cat([request.hidden[computed : computed + tokens] for request, computed, tokens in step])
            self._get_prompt_logprobs_dict(hidden, {request.name: tokens for request, _, tokens in step})


class V2Runner:
    """vLLM's own PromptLogprobsWorker, as its second model runner calls it."""

    def __init__(self) -> None:
        module = pytest.importorskip("vllm.v1.worker.gpu.sample.prompt_logprob")
        self.prompt_logprobs_worker = module.PromptLogprobsWorker(8, torch.device("cpu"))
        self.head = Head()

    def run(self, steps: Sequence[Step]) -> None:
        worker = self.prompt_logprobs_worker
        slots: dict[str, int] = {}
        for step in steps:
            for request, computed, _ in step:
                if computed == 0:  # new, or preempted and back: this runner starts it over
                    if request.name in slots:
                        worker.remove_request(request.name)
                    slots[request.name] = 7 - len(slots) if request.name not in slots else slots[request.name]
                    worker.add_request(request.name, slots[request.name], request.sampling_params)
            prompt_lens = np.zeros(8, dtype=np.int32)
            for request, _, _ in step:
                prompt_lens[slots[request.name]] = request.length
            batch = SimpleNamespace(
                req_ids=[request.name for request, _, _ in step],
                idx_mapping_np=np.array([slots[request.name] for request, _, _ in step]),
                num_computed_prefill_tokens_np=np.array([computed for _, computed, _ in step]),
                num_scheduled_tokens=np.array([tokens for _, _, tokens in step]),
                query_start_loc_np=np.cumsum([0, *(tokens for _, _, tokens in step)]),
                prefill_len_np=np.array([request.length for request, _, _ in step]),
            )
            hidden = torch.cat([request.hidden[computed : computed + tokens] for request, computed, tokens in step])
            padded = torch.cat([hidden, torch.full((3, HIDDEN), torch.nan)])  # as a CUDA graph pads its batch
            result = worker.compute_prompt_logprobs(self.head.compute_logits, padded, batch, None, None, prompt_lens)
            assert result == {}


RUNNERS = [V1Runner, pytest.param(V2Runner, marks=pytest.mark.vllm)]


def expected_rows(request: Request) -> Mapping[str, torch.Tensor]:
    labels = torch.tensor(request.prompt_token_ids).roll(-1)
    return reduce_rows((request.hidden[: request.length] @ HEAD)[:, :VOCAB], labels, TOP_K, EXTRAS)


def check(sink: RowSink, requests: Sequence[Request]) -> None:
    """Every captured prompt position is there, at its place, and nothing else was written."""
    done = np.zeros(64, dtype=np.uint8)
    for request in requests:
        if request.first_row is None:
            continue
        rows = slice(request.first_row, request.first_row + request.length)
        done[rows] = 1
        for name, values in expected_rows(request).items():
            if name == "top_ids":
                np.testing.assert_array_equal(sink.columns[name][rows], values)
            else:  # the matrix product rounds differently for another number of rows
                np.testing.assert_allclose(sink.columns[name][rows], values, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(sink.columns["done"], done)


def schedules(requests: Sequence[Request]) -> Mapping[str, list[Step]]:
    a, b, other, c = requests
    return {
        "all at once": [[(a, 0, 1), (b, 0, 23), (c, 0, 40)]],
        "one by one": [[(request, 0, request.length)] for request in (a, b, c)],
        "chunked": [[(a, 0, 1), (b, 0, 10)], [(b, 10, 13), (c, 0, 2)], [(c, 2, 37)], [(c, 39, 1)]],
        "one token at a time": [[(b, at, 1), *([(c, at, 1)] if at < 40 else [])] for at in range(23)]
        + [[(c, at, 1)] for at in range(23, 40)]
        + [[(a, 0, 1)]],
        "beside a stranger": [[(a, 0, 1), (other, 0, 9), (b, 0, 23)], [(other, 9, 1), (c, 0, 40)]],
        "decoding behind": [[(a, 0, 1), (b, 0, 23), (c, 0, 40)], [(a, 1, 1), (b, 23, 1), (c, 40, 1)]],
        "preempted and back": [[(a, 0, 1), (b, 0, 10)], [(b, 10, 5), (c, 0, 40)], [(b, 0, 12)], [(b, 12, 11)]],
    }


@pytest.mark.parametrize("runner_type", RUNNERS)
@pytest.mark.parametrize("schedule", schedules([Request("x", 1, None)] * 4).keys())
def test_every_position_once(runner_type: type, schedule: str, requests: list[Request], sink: RowSink) -> None:
    runner = runner_type()
    capture = RowCapture(VOCAB, TOP_K, EXTRAS, sink)
    assert wrap_runner(runner, lambda: capture) is None
    runner.run(schedules(requests)[schedule])
    capture.drain(wait=True)
    check(sink, requests)


@pytest.mark.gpu
def test_every_position_once_from_a_device(requests: list[Request], sink: RowSink) -> None:
    for request in requests:
        request.hidden = request.hidden.cuda()
    runner = V1Runner()
    capture = RowCapture(VOCAB, TOP_K, EXTRAS, sink)
    wrap_runner(runner, lambda: capture)
    runner.run(schedules(requests)["chunked"])
    capture.drain(wait=True)
    for request in requests:
        request.hidden = request.hidden.cpu()
    check(sink, requests)


@pytest.mark.parametrize("runner_type", RUNNERS)
def test_nothing_happens_between_batches(runner_type: type, requests: list[Request]) -> None:
    runner = runner_type()
    assert wrap_runner(runner, lambda: None) is None
    runner.run([[(requests[3], 0, 40)]])
    assert (runner.model if runner_type is V1Runner else runner.head).calls == []
    if runner_type is V1Runner:
        assert runner.original_calls == 1  # vLLM's own prompt log-probabilities still work


def test_a_rank_without_a_sink_joins_in_every_call(requests: list[Request], sink: RowSink) -> None:
    calls = []
    for own_sink in (sink, None):  # with tensor parallelism compute_logits communicates: the ranks must agree
        runner = V1Runner()
        capture = RowCapture(VOCAB, TOP_K, EXTRAS, own_sink)
        wrap_runner(runner, lambda capture=capture: capture)
        runner.run(schedules(requests)["chunked"])
        calls.append(runner.model.calls)
    assert calls[0] == calls[1] == [11, 15, 37, 1]


def test_logits_are_computed_a_bounded_number_of_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, requests: list[Request], sink: RowSink
) -> None:
    monkeypatch.setattr(vllm_capture, "_CPU_LOGITS", 7 * VOCAB)
    runner = V1Runner()
    capture = RowCapture(VOCAB, TOP_K, EXTRAS, sink)
    wrap_runner(runner, lambda: capture)
    runner.run(schedules(requests)["all at once"])
    check(sink, requests)
    assert max(runner.model.calls) == 7
    assert sum(runner.model.calls) == 64


def test_a_hook_that_moved_is_named() -> None:
    assert wrap_runner(SimpleNamespace(), lambda: None) == (
        "SimpleNamespace has neither _get_prompt_logprobs_dict nor prompt_logprobs_worker"
    )

    class OtherArguments(V1Runner):
        def _get_prompt_logprobs_dict(self, hidden_states: torch.Tensor) -> dict[str, Any]:  # type: ignore[override]
            return {}

    moved = wrap_runner(OtherArguments(), lambda: None)
    assert moved == "_get_prompt_logprobs_dict of OtherArguments is not the one that is known"
    stranger = SimpleNamespace(add_request=lambda request: None)
    assert wrap_runner(SimpleNamespace(prompt_logprobs_worker=stranger), lambda: None) == (
        "add_request of SimpleNamespace is not the one that is known"
    )


def test_a_sink_without_room_is_an_error_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match="logitcask-"):
        RowSink.create(1 << 44, 64, ())
    assert list(tmp_path.iterdir()) == []


def test_runs_merge_what_adjoins() -> None:
    spans = [Span(5, 100, 2), Span(0, 10, 5), Span(9, 50, 3)]
    runs = [(start, rows.tolist()) for start, rows in vllm_capture._runs(spans, 4)]
    assert runs == [(0, [10, 11, 12, 13]), (4, [14, 100, 101]), (9, [50, 51, 52])]
    assert list(vllm_capture._runs([], 4)) == []


class FakeEvent:
    """A CUDA event that is reached when the test says so."""

    def __init__(self) -> None:
        self.reached, self.waits = False, 0

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self.waits += 1
        self.reached = True


def test_copies_under_way_are_written_when_they_arrive(sink: RowSink) -> None:
    capture = RowCapture(VOCAB, TOP_K, EXTRAS, sink)
    kept = reduce_rows(torch.randn(1, VOCAB), torch.zeros(1, dtype=torch.int64), TOP_K, EXTRAS)
    events = [FakeEvent() for _ in range(12)]
    for at, event in enumerate(events):
        capture._pending.append((event, np.array([at]), kept))
    events[0].reached = events[2].reached = True
    capture.drain(wait=False)
    # 0 had arrived; of the eleven behind it the oldest are waited for until eight are left; 2 had arrived as well.
    assert np.flatnonzero(sink.columns["done"]).tolist() == [0, 1, 2, 3]
    assert [event.waits for event in events] == [0, 1, 0, 1] + [0] * 8
    capture.drain(wait=True)
    assert np.flatnonzero(sink.columns["done"]).tolist() == list(range(12))
