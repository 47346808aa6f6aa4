"""The registry: names, options, mixtures, state, and what it says to wrong requests."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from distiller.head import distillation_loss
from distiller.objectives import OBJECTIVES, make_objective
from storage_schemas.errors import RequestError
from tests.test_head import check, problem, stored

pytestmark = pytest.mark.filterwarnings("ignore:at temperature")
PARTS = {"parts": [{"name": "jsd", "weight": 0.3, "beta": 0.2}, {"name": "taid", "weight": 2}]}


def loss_of(name: str, options: dict[str, Any] | None = None) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    hidden, weight, p, labels = problem()
    output = distillation_loss(hidden, weight, stored(p, labels), make_objective(name, options), chunk_rows=4)
    return output.loss_sum, torch.autograd.grad(output.loss_sum, (hidden, weight))


def same(found: tuple[Any, Any], parts: list[tuple[float, tuple[Any, Any]]]) -> None:
    """A loss and its gradients are the weighted sum of others."""
    torch.testing.assert_close(found[0], sum(weight * loss for weight, (loss, _) in parts))
    for index, gradient in enumerate(found[1]):
        torch.testing.assert_close(gradient, sum(weight * gradients[index] for weight, (_, gradients) in parts))


def test_a_mixture_is_the_weighted_sum() -> None:
    same(loss_of("mix", PARTS), [(0.3, loss_of("jsd", {"beta": 0.2})), (2.0, loss_of("taid"))])


@pytest.mark.parametrize("name", ["taid", "dkd", "adakd"])
def test_hard_labels_mix_at_a_weight(name: str) -> None:
    options = {"idts": False} if name == "adakd" else {}
    found = loss_of(name, {"cross_entropy_weight": 0.25, **options})
    same(found, [(0.75, loss_of(name, options)), (0.25, loss_of("cross_entropy"))])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_steps_and_resumes(name: str) -> None:
    options = PARTS if name == "mix" else {}
    hidden, weight, p, labels = problem()
    one, other = make_objective(name, options), make_objective(name, options)
    for step in range(3):
        output = distillation_loss(hidden, weight, stored(p, labels), one)
        one.update({key: float(value) for key, value in output.sums.items()}, step, 4)
        assert all(not value.requires_grad and value.shape == () for value in output.sums.values())
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.metrics() == one.metrics()
    check(
        distillation_loss(hidden, weight, stored(p, labels), one).loss_sum,
        distillation_loss(hidden, weight, stored(p, labels), other).loss_sum,
        (hidden, weight),
        0.0,
    )


def test_evaluation_moves_nothing() -> None:
    hidden, weight, p, labels = problem()
    for name in ("taid", "ctkd", "adakd"):
        objective = make_objective(name)
        before = objective.state_dict()
        with torch.no_grad():
            output = distillation_loss(hidden, weight, stored(p, labels), objective)
        assert not output.loss_sum.requires_grad
        assert objective.state_dict() == before


def test_learned_temperature_climbs_the_loss() -> None:
    hidden, weight, p, labels = problem()
    teacher = stored(p, labels, p.shape[1])
    objective = make_objective("ctkd", {"ramp": 0.0, "learning_rate": 1e-3, "spread": 2.0})

    def loss() -> float:
        return distillation_loss(hidden, weight, teacher, objective).loss_sum.item()

    output = distillation_loss(hidden, weight, teacher, objective, chunk_rows=4)
    term = objective.terms[0][1]
    start, before = term.theta, output.loss_sum.item()
    # The slope is the derivative of the summed loss.
    term.theta = start + 1e-5
    above = loss()
    term.theta = start - 1e-5
    assert output.sums["ctkd_slope"].item() == pytest.approx((above - loss()) / 2e-5, rel=1e-5)
    term.theta = start
    objective.update({key: float(value) for key, value in output.sums.items()}, 0, 10)
    assert term.theta != start
    assert loss() > before


def test_learned_temperature_ramps_up() -> None:
    objective = make_objective("ctkd", {"ramp": 0.5, "learning_rate": 1.0})
    term = objective.terms[0][1]
    moved = []
    for step in (0, 25, 50, 99):
        before = term.theta
        objective.update({"ctkd_slope": 1.0, "rows": 1.0}, step, 100)
        moved.append(term.theta - before)
    assert moved == pytest.approx([0.0, 0.5, 1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("taidd", {}, 'unknown objective "taidd": choose one of abkd, adakd, .*taid'),
        ("taid", {"tstart": 0.1}, r"no option \['tstart'\]; it knows \['t_start', .*'temperature'"),
        ("taid", {"t_start": "low"}, "expects t_start as float, got 'low'"),
        ("taid", {"t_start": True}, "expects t_start as float, got True"),
        ("jsd", {"beta": 2}, "0 <= beta <= 1, got 2"),
        ("skew_kl", {"skew": 0}, "0 < skew < 1"),
        ("abkd", {"alpha": 0.0}, "alpha, beta > 0"),
        ("adakd", {"base": "nothing"}, 'unknown objective "nothing"'),
        ("adakd", {"base": "adakd"}, 'unknown objective "adakd"'),
        ("adakd", {"warmups": 0.1}, "no option .*'momentum'"),
        ("mix", {}, "expects parts"),
        ("mix", {"parts": [{"name": "jsd", "weight": -1}]}, "weight >= 0"),
        ("mix", {"parts": [{"name": "jsd"}], "beta": 0.5}, "no option"),
        ("mix", {"parts": [{"weight": 1}]}, "unknown objective"),
        ("forward_kl", {"temperature": 0}, "temperature > 0"),
        ("forward_kl", {"tail": "fat"}, 'unknown tail "fat": choose one of dropped, renormalised, student, uniform'),
        ("forward_kl", {"tail_cap": -1}, "tail_cap >= 0"),
        ("forward_kl", {"cross_entropy_weight": 1.5}, "0 <= cross_entropy_weight <= 1"),
    ],
)
def test_says_what_it_expected(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        make_objective(name, options)


def test_refuses_the_state_of_another_objective() -> None:
    with pytest.raises(RequestError, match='trained with the objective "taid", got "jsd"'):
        make_objective("jsd").load_state_dict(make_objective("taid").state_dict())


def test_whole_numbers_serve_as_fractions() -> None:
    assert make_objective("taid", {"t_start": 0, "temperature": 2}).metrics() == {"t": 0.0}
