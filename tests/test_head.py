"""The head against full logits in float64: values, gradients, and what a person can get wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distiller.head import distillation_loss, student_rows
from distiller.objectives import TERMS, make_objective
from distiller.rows import TeacherRows, largest_ids
from storage_schemas.errors import RequestError
from tests.dense_reference import dense_loss, written_out

ROWS, WIDTH, VOCAB, TOP_K = 6, 5, 37, 8
NAMES = sorted(TERMS)
pytestmark = pytest.mark.filterwarnings("ignore:at temperature")  # test_tail.py looks at that one


def problem(
    seed: int = 0, vocab: int = VOCAB, rows: int = ROWS, width: int = WIDTH, spread: float = 2.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, the teacher's full distribution, labels; float64. The teacher is peaked."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    p = (spread * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).softmax(1)
    labels = p.multinomial(1, generator=generator)[:, 0]
    labels[0] = p[0].argmin()  # one label off the stored ids
    return hidden.requires_grad_(), weight.requires_grad_(), p, labels


def stored(p: Tensor, labels: Tensor, top_k: int = TOP_K, extras: bool = False) -> TeacherRows:
    values, ids = p.topk(top_k, dim=1)
    rest = p.scatter(1, ids, 0.0)
    return TeacherRows(
        ids,
        values.log(),
        rest.sum(1).log(),
        labels,
        p.gather(1, labels[:, None])[:, 0].log(),
        {"log_rest_sqrt_sum": rest.sqrt().sum(1).log()} if extras else {},
    )


def options(**more: Any) -> dict[str, Any]:
    return {"tail_kappa": False, "tail_cap": 0, **more}


def check(head: Tensor, dense: Tensor, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    """Value and gradients agree, relative to the gradient's size."""
    torch.testing.assert_close(head, dense, rtol=tolerance, atol=tolerance)
    found, expected = torch.autograd.grad(head, inputs), torch.autograd.grad(dense, inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
        assert other.abs().max() > 0


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("tail", ["student", "uniform", "renormalised"])
@pytest.mark.parametrize("name", NAMES)
def test_whole_vocabulary_is_exact(name: str, tail: str, temperature: float) -> None:
    hidden, weight, p, labels = problem()
    teacher = stored(p, labels, VOCAB)
    objective = make_objective(name, {"tail": tail, "temperature": temperature})  # with the default's kappa and cap
    head = distillation_loss(hidden, weight, teacher, objective, chunk_rows=4)
    dense = dense_loss(name, p, hidden @ weight.T, labels, temperature).sum()
    check(head.loss_sum, dense, (hidden, weight), 1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("settings", [("student", 0), ("student", 5), ("uniform", 0)])
@pytest.mark.parametrize("name", NAMES)
def test_top_k_equals_the_tail_written_out(name: str, settings: tuple[str, int], temperature: float) -> None:
    tail, cap = settings
    hidden, weight, p, labels = problem(seed=3)
    # AKL's head must end among the stored ids: where it reaches into the rest it is approximate.
    own: dict[str, Any] = {"head_mass": 0.1} if name == "adaptive_kl" else {}
    objective = make_objective(name, options(tail=tail, tail_cap=cap, temperature=temperature, **own))
    head = distillation_loss(hidden, weight, stored(p, labels), objective, chunk_rows=4)
    z = hidden @ weight.T
    top_ids = p.topk(TOP_K, dim=1).indices
    assumed = written_out(p, top_ids, z.softmax(1), tail, cap, labels if name == "dkd" else None)
    check(head.loss_sum, dense_loss(name, assumed, z, labels, temperature, **own).sum(), (hidden, weight), 1e-9)


def test_shaped_logits_with_bias_and_padding() -> None:
    hidden, weight, p, labels = problem()
    padded = torch.cat([weight.detach(), torch.full((3, WIDTH), 50.0, dtype=torch.float64)]).requires_grad_()
    bias = torch.randn(VOCAB + 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    teacher = stored(p, labels)
    for name in ("taid", "cross_entropy", "abkd"):
        objective = make_objective(name, {"tail_kappa": False})
        shape: dict[str, Any] = {"bias": bias, "logit_softcap": 3.0, "logit_scale": 0.7, "vocab_size": VOCAB}
        head = distillation_loss(hidden, padded, teacher, objective, chunk_rows=4, **shape)
        z = (3.0 * torch.tanh((hidden @ padded.T + bias) * 0.7 / 3.0))[:, :VOCAB]
        assumed = written_out(p, teacher.top_ids, z.softmax(1), cap=8)
        check(head.loss_sum, dense_loss(name, assumed, z, labels).sum(), (hidden, padded, bias), 1e-9)


def test_gradient_agrees_with_finite_differences() -> None:
    # Cross-entropy and the forward KL: their target does not move with the student, so differences see it all.
    hidden, weight, p, labels = problem()
    teacher = stored(p, labels, VOCAB)
    for name in ("cross_entropy", "forward_kl", "reverse_kl", "jsd", "abkd"):
        objective = make_objective(name)
        loss = distillation_loss(hidden, weight, teacher, objective).loss_sum
        for source, gradient in zip((hidden, weight), torch.autograd.grad(loss, (hidden, weight)), strict=True):
            for index in ((0, 0), (3, 2), (5, 4)):
                moved = []
                for step in (1e-6, -1e-6):
                    with torch.no_grad():
                        source[index] += step
                        moved.append(distillation_loss(hidden, weight, teacher, objective).loss_sum)
                        source[index] -= step
                slope = (moved[0] - moved[1]) / 2e-6
                assert abs(slope - gradient[index]) < 1e-6 * max(1.0, float(gradient.abs().max()))


@pytest.mark.parametrize("name", [*NAMES, "adakd"])
def test_chunks_change_nothing_beyond_rounding(name: str) -> None:
    hidden, weight, p, labels = problem(rows=11)
    results = []
    for chunk_rows in (1, 4, 11, None):
        objective = make_objective(name)
        output = distillation_loss(hidden, weight, stored(p, labels), objective, chunk_rows=chunk_rows)
        sums = {key: float(value) for key, value in output.sums.items()}
        results.append((*torch.autograd.grad(output.loss_sum, (hidden, weight)), sums))
    for d_hidden, d_weight, sums in results[1:]:
        torch.testing.assert_close(d_hidden, results[0][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(d_weight, results[0][1], rtol=1e-10, atol=1e-12)
        assert sums == pytest.approx(results[0][2], rel=1e-10)
        assert sums["rows"] == 11


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", [*NAMES, "adakd"])
def test_float32_stays_close_to_float64(name: str) -> None:
    hidden, weight, p, labels = problem(vocab=500, width=16, rows=20)
    teacher = stored(p, labels, 32)
    exact = distillation_loss(hidden, weight, teacher, make_objective(name)).loss_sum
    expected = torch.autograd.grad(exact, (hidden, weight))
    single = tuple(tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
    loss = distillation_loss(*single, teacher, make_objective(name)).loss_sum
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, single)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    # 24 bits of mantissa, sums over 500 ids: a few 1e-6; the bound leaves room for other processors.
    assert max(relative_error(*pair) for pair in zip(found, expected, strict=True)) < 2e-5


@pytest.mark.parametrize("mode", ["bf16 weights", "bf16 autocast", "fp16 autocast"])
def test_low_precision_stays_close_to_float64(mode: str) -> None:
    hidden, weight, p, labels = problem(vocab=500, width=16, rows=20)
    dtype = torch.float16 if mode == "fp16 autocast" else torch.bfloat16
    low = tuple((tensor / 2).detach().to(dtype).double().requires_grad_() for tensor in (hidden, weight))
    teacher = stored(p, labels, 32)
    exact = distillation_loss(*low, teacher, make_objective("taid")).loss_sum
    expected = torch.autograd.grad(exact, low)
    kind = torch.bfloat16 if mode == "bf16 weights" else torch.float32
    single = tuple(tensor.detach().to(kind).requires_grad_() for tensor in low)
    with torch.autocast("cpu", dtype=dtype, enabled="autocast" in mode):
        loss = distillation_loss(*single, teacher, make_objective("taid")).loss_sum
    found = torch.autograd.grad(loss, single)
    assert loss.dtype == torch.float32
    assert all(one.dtype == kind for one in found)
    # Rounding a logit of about 4 to bfloat16 moves it by up to 2^-7, so probabilities by about a hundredth.
    bound = 2e-2 if dtype == torch.bfloat16 else 3e-3
    assert loss.item() == pytest.approx(exact.item(), rel=bound)
    assert max(relative_error(*pair) for pair in zip(found, expected, strict=True)) < bound


def test_small_gradients_survive_float16() -> None:
    # A teacher equal to the student but for one id of 1e-7: gradients far below float16's smallest normal number.
    hidden, weight, _, labels = problem(vocab=500)
    single = tuple((tensor / 4).detach().float().requires_grad_() for tensor in (hidden, weight))
    p = (single[0] @ single[1].T).detach().double().softmax(1)
    p = p.scatter(1, labels[:, None], 1e-7)
    teacher = stored(p / p.sum(1, keepdim=True), labels, 16)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = distillation_loss(*single, teacher, make_objective("forward_kl")).loss_sum
    _, d_weight = torch.autograd.grad(loss, single)
    assert (d_weight != 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    hidden, weight, p, labels = problem()
    teacher = stored(p, labels)
    expected = torch.autograd.grad(
        distillation_loss(hidden, weight, teacher, make_objective("taid")).loss_sum, (hidden, weight)
    )
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = distillation_loss(hidden, weight, teacher, make_objective("taid")).loss_sum
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        source, index = (weight, 1) if frozen == "hidden" else (hidden, 0)
        torch.testing.assert_close(torch.autograd.grad(loss, source)[0], expected[index], rtol=1e-12, atol=1e-14)


def test_tied_weights_get_both_gradients() -> None:
    _, weight, p, labels = problem()
    tokens = torch.arange(ROWS)
    teacher = stored(p, labels, VOCAB)
    head = distillation_loss(weight[tokens], weight, teacher, make_objective("forward_kl")).loss_sum
    dense = dense_loss("forward_kl", p, weight[tokens] @ weight.T, labels).sum()
    check(head, dense, (weight,), 1e-10)


def test_backward_scales_and_happens_once() -> None:
    hidden, weight, p, labels = problem()
    teacher = stored(p, labels)
    once = torch.autograd.grad(distillation_loss(hidden, weight, teacher, make_objective("jsd")).loss_sum, weight)[0]
    loss = distillation_loss(hidden, weight, teacher, make_objective("jsd")).loss_sum
    (loss * 3).backward(retain_graph=True)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 3 * once)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_student_rows_are_the_students() -> None:
    hidden, weight, p, labels = problem()
    teacher = stored(p, labels)
    rows = student_rows(hidden, weight, teacher, chunk_rows=4)
    log_q = (hidden @ weight.T).log_softmax(1)
    torch.testing.assert_close(rows.log_q, log_q.gather(1, teacher.top_ids))
    torch.testing.assert_close(rows.log_rest, log_q.exp().scatter(1, teacher.top_ids, 0.0).sum(1).log())
    torch.testing.assert_close(rows.label_log_q, log_q.gather(1, labels[:, None])[:, 0])
    torch.testing.assert_close(rows.entropy, -(log_q.exp() * log_q).sum(1))
    assert torch.equal(rows.top1_ids, log_q.argmax(1))
    assert not rows.log_q.requires_grad


def test_rest_is_summed_where_it_lies() -> None:
    # 1 - Σ would be lost in float32 at a mass of 1e-9.
    weight = torch.zeros(100, 1)
    weight[:4] = 1.0
    hidden = torch.full((1, 1), 24.0)
    teacher = TeacherRows(
        torch.arange(4)[None],
        torch.full((1, 4), 0.25).log(),
        torch.full((1,), -20.0),
        torch.zeros(1, dtype=torch.long),
        torch.zeros(1),
    )
    rest = student_rows(hidden, weight, teacher).log_rest.double()
    exact = torch.log(torch.tensor(96.0, dtype=torch.float64)) - torch.logsumexp(
        torch.tensor([24.0] * 4 + [0.0] * 96, dtype=torch.float64), 0
    )
    assert float(rest) == pytest.approx(exact.item(), abs=1e-5)


def extreme_rows(kind: str) -> tuple[Tensor, Tensor]:
    """[1, V] teacher probabilities and student logits, float64."""
    p = torch.full((1, VOCAB), 1e-4, dtype=torch.float64)
    p[0, :TOP_K] = torch.linspace(2, 1, TOP_K)
    z = torch.linspace(1, -1, VOCAB, dtype=torch.float64)[None].clone()
    if kind == "student almost nowhere else":  # Q < 1e-7
        z[0, TOP_K:] -= 25
    elif kind == "student only elsewhere":
        z[0, :TOP_K] -= 60
    elif kind == "no tail":
        p[0, TOP_K:] = 0
    elif kind == "almost all tail":
        p[0, :TOP_K] = 2e-4
    elif kind == "one-hot teacher":
        p[0, 1:] = 0
    return p / p.sum(1, keepdim=True), z


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["student almost nowhere else", "student only elsewhere", "no tail", "almost all tail", "one-hot teacher"],
)
@pytest.mark.parametrize("name", [*NAMES, "adakd"])
def test_extreme_rows_are_finite_and_right(name: str, kind: str, default: bool) -> None:
    p, z = extreme_rows(kind)
    labels = torch.tensor([2])
    hidden, weight = torch.ones(1, 1), z.T.float().requires_grad_()
    objective = make_objective(name, {} if default else options())
    output = distillation_loss(hidden, weight, stored(p, labels), objective)
    (gradient,) = torch.autograd.grad(output.loss_sum, weight)
    assert gradient.isfinite().all()
    if default or name in ("adakd", "ctkd"):  # their tail or their plan differs from the plain written-out one
        return
    # The floor of -100 nats stands for the teacher's zeros: of each stored id, and of all others together.
    top_ids = p.topk(TOP_K, dim=1).indices
    floor = torch.full_like(p, math.exp(-100) / (VOCAB - TOP_K)).scatter(1, top_ids, math.exp(-100))
    assumed = written_out(p.maximum(floor), top_ids, z.softmax(1), label=labels if name == "dkd" else None)
    z = z.float().double().requires_grad_()
    dense = dense_loss(name, assumed, z, labels).sum()
    (expected,) = torch.autograd.grad(dense, z)
    if name == "adaptive_kl" and kind == "almost all tail":
        return  # its head reaches into the rest, which it then takes in part
    size = float(expected.abs().max())
    assert output.loss_sum.item() == pytest.approx(dense.item(), rel=2e-4, abs=2e-6)
    torch.testing.assert_close(gradient.T.double(), expected, rtol=2e-3, atol=1e-5 * size + 1e-7)


def test_asks_for_rows() -> None:
    hidden, weight, p, labels = problem()
    with pytest.raises(RequestError, match="no target tokens"):
        distillation_loss(hidden[:0], weight, stored(p, labels)[:0], make_objective("taid"))


def test_refuses_ids_outside_the_vocabulary() -> None:
    hidden, weight, p, labels = problem()
    teacher = stored(p, labels)
    with pytest.raises(RequestError, match=f"to {VOCAB + 4}, but the student's vocabulary has {VOCAB}"):
        distillation_loss(
            hidden, weight, replace(teacher, label_ids=labels + 5 + VOCAB - 1 - labels), make_objective("taid")
        )
    with pytest.raises(RequestError, match="reach from -1"):
        distillation_loss(hidden, weight, replace(teacher, label_ids=labels * 0 - 1), make_objective("taid"))
    with pytest.raises(RequestError, match="student's vocabulary has 9"):
        distillation_loss(hidden, weight, teacher, make_objective("taid"), vocab_size=9)
    with pytest.raises(RequestError, match="only 37"):
        distillation_loss(hidden, weight, teacher, make_objective("taid"), vocab_size=40)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_a_student_that_is_not_finite(value: float) -> None:
    hidden, weight, p, labels = problem()
    with torch.no_grad():
        hidden[2, 1] = value
    with pytest.raises(RequestError, match="not finite in 1 of 6 rows"):
        distillation_loss(hidden, weight, stored(p, labels), make_objective("taid"), chunk_rows=2)


@pytest.mark.parametrize("field", ["top_logprobs", "log_tail_mass", "label_ids", "label_logprob"])
def test_wrong_shapes_fail(field: str) -> None:
    hidden, weight, p, labels = problem()
    teacher = stored(p, labels)
    with pytest.raises(AssertionError, match=field):
        distillation_loss(
            hidden, weight, replace(teacher, **{field: getattr(teacher, field)[:-1]}), make_objective("taid")
        )


@pytest.mark.parametrize("width", [1000, 1003, 70, 5])
def test_largest_ids_is_topk(width: int) -> None:
    values = torch.randn(7, width, generator=torch.Generator().manual_seed(1))
    assert torch.equal(largest_ids(values, 5), values.topk(5, dim=1).indices)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*NAMES, "adakd"])
def test_cuda_equals_cpu(name: str) -> None:
    hidden, weight, p, labels = problem(vocab=500, width=16, rows=20)
    teacher = stored(p, labels, 32)
    loss = distillation_loss(hidden, weight, teacher, make_objective(name)).loss_sum
    expected = torch.autograd.grad(loss, (hidden, weight))
    device = tuple(tensor.detach().cuda().requires_grad_() for tensor in (hidden, weight))
    there = TeacherRows(*(getattr(teacher, item).cuda() for item in list(TeacherRows.__dataclass_fields__)[:5]))
    found = torch.autograd.grad(distillation_loss(*device, there, make_objective(name)).loss_sum, device)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-9, atol=1e-12)
