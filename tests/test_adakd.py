"""AdaKD: the choice of rows and temperatures against a dense one, its schedule by hand, several ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distiller.adakd import AdaKD, gather_rows, hellinger
from distiller.head import distillation_loss
from distiller.objectives import make_objective
from storage_schemas.errors import RequestError
from tests.dense_reference import adakd_plan, dense_loss, taid_cross_entropy, written_out
from tests.test_head import TOP_K, VOCAB, check, problem, stored

pytestmark = pytest.mark.filterwarnings("ignore:at temperature")


@pytest.mark.parametrize("base", ["forward_kl", "reverse_kl", "jsd", "taid", "abkd"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("top_k", [TOP_K, VOCAB])
@pytest.mark.parametrize("parts", ["latf", "idts", "both"])
def test_equals_the_dense_one(base: str, keep: float, top_k: int, parts: str) -> None:
    hidden, weight, p, labels = problem(seed=4, rows=11)
    options: dict[str, Any] = {"base": base, "latf": parts != "idts", "idts": parts != "latf"}
    objective = make_objective("adakd", {**options, "tail_kappa": False, "tail_cap": 0})
    assert objective.adakd is not None
    objective.adakd.keep = keep
    teacher = stored(p, labels, top_k)
    output = distillation_loss(hidden, weight, teacher, objective, chunk_rows=4)
    z = hidden @ weight.T
    assumed = p if top_k == VOCAB else written_out(p, teacher.top_ids, z.softmax(1))
    dense = dense_loss(
        "adakd",
        assumed,
        z,
        labels,
        base=base,
        keep=keep if parts != "idts" else 1.0,
        strength=0.0 if parts == "latf" else 0.5,
    )
    check(output.loss_sum, dense.sum(), (hidden, weight), 1e-9)
    z = z.detach()
    before = dense_loss(base, assumed, z, labels).sum()
    torch.testing.assert_close(output.sums["loss_before_selection"], before, rtol=1e-9, atol=1e-12)
    if base == "taid":  # t follows all rows, not the hard ones
        watched = taid_cross_entropy(assumed, z.softmax(1), labels).sum()
        torch.testing.assert_close(output.sums["taid_cross_entropy"], watched, rtol=1e-9, atol=1e-12)


def test_keeps_the_hard_and_cools_them() -> None:
    plan = AdaKD(strength=0.5)
    plan.keep = 0.6
    difficulty = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7], dtype=torch.float64)
    found = plan.plan(difficulty, 2.0)
    assert found["weight"].tolist() == pytest.approx([0, 5 / 3, 5 / 3, 0, 5 / 3])
    expected = [2 * math.exp(-0.5 * math.tanh(math.log(value / 0.7))) for value in difficulty.tolist()]
    assert found["temperature"].tolist() == pytest.approx(expected)
    assert found["temperature"][1] < 2 < found["temperature"][2]


def test_equal_rows_and_solved_rows_are_finite() -> None:
    for difficulty in (torch.zeros(4), torch.full((4,), 0.3), torch.tensor([0.0, 0.0, 0.0, 1.0])):
        plan = AdaKD()
        plan.keep = 0.25
        found = plan.plan(difficulty, 1.0)
        assert found["weight"].sum() == pytest.approx(4)
        assert found["temperature"].isfinite().all()
        assert (found["temperature"] >= math.exp(-0.5) - 1e-6).all()
        assert (found["temperature"] <= math.exp(0.5) + 1e-6).all()


def test_hellinger_tells_small_distances_from_none() -> None:
    log_p = torch.tensor([[0.5, 0.5]]).log()
    log_q = torch.tensor([[0.5 + 1e-4, 0.5 - 1e-4]]).log()
    exact = math.sqrt(1 - (math.sqrt(0.5 * 0.5001) + math.sqrt(0.5 * 0.4999)))
    assert hellinger(log_p, log_q).item() == pytest.approx(exact, rel=1e-2)
    far = hellinger(torch.tensor([[0.0, -100.0]]), torch.tensor([[-100.0, 0.0]]))
    assert far.item() == pytest.approx(1.0)


def test_filter_follows_the_table() -> None:
    # momentum 0: the running loss is the last one. Tolerance and rate 10 %, warm-up over the first 2 of 10 steps.
    filter_ = AdaKD(momentum=0.0, tolerance=0.1, rate=0.1, warmup=0.2)
    table = [
        (4.0, 1.0),  # warm-up
        (2.0, 1.0),  # warm-up
        (2.0, 1.0),  # the reference becomes 2
        (1.9, 1.0),  # within 10 %
        (1.7, 0.9),  # below 1.8: fewer; the reference becomes 1.7
        (1.6, 0.9),  # within 10 % of 1.7
        (1.4, 0.81),  # fewer; 1.4
        (1.6, 0.891),  # above 1.54: more; 1.6
        (1.8, 0.9801),  # above 1.76; 1.8
        (2.0, 1.0),  # above 1.98; never above 1
    ]
    for step, (loss, keep) in enumerate(table):
        filter_.update(loss, step, 10)
        assert filter_.keep == pytest.approx(keep), step


def test_running_loss_starts_at_the_first_and_keeps_a_floor() -> None:
    filter_ = AdaKD(momentum=0.5, warmup=0.0, min_keep=0.3, rate=0.5)
    filter_.update(8.0, 0, 100)
    assert filter_.average == 8.0
    filter_.update(4.0, 1, 100)
    assert filter_.average == 6.0
    for step in range(2, 30):
        filter_.update(4.0 * 0.5**step, step, 100)
    assert filter_.keep == 0.3


def test_state_survives_json() -> None:
    objective = make_objective("adakd", {"base": "taid", "momentum": 0.5, "warmup": 0.0})
    for step, loss in enumerate((4.0, 2.0, 1.0)):
        objective.update({"loss_before_selection": loss, "taid_cross_entropy": loss, "rows": 1.0}, step, 10)
    other = make_objective("adakd", {"base": "taid", "momentum": 0.5, "warmup": 0.0})
    other.load_state_dict(json.loads(json.dumps(objective.state_dict())))
    assert other.state_dict() == objective.state_dict()
    assert other.metrics() == objective.metrics()
    assert objective.metrics()["keep"] < 1


@pytest.mark.parametrize(
    "wrong",
    [{"latf": False, "idts": False}, {"min_keep": 0.0}, {"strength": -1.0}, {"momentum": 1.0}, {"warmup": -0.1}],
)
def test_refuses_what_has_no_meaning(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="adakd"):
        AdaKD(**wrong)


def _one_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=3)
    try:
        hidden, weight, p, labels = problem(seed=4, rows=11)
        objective = make_objective("adakd")
        assert objective.adakd is not None
        objective.adakd.keep = 0.5
        rows = (slice(0, 4), slice(4, 4), slice(4, 11))[rank]  # the second rank has none
        assert len(gather_rows(torch.arange(float(len(hidden[rows]))))) == 11
        if rank == 1:
            objective.sit_out()
            return
        output = distillation_loss(hidden[rows], weight, stored(p, labels)[rows], objective)
        gradient = torch.autograd.grad(output.loss_sum, weight)[0]
        torch.save((output.loss_sum.detach(), gradient), f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_several_ranks_choose_as_one(tmp_path: Path) -> None:
    mp.spawn(_one_rank, (str(tmp_path),), nprocs=3)
    hidden, weight, p, labels = problem(seed=4, rows=11)
    objective = make_objective("adakd")
    assert objective.adakd is not None
    objective.adakd.keep = 0.5
    output = distillation_loss(hidden, weight, stored(p, labels), objective)
    expected = torch.autograd.grad(output.loss_sum, weight)[0]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 2)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), output.loss_sum.detach())
    torch.testing.assert_close(sum(gradient for _, gradient in parts), expected)


def test_dense_reference_keeps_the_hardest() -> None:
    p, q = torch.tensor([[0.9, 0.1], [0.5, 0.5]]), torch.tensor([[0.1, 0.9], [0.5, 0.5]])
    assert adakd_plan(p, q, 1.0, keep=0.5)[0].tolist() == [2.0, 0.0]
