"""The divergences on outcomes: against naive formulas, and the properties that define them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distiller import divergences as d
from tests import dense_reference as reference

TWO_SIDED = {
    "forward_kl": (d.forward_kl, reference.forward_kl),
    "reverse_kl": (d.reverse_kl, reference.reverse_kl),
    "jsd": (d.jsd, reference.jsd),
    "jsd .1": (lambda p, q: d.jsd(p, q, 0.1), lambda p, q, y: reference.jsd(p, q, y, 0.1)),
    "tvd": (d.tvd, reference.tvd),
    "skew_kl": (d.skew_kl, reference.skew_kl),
    "skew_rkl": (d.skew_rkl, reference.skew_rkl),
    "adaptive_kl": (lambda p, q: d.adaptive_kl(p, q, rest_columns=0), reference.adaptive_kl),
    "abkd": (lambda p, q: d.ab_divergence(0.9 * p, 0.9 * q), reference.abkd),
    "dkd": (
        lambda p, q: d.dkd(p, q, torch.zeros(len(p), dtype=torch.long), 1.0, 2.0),
        lambda p, q, y: reference.dkd(p, q, y * 0, 1.0, 2.0),
    ),
}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """log p and log q, [rows, n] float64, from nearly equal to far apart."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.01, 1.0, 5.0, 15.0]))
    log_p, log_q = (scale * torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)).log_softmax(2)
    return log_p, log_q


@pytest.mark.parametrize("name", TWO_SIDED)
@settings(max_examples=30, deadline=None)
@given(pair=pairs())
def test_equals_the_naive_formula(name: str, pair: tuple[Tensor, Tensor]) -> None:
    ours, naive = TWO_SIDED[name]
    log_p, log_q = pair
    labels = torch.zeros(len(log_p), dtype=torch.long)
    torch.testing.assert_close(ours(log_p, log_q), naive(log_p.exp(), log_q.exp(), labels), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", TWO_SIDED)
@settings(max_examples=30, deadline=None)
@given(pair=pairs())
def test_never_negative_and_zero_where_equal(name: str, pair: tuple[Tensor, Tensor]) -> None:
    ours, _ = TWO_SIDED[name]
    log_p, log_q = pair
    assert (ours(log_p, log_q) > -1e-12).all()
    assert ours(log_p, log_p).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "skew_rkl", "abkd"])
@settings(max_examples=30, deadline=None)
@given(pair=pairs(), split=st.floats(0.01, 0.99))
def test_a_proportional_group_may_be_one_outcome(name: str, pair: tuple[Tensor, Tensor], split: float) -> None:
    # The last outcome as two ids of the same ratio p/q: nothing changes, neither value nor the student's gradient.
    ours, _ = TWO_SIDED[name]
    log_p, log_q = pair
    logits = log_q.clone().requires_grad_()
    parts = torch.tensor([split, 1 - split], dtype=torch.float64).log()
    log_q = logits.log_softmax(1)
    log_p_split = torch.cat([log_p[:, :-1], log_p[:, -1:] + parts], 1)
    log_q_split = torch.cat([log_q[:, :-1], log_q[:, -1:] + parts], 1)
    if name == "abkd":  # groups come as log Σ p^s there
        inside = (0.9 * parts).logsumexp(0)
        one = d.ab_divergence(*(torch.cat([x[:, :-1], x[:, -1:] + inside], 1) for x in (0.9 * log_p, 0.9 * log_q)))
    else:
        one = ours(log_p, log_q)
    two = ours(log_p_split, log_q_split)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    for first, second in zip(
        torch.autograd.grad(one.sum(), logits, retain_graph=True), torch.autograd.grad(two.sum(), logits), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(pair=pairs())
def test_limits_and_symmetries(pair: tuple[Tensor, Tensor]) -> None:
    log_p, log_q = pair
    torch.testing.assert_close(d.jsd(log_p, log_q, 0.0), d.forward_kl(log_p, log_q))
    torch.testing.assert_close(d.jsd(log_p, log_q, 1.0), d.reverse_kl(log_p, log_q))
    torch.testing.assert_close(d.jsd(log_p, log_q), d.jsd(log_q, log_p), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(d.tvd(log_p, log_q), d.tvd(log_q, log_p))
    assert (d.tvd(log_p, log_q) <= 1 + 1e-12).all()
    torch.testing.assert_close(d.skew_kl(log_p, log_q, 0.3), d.skew_rkl(log_q, log_p, 0.3), rtol=1e-9, atol=1e-12)
    # With α = β = 1 DKD is the KL whose non-target part is not weighted by the teacher's non-target mass.
    target = torch.zeros(len(log_p), dtype=torch.long)
    p_label = log_p[:, 0].exp()
    parts = d.dkd(log_p, log_q, target, 1.0, 0.0) + (1 - p_label) * d.dkd(log_p, log_q, target, 0.0, 1.0)
    torch.testing.assert_close(parts, d.forward_kl(log_p, log_q), rtol=1e-6, atol=1e-9)


def test_jsd_is_near_its_limits() -> None:
    log_p, log_q = torch.randn(2, 4, 7, dtype=torch.float64).log_softmax(2)
    torch.testing.assert_close(d.jsd(log_p, log_q, 1e-6) / 1e-6, d.forward_kl(log_p, log_q), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", TWO_SIDED)
def test_gradients_are_right(name: str) -> None:
    ours, _ = TWO_SIDED[name]
    generator = torch.Generator().manual_seed(2)
    p, z = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    if name == "adaptive_kl":  # its weights carry no gradient, so differences see another function
        return
    assert torch.autograd.gradcheck(lambda logits: ours(p.log_softmax(1), logits.log_softmax(1)), z.requires_grad_())


def test_adaptive_head_takes_part_of_the_rest() -> None:
    # Stored mass .4, head .5: a sixth of the rest's gap counts to the head.
    log_p = torch.tensor([[0.4, 0.6]], dtype=torch.float64).log()
    log_q = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log()
    share = (0.3 + 0.3 / 6) / 0.6
    expected = share * d.forward_kl(log_p, log_q) + (1 - share) * d.reverse_kl(log_p, log_q)
    torch.testing.assert_close(d.adaptive_kl(log_p, log_q), expected)
