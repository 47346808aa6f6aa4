"""The four tails: exact where they know, close to their formulas where they assume, honest about temperatures."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distiller.divergences import forward_kl
from distiller.head import distillation_loss
from distiller.objectives import make_objective
from distiller.rows import StudentReduction, TeacherRows
from distiller.taid import interpolate
from distiller.tail import TAILS, DroppedTail, StudentTail, Tail, spread
from storage_schemas.errors import RequestError
from tests.dense_reference import at_temperature, dense_loss, written_out
from tests.test_head import TOP_K, VOCAB, problem, stored


def reduce(z: Tensor, teacher: TeacherRows, tail: Tail) -> StudentReduction:
    return StudentReduction(
        z.detach().clone(), teacher.top_ids, teacher.label_ids, candidates=tail.candidates, differentiable=True
    )


def scene(seed: int = 0, rows: int = 6, top_k: int = TOP_K, **more: Any) -> tuple[Tensor, Tensor, TeacherRows]:
    """The teacher's full distribution, the student's logits, what was stored."""
    hidden, weight, p, labels = problem(seed=seed, rows=rows)
    return p, (hidden @ weight.T).detach(), stored(p, labels, top_k, **more)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["student", "capped", "uniform", "renormalised"]),
    kappa=st.booleans(),
    temperature=st.sampled_from([1.0, 1.5]),
    with_label=st.booleans(),
    top_k=st.sampled_from([1, 2, 8, VOCAB - 3, VOCAB]),
)
@pytest.mark.filterwarnings("ignore:at temperature")
def test_masses_are_one_and_shapes_agree(
    seed: int, kind: str, kappa: bool, temperature: float, with_label: bool, top_k: int
) -> None:
    _, z, teacher = scene(seed, top_k=top_k)
    tail = StudentTail(kappa, 3 if kind == "capped" else 0) if kind in ("student", "capped") else TAILS[kind]()
    count = min(tail.candidates, VOCAB - top_k)
    student = StudentReduction(z.clone(), teacher.top_ids, teacher.label_ids, candidates=count)
    outcomes = tail.outcomes(student, teacher, temperature, with_label=with_label)
    assert outcomes.log_p.shape == outcomes.log_q.shape
    for log_x in (outcomes.log_p, outcomes.log_q):
        torch.testing.assert_close(log_x.logsumexp(1).exp(), torch.ones(6, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    if with_label and kind != "renormalised" and temperature == 1:
        assert outcomes.target is not None
        at_label = outcomes.log_p.gather(1, outcomes.target[:, None])[:, 0]
        torch.testing.assert_close(at_label, teacher.label_logprob)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), cap=st.integers(1, 8), sharp=st.sampled_from([0.3, 1.0, 4.0]))
def test_cap_spreads_the_mass_as_bisection_does(seed: int, cap: int, sharp: float) -> None:
    p, z, teacher = scene(seed)
    z = z * sharp
    tail = StudentTail(kappa=False, cap=cap)
    outcomes = tail.outcomes(reduce(z, teacher, tail), teacher)
    assumed = written_out(p, teacher.top_ids, z.softmax(1), cap=cap)
    candidates = z.softmax(1).scatter(1, teacher.top_ids, -1.0).topk(cap, dim=1).indices
    expected = assumed.gather(1, candidates)
    torch.testing.assert_close(outcomes.log_p[:, TOP_K:-1].exp(), expected, rtol=1e-7, atol=1e-12)
    assert (outcomes.log_p[:, TOP_K:-1] <= outcomes.log_p[:, TOP_K - 1, None] + 1e-12).all()


def test_spread_is_half_the_variance_of_a_normal_log_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    log_q = torch.zeros(1, 200_000, dtype=torch.float64)
    for kappa in (0.1, 0.7, 2.0):
        log_ratio = math.sqrt(2 * kappa) * torch.randn(log_q.shape, generator=generator, dtype=torch.float64)
        assert spread(log_q + log_ratio, log_q).item() == pytest.approx(kappa, rel=0.03)
    assert spread(log_q[:, :5], log_q[:, :5]).item() == 0


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_kappa_is_its_formula(t: float) -> None:
    # R ← R · exp(-κ t (1-t)), and the loss grows by r κ t².
    _, z, teacher = scene(seed=2)
    plain, corrected = StudentTail(kappa=False, cap=0), StudentTail(kappa=True, cap=0)
    late = slice(TOP_K // 2, TOP_K)
    student = reduce(z, teacher, plain)
    kappa = StudentTail.SPREAD * spread(teacher.top_logprobs[:, late], student.log_q[:, late].detach())
    kappa_of_first = kappa.max().item()
    assert kappa_of_first > 0.1
    one = plain.outcomes(student, teacher)
    two = corrected.outcomes(reduce(z, teacher, corrected), teacher)
    log_rest = (1 - t) * one.log_q[:, -1] + t * one.log_p[:, -1] - kappa * t * (1 - t)
    mixed = torch.cat([((1 - t) * one.log_q + t * one.log_p)[:, :-1], log_rest[:, None]], 1).log_softmax(1)
    share = mixed[:, -1].exp()
    expected = (mixed.exp() * (mixed - one.log_q)).sum(1) + share * kappa * t * t
    found = interpolate(two.log_p, two.log_q, t)
    # Five nodes integrate a normal to a fraction of a per cent at these κ.
    near = {"rtol": 2e-2, "atol": 2e-3}
    few = kappa < 2
    assert few.any()
    torch.testing.assert_close(found[:, TOP_K:].exp().sum(1)[few], share.detach()[few], **near)
    loss = (found.exp() * (found - two.log_q)).sum(1)
    torch.testing.assert_close(loss[few].detach(), expected[few].detach(), **near)


def test_kappa_vanishes_where_the_student_is_right() -> None:
    p, _, teacher = scene()
    tail = StudentTail()
    outcomes = tail.outcomes(reduce(p.log(), teacher, tail), teacher)
    assert forward_kl(outcomes.log_p, outcomes.log_q).abs().max() < 1e-9


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cap", [0, 4])
@pytest.mark.parametrize("kappa", [False, True])
def test_temperature_two_knows_the_size_of_the_rest(kappa: bool, cap: int) -> None:
    p, z, teacher = scene(extras=True)
    tail = StudentTail(kappa, cap)
    outcomes = tail.outcomes(reduce(z, teacher, tail), teacher, 2.0)
    exact, _ = at_temperature(p, z, 2.0)
    torch.testing.assert_close(outcomes.log_p[:, :TOP_K].exp(), exact.gather(1, teacher.top_ids), rtol=1e-9, atol=0)


@pytest.mark.parametrize("temperature", [0.7, 1.3, 2.0])
@pytest.mark.filterwarnings("ignore:at temperature")
def test_temperatures_are_exact_where_the_student_is_right(temperature: float) -> None:
    p, _, teacher = scene()
    tail = StudentTail(kappa=False, cap=0)
    outcomes = tail.outcomes(reduce(p.log(), teacher, tail), teacher, temperature)
    exact, _ = at_temperature(p, p.log(), temperature)
    torch.testing.assert_close(outcomes.log_p[:, :TOP_K].exp(), exact.gather(1, teacher.top_ids))


@pytest.mark.parametrize("per_row", [False, True])
def test_rows_may_differ_in_temperature(per_row: bool) -> None:
    p, z, teacher = scene()
    tail = StudentTail(kappa=False, cap=0)
    temperature: float | Tensor = torch.linspace(0.8, 1.4, 6, dtype=torch.float64) if per_row else 1.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = tail.outcomes(reduce(z, teacher, tail), teacher, temperature)
    assumed = written_out(p, teacher.top_ids, z.softmax(1))
    column = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    expected = dense_loss("forward_kl", assumed, z, teacher.label_ids, column)
    found = forward_kl(outcomes.log_p, outcomes.log_q) * temperature**2
    torch.testing.assert_close(found.detach(), expected)


def test_warns_once_what_a_temperature_leaves_to_the_model() -> None:
    hidden, weight, p, labels = problem()
    objective = make_objective("forward_kl", {"temperature": 3.0})
    with pytest.warns(UserWarning, match=r"at temperature 3 the ids .* hold \d+% .*log_rest_sqrt_sum") as seen:
        distillation_loss(hidden, weight, stored(p, labels), objective, chunk_rows=2)
    assert len([one for one in seen if "at temperature" in str(one.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distillation_loss(hidden, weight, stored(p, labels), objective, chunk_rows=2)
    with pytest.warns(UserWarning, match="the cache holds what makes temperature 2 exact"):
        distillation_loss(
            hidden, weight, stored(p, labels, extras=True), make_objective("forward_kl", {"temperature": 3.0})
        )


@pytest.mark.filterwarnings("error")
def test_is_silent_where_there_is_nothing_to_warn_of() -> None:
    hidden, weight, p, labels = problem()
    for options, teacher in (
        ({"temperature": 1.0}, stored(p, labels)),
        ({"temperature": 2.0}, stored(p, labels, extras=True)),
        ({"temperature": 4.0}, stored(p, labels, VOCAB)),
    ):
        distillation_loss(hidden, weight, teacher, make_objective("forward_kl", options))


def test_dropped_knows_no_temperature() -> None:
    _, z, teacher = scene()
    tail = DroppedTail()
    with pytest.raises(RequestError, match="temperature other than 1"):
        tail.outcomes(reduce(z, teacher, tail), teacher, 2.0)
    outcomes = tail.outcomes(reduce(z, teacher, tail), teacher)
    torch.testing.assert_close(outcomes.log_p, teacher.top_logprobs)
    torch.testing.assert_close(outcomes.log_q.detach(), z.log_softmax(1).gather(1, teacher.top_ids))


def test_renormalised_is_a_softmax_over_the_stored_ids() -> None:
    _, z, teacher = scene()
    tail = TAILS["renormalised"]()
    outcomes = tail.outcomes(reduce(z, teacher, tail), teacher)
    torch.testing.assert_close(outcomes.log_q.detach(), z.gather(1, teacher.top_ids).log_softmax(1))
    torch.testing.assert_close(outcomes.log_p, teacher.top_logprobs.log_softmax(1))


def test_a_better_tail_gives_a_better_gradient() -> None:
    # A heavy-tailed teacher and a student that is it plus noise: the default must beat the plain student tail.
    generator = torch.Generator().manual_seed(0)
    rows, vocab, top_k = 40, 3000, 32
    z_teacher = 2.2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    z = (z_teacher + 1.5 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).requires_grad_()
    p = z_teacher.softmax(1)
    labels = torch.zeros(rows, dtype=torch.long)
    expected = torch.autograd.grad(dense_loss("taid", p, z, labels, t=0.5).sum(), z)[0].flatten()
    cosines = []
    for tail in (StudentTail(kappa=False, cap=0), StudentTail()):
        teacher = stored(p, labels, top_k)
        student = reduce(z, teacher, tail)
        outcomes = tail.outcomes(student, teacher)
        target = interpolate(outcomes.log_p, outcomes.log_q, 0.5)
        gradient = student.logit_gradient((target.exp() * (target - outcomes.log_q)).sum()).flatten()
        cosines.append(torch.nn.functional.cosine_similarity(gradient, expected, dim=0).item())
    assert 1 - cosines[1] < 0.7 * (1 - cosines[0])
