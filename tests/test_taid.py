"""TAID's loss, its schedules against a hand-computed table, and whole runs against an independent dense one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distiller.head import distillation_loss
from distiller.objectives import make_objective
from distiller.taid import Taid, interpolate
from storage_schemas.errors import RequestError
from tests.dense_reference import taid, taid_cross_entropy, written_out
from tests.test_head import VOCAB, check, problem, stored


def sums(loss: float, rows: float = 4.0) -> dict[str, float]:
    return {"taid_cross_entropy": loss * rows, "rows": rows}


def test_adaptive_schedule_follows_the_table() -> None:
    # alpha = 0.5, beta = 0.5, t from 0.2 to 1 over 10 steps; computed by hand:
    #   step 0: J = 4 is stored.
    #   step 1: δ = (4-2)/4 = .5,   M = .25,   Δ = .5·σ(.25)·.8,  σ(.25) = .5621765, Δ = .2248706; the floor is .28
    #   step 2: δ = (2-3)/2 = -.5,  M = -.125, σ = .4687906, Δ = .5·.4687906·.5751294 = .1348076
    #   step 3: δ = (3-3)/3 = 0,    M = -.0625, σ = .4843801, Δ = .5·.4843801·.4403223 = .1066418
    #   step 9: the floor .2 + .8·.9 = .92 lifts t
    term = Taid(t_start=0.2, alpha=0.5, beta=0.5)
    table = [(0, 4.0, 0.2), (1, 2.0, 0.4248706), (2, 3.0, 0.5596782), (3, 3.0, 0.6663196)]
    for step, loss, expected in table:
        term.update(sums(loss), step, 10)
        assert term.t == pytest.approx(expected, abs=1e-6)
    assert term.momentum == pytest.approx(-0.0625)
    term.update(sums(3.0), 9, 10)
    assert term.t == pytest.approx(0.92)


def test_ends_at_t_end() -> None:
    term = Taid(t_start=0.2, t_end=0.7, alpha=5.0)
    for step in range(5):
        term.update(sums(1.0), step, 1000)
    assert term.t == 0.7


def test_linear_schedule_is_the_floor() -> None:
    term = Taid(t_start=0.2, t_end=0.8, schedule="linear")
    seen = []
    for step in range(5):
        term.update({"rows": 1.0}, step, 5)
        seen.append(term.t)
    assert seen == pytest.approx([0.2, 0.32, 0.44, 0.56, 0.68])


def test_update_counts_rows_not_batches() -> None:
    one, other = Taid(alpha=0.5), Taid(alpha=0.5)
    for step, loss in enumerate((4.0, 3.0, 2.0)):
        one.update(sums(loss, rows=1.0), step, 10)
        other.update(sums(loss, rows=1000.0), step, 10)
    assert one.t == other.t


def test_state_survives_json() -> None:
    one = Taid(alpha=0.5)
    for step, loss in enumerate((4.0, 3.0)):
        one.update(sums(loss), step, 10)
    other = Taid(alpha=0.5)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    one.update(sums(2.5), 2, 10)
    other.update(sums(2.5), 2, 10)
    assert one.state_dict() == other.state_dict()
    fresh = Taid()
    fresh.load_state_dict(Taid().state_dict())
    assert fresh.previous_loss is None


@pytest.mark.parametrize(
    "wrong", [{"t_start": 0.9, "t_end": 0.5}, {"schedule": "cosine"}, {"loss": "mse"}, {"beta": 1.0}, {"alpha": -1.0}]
)
def test_refuses_what_has_no_meaning(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="taid"):
        Taid(**wrong)


def test_interpolation_is_of_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64)
    mixed = interpolate(teacher.log_softmax(1), student.log_softmax(1), 0.3)
    torch.testing.assert_close(mixed, (0.7 * student + 0.3 * teacher).log_softmax(1))


@pytest.mark.parametrize("tail", ["student", "uniform"])
@pytest.mark.parametrize("cap", [0, 5])
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("top_k", [8, VOCAB])
def test_both_values_and_their_one_gradient(top_k: int, t: float, cap: int, tail: str) -> None:
    hidden, weight, p, labels = problem(seed=1)
    teacher = stored(p, labels, top_k)
    options = {"t_start": t, "tail": tail, "tail_kappa": False, "tail_cap": cap}
    for loss, dense in (("kl", taid), ("cross_entropy", taid_cross_entropy)):
        output = distillation_loss(hidden, weight, teacher, make_objective("taid", {**options, "loss": loss}))
        z = hidden @ weight.T
        assumed = p if top_k == VOCAB else written_out(p, teacher.top_ids, z.softmax(1), tail, cap)
        value = dense(assumed, z.softmax(1), labels, t).sum()
        if t == 0:  # the target is the student: nothing to learn
            torch.testing.assert_close(output.loss_sum, value, rtol=1e-9, atol=1e-12)
            gradient = torch.autograd.grad(output.loss_sum, hidden)[0]
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
        else:
            check(output.loss_sum, value, (hidden, weight), 1e-9)
        watched = taid_cross_entropy(assumed, z.softmax(1), labels, t).sum()
        torch.testing.assert_close(output.sums["taid_cross_entropy"], watched.detach(), rtol=1e-9, atol=1e-12)


class DenseTaid:
    """The published schedule on full teacher logits, written from its description."""

    def __init__(self, t_start: float, alpha: float, beta: float) -> None:
        self.t, self.start, self.alpha, self.beta = t_start, t_start, alpha, beta
        self.previous, self.momentum = math.inf, 0.0

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        target = ((1 - self.t) * student.detach() + self.t * teacher).softmax(1)
        return -(target * student.log_softmax(1)).sum(1).mean()

    def step(self, loss: float, done: int, total: int) -> None:
        if math.isinf(self.previous):
            self.previous = loss
            return
        self.momentum = self.beta * self.momentum + (1 - self.beta) * (self.previous - loss) / (self.previous + 1e-15)
        target = self.start + (1 - self.start) * done / total
        moved = self.t + self.alpha / (1 + math.exp(-self.momentum)) * (1 - self.t)
        self.t, self.previous = min(1.0, max(target, moved)), loss


def test_fifty_steps_follow_an_independent_dense_run() -> None:
    generator = torch.Generator().manual_seed(7)
    teacher_logits = 3 * torch.randn(12, VOCAB, generator=generator, dtype=torch.float64) + 11.0
    labels = torch.zeros(12, dtype=torch.long)
    teacher = stored(teacher_logits.softmax(1), labels, VOCAB)
    inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    start = torch.randn(VOCAB, 6, generator=generator, dtype=torch.float64)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    objective = make_objective("taid", {"loss": "cross_entropy", "alpha": 0.05})
    dense = DenseTaid(0.4, 0.05, 0.99)
    total = 500  # so that the adaptive part leads and the floor follows
    for step in range(50):
        output = distillation_loss(inputs, ours, teacher, objective, chunk_rows=5)
        value = dense.loss(inputs @ theirs.T, teacher_logits)
        assert output.loss_sum.item() / 12 == pytest.approx(value.item(), rel=1e-6)
        d_ours = torch.autograd.grad(output.loss_sum / 12, ours)[0]
        d_theirs = torch.autograd.grad(value, theirs)[0]
        torch.testing.assert_close(d_ours, d_theirs, rtol=1e-6, atol=1e-9)
        with torch.no_grad():
            ours -= d_ours
            theirs -= d_theirs
        objective.update({name: float(total_) for name, total_ in output.sums.items()}, step, total)
        dense.step(value.item(), step, total)
        assert objective.metrics()["t"] == pytest.approx(dense.t, abs=1e-6)
    assert dense.t > 0.4 + 0.6 * 49 / 500 + 0.1  # it did adapt
