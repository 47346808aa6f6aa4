"""The one-pass reduction of logits against float64 log_softmax and a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_builder import topk
from cache_builder.topk import reduce_rows

TOLERANCE = 2e-6
"""Relative to max(1, |value|): float32 of the inputs' exponentials (2e-7 of the sum) and of the stored result (1.2e-7
of a value); an order of magnitude of room for the processor's own exp."""

EXTRAS = ("entropy", "log_rest_sqrt_sum")


def reference(logits: torch.Tensor, label_ids: torch.Tensor, top_k: int) -> dict[str, torch.Tensor]:
    """The definition: a stable sort for the ids, float64 over the full row for the rest."""
    order = logits.float().sort(dim=1, descending=True, stable=True).indices
    logprobs = logits.double().log_softmax(1)
    rest = logprobs.scatter(1, order[:, :top_k], -torch.inf)
    return {
        "top_ids": order[:, :top_k],
        "top_logprobs": logprobs.gather(1, order[:, :top_k]),
        "log_tail_mass": rest.logsumexp(1),
        "label_logprob": logprobs.gather(1, label_ids[:, None])[:, 0],
        "entropy": torch.special.entr(logprobs.exp()).sum(1),
        "log_rest_sqrt_sum": (rest / 2).logsumexp(1),
    }


def check(logits: torch.Tensor, top_k: int, device: str = "cpu") -> None:
    count, vocab_size = logits.shape
    label_ids = torch.arange(count) * 7919 % vocab_size
    want = reference(logits, label_ids, top_k)
    got = reduce_rows(logits.clone().to(device), label_ids.to(device), top_k, EXTRAS)
    assert {values.device.type for values in got.values()} == {device}
    got = {name: values.cpu() for name, values in got.items()}
    assert {name: tensor.dtype for name, tensor in got.items()} == {
        name: torch.int32 if name == "top_ids" else torch.float32 for name in want
    }
    # Each log-probability stands where the reference has it, up to the order among equals above the k-th place.
    for ids, expected in zip(got["top_ids"].tolist(), want["top_ids"].tolist(), strict=True):
        assert set(ids) == set(expected)
    for name in ("top_logprobs", "log_tail_mass", "label_logprob", *EXTRAS):
        actual, expected = got[name].double(), want[name]
        assert torch.equal(actual.isneginf(), expected.isneginf()), name
        finite = expected.isfinite()
        gap = (actual - expected)[finite].abs() / expected[finite].abs().clamp(min=1)
        assert not finite.any() or gap.max() <= TOLERANCE, (name, float(gap.max()))


@pytest.mark.parametrize("vocab_size", [300, 4096, 32000, 49152, 50257, 32001])
@pytest.mark.parametrize("top_k", [1, 16, 64])
def test_random_rows(vocab_size: int, top_k: int) -> None:
    torch.manual_seed(vocab_size + top_k)
    check(torch.randn(21, vocab_size) * torch.tensor([0.01, 1.0, 8.0]).repeat(7)[:, None], top_k)


@pytest.mark.parametrize("vocab_size", [8, 300, 8192, 8191])
def test_adversarial_rows(vocab_size: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(12, vocab_size)
    rows[0] = 3.25  # all equal
    rows[1] = -1e30  # one huge value over a far rest
    rows[1, 5] = 1e30
    rows[2, 3] = 1e4  # a rest that float32 probabilities cannot hold
    rows[3] = -torch.inf  # nothing but one id
    rows[3, 7] = 0.0
    rows[4, 2::2] = -torch.inf
    rows[5] = torch.arange(vocab_size) % 3  # ties everywhere
    rows[6] = torch.arange(vocab_size) / 16  # the top k in the last group
    rows[7] = -torch.arange(vocab_size) / 16  # and in the first
    rows[8] = 1e-30 * rows[8]
    rows[9, -1] = 50.0  # in what no whole group holds
    rows[10, :4] = torch.tensor([88.0, 89.0, 300.0, 300.0])  # exp overflows float32
    rows[11] = -0.0
    rows[11, ::2] = 0.0  # zeros of both signs are equal
    for top_k in sorted({1, 2, 4, min(64, vocab_size - 1), vocab_size - 1, vocab_size}):
        check(rows, top_k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_tie_at_the_last_place(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits = (torch.randn(33, 32000) * 3).to(dtype)
    values = logits.float().topk(65).values
    assert (values[:, 63] == values[:, 64]).float().mean() > 0.2  # the case is there
    check(logits, 64)


@pytest.mark.parametrize("vocab_size", [70, 5000, 40000])
def test_both_ways_to_choose_among_equals_agree(vocab_size: int) -> None:
    # The one for devices runs here as well: it is the same arithmetic anywhere.
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 50, (24, vocab_size), generator=generator).float()
    rows[0], rows[1, 3:], rows[2, ::2] = 1.0, -torch.inf, -0.0
    rows[3] = torch.randn(vocab_size, generator=generator)  # untied
    for top_k in (1, 2, 16, 64):
        order = rows.sort(dim=1, descending=True, stable=True).indices[:, :top_k].sort(dim=1).values
        values, ids = rows.topk(top_k + 1, dim=1)
        by_key = topk._choose_by_key(rows, values, ids)
        assert torch.equal(by_key[:, :top_k].sort(dim=1).values, order)
        assert torch.equal(rows.gather(1, by_key), values)
        for spare in (0, 20):
            by_scan = topk._select(rows, top_k + 1, spare)[1]
            assert torch.equal(by_scan[:, :top_k].sort(dim=1).values, order)
            assert torch.equal(rows.gather(1, by_scan), values)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    logits = torch.randn(400, 5000)
    labels = torch.arange(400)
    alone, before = reduce_rows(logits.clone(), labels, 16, EXTRAS), torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    pool = topk._pool(3)
    assert pool is not None
    with torch.inference_mode():  # as in vLLM's workers: the threads must write to inference tensors
        shared = reduce_rows(logits.clone(), labels, 16, EXTRAS)
    monkeypatch.undo()
    assert torch.get_num_threads() in (before, 3)
    torch.set_num_threads(before)
    for name, values in alone.items():
        assert torch.equal(values, shared[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [300, 50257, 151936])
def test_on_a_device(vocab_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    logits = (torch.randn(300, vocab_size) * 3).to(dtype)
    logits[0] = 1.0
    for top_k in (1, 64, 128):
        check(logits, top_k, "cuda")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 700), st.data())
def test_any_row_with_ties(seed: int, vocab_size: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, vocab_size))
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]))
    generator = torch.Generator().manual_seed(seed)
    check(torch.randint(0, levels, (3, vocab_size), generator=generator) / 4, top_k)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    torch.manual_seed(2)
    logits = torch.randn(97, 5000)
    labels = torch.arange(97)
    together = reduce_rows(logits.clone(), labels, 16)
    for at in (0, 50, 96):
        alone = reduce_rows(logits[at : at + 1].clone(), labels[at : at + 1], 16)
        for name, values in together.items():
            assert torch.equal(values[at : at + 1], alone[name]), name


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_row_is_nan_and_alone(poison: float) -> None:
    logits = torch.randn(3, 4096)
    logits[1, 17] = poison
    got = reduce_rows(logits, torch.zeros(3, dtype=torch.int64), 8)
    poisoned = got["top_logprobs"].isnan().any(dim=1).numpy()
    assert np.array_equal(poisoned, [False, True, False])
    assert ((got["top_ids"] >= 0) & (got["top_ids"] < 4096)).all()
