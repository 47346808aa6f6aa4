"""Hidden states × lm_head → a distillation loss with its gradients, without the logits of the batch.

The only place that sees V columns, and it sees them a chunk of rows at a time. Per chunk: logits, their reduction to
the stored ids and the rest, the objective and its gradient on those small arrays, the gradient of the logits, and at
once its share of d hidden and d weight: one pass, 6·N·V·d FLOP. Backward only scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distiller.objectives import Objective
from distiller.rows import StudentReduction, TeacherRows
from storage_schemas.errors import RequestError

__all__ = ["HeadOutput", "StudentRows", "TeacherRows", "distillation_loss", "student_rows"]

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""What the two float32 [rows, V] buffers of a chunk may take together, or half of what d weight takes if that is more:
every chunk reads and writes d weight once. A GPU wants larger matrices."""

BLOCK_IDS = 16384
"""How many rows of d weight are made at once where they cannot be added up in place."""


@dataclass(frozen=True)
class HeadOutput:
    """loss_sum: scalar, the loss summed over the rows, differentiable to hidden, weight and bias.
    sums: detached float64 scalars summed over the rows: "rows", "loss", and the objective's own statistics."""

    loss_sum: Tensor
    sums: dict[str, Tensor]


@dataclass(frozen=True)
class StudentRows:
    """The student at N rows, without gradient. log_q: [N, k] nats on the stored ids; log_rest: [N] nats off them;
    label_log_q: [N] nats; entropy: [N] nats; top1_ids: [N] int64, the student's most probable token."""

    log_q: Tensor
    log_rest: Tensor
    label_log_q: Tensor
    entropy: Tensor
    top1_ids: Tensor


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherRows,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> HeadOutput:
    """The objective between the teacher's rows and softmax(softcap(logit_scale · (hidden · weightᵀ + bias))).

    hidden: [N, d]; weight: [V, d]; bias: [V]. logit_softcap: c of c·tanh(z/c) (Gemma). logit_scale: Cohere's factor,
    or 1/logits_scaling of Granite. vocab_size: how many columns the teacher's tokenizer has; the weight's rows beyond
    it are padding and take no part. chunk_rows: rows at a time, chosen from a memory budget when None; it never
    changes a result beyond rounding. The matrix products run in autocast's dtype, else the weight's; everything else
    in float32 (float64 for float64 weights).

    Raises RequestError when a teacher id is outside the vocabulary, when there are no rows, and when the student's
    logits are not finite.
    """
    head = _Head(weight, bias, teacher, logit_softcap, logit_scale, vocab_size, chunk_rows)
    head.check(hidden)
    run = _Run(head, objective)
    loss: Tensor = _DistillationLoss.apply(hidden, weight, bias, run)  # type: ignore[no-untyped-call]
    bad = int(run.sums.pop("not_finite"))
    if bad:
        raise RequestError(
            f"the student's logits or loss are not finite in {bad} of {len(teacher)} rows: training has diverged, or "
            "the student was loaded damaged; lower the learning rate, train in bfloat16 instead of float16, or look "
            "at the checkpoint"
        )
    return HeadOutput(loss, run.sums)


@torch.no_grad()
def student_rows(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherRows,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> StudentRows:
    """What evaluation needs of the student at the teacher's rows; arguments as in `distillation_loss`."""
    head = _Head(weight, bias, teacher, logit_softcap, logit_scale, vocab_size, chunk_rows)
    head.check(hidden)
    parts: list[tuple[Tensor, ...]] = []
    for rows, logits, work in head.chunks(hidden):
        top1_ids = logits.argmax(1)
        student = StudentReduction(logits, teacher.top_ids[rows], teacher.label_ids[rows], work=work)
        parts.append((student.log_q, student.log_rest, student.label_log_q(), student.entropy(), top1_ids))
    return StudentRows(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Head:
    """lm_head and the rows that it is asked about."""

    weight: Tensor
    bias: Tensor | None
    teacher: TeacherRows
    logit_softcap: float | None
    logit_scale: float
    vocab_size: int | None
    chunk_rows: int | None

    def check(self, hidden: Tensor) -> None:
        teacher, count = self.teacher, len(self.teacher)
        assert hidden.ndim == 2, f"hidden is {list(hidden.shape)}, expected [N, d]"
        assert self.weight.ndim == 2, f"weight is {list(self.weight.shape)}, expected [V, d]"
        assert self.weight.shape[1] == hidden.shape[1], f"hidden {list(hidden.shape)}, weight {list(self.weight.shape)}"
        assert self.bias is None or self.bias.shape == self.weight.shape[:1], "bias is not [V]"
        assert teacher.top_ids.ndim == 2, f"top_ids is {list(teacher.top_ids.shape)}, expected [N, k]"
        shapes = {
            "hidden": (hidden.shape[0], count),
            "top_logprobs": (teacher.top_logprobs.shape, teacher.top_ids.shape),
            "log_tail_mass": (teacher.log_tail_mass.shape, (count,)),
            "label_ids": (teacher.label_ids.shape, (count,)),
            "label_logprob": (teacher.label_logprob.shape, (count,)),
            **{name: (values.shape, (count,)) for name, values in teacher.extras.items()},
        }
        for name, (got, expected) in shapes.items():
            assert got == expected, f"{name} has the shape {got}, expected {expected} of top_ids' rows"
        if count == 0:
            raise RequestError(
                "expected rows that carry loss, got none: this batch has no target tokens; check the completion mask, "
                "or skip batches without targets"
            )
        if self.vocab_size is not None and not 0 < self.vocab_size <= self.weight.shape[0]:
            raise RequestError(
                f"the teacher's vocabulary has {self.vocab_size} ids, but the student's lm_head only "
                f"{self.weight.shape[0]}: choose a student with the teacher's tokenizer, or resize its embeddings"
            )
        ids = torch.cat([teacher.top_ids.reshape(-1), teacher.label_ids])
        low, high = (int(bound) for bound in torch.stack(torch.aminmax(ids)).tolist())  # one look at the device
        if low < 0 or high >= self.columns:
            raise RequestError(
                f"the teacher's ids reach from {low} to {high}, but the student's vocabulary has {self.columns}: "
                "the cache was made with another tokenizer; choose a student that shares it"
            )

    @property
    def columns(self) -> int:
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def matmul_dtype(self) -> torch.dtype:
        device = self.weight.device.type
        if torch.is_autocast_enabled(device) and self.weight.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return self.weight.dtype

    @property
    def row_dtype(self) -> torch.dtype:
        return torch.float64 if self.matmul_dtype == torch.float64 else torch.float32

    def chunks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, logits [R, V], scratch [R, V]) in turn; both buffers are used again for the next chunk."""
        count, dtype = hidden.shape[0], self.matmul_dtype
        weight = self.weight.detach()[: self.columns].to(dtype)
        budget = max(
            CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]), weight.numel() * self.row_dtype.itemsize // 2
        )
        size = min(count, self.chunk_rows or max(1, budget // (2 * self.row_dtype.itemsize * self.columns)))
        buffers = torch.empty(2, size, self.columns, dtype=self.row_dtype, device=hidden.device)
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            logits, work = buffers[:, : rows.stop - start]
            part = hidden.detach()[rows].to(dtype)
            if dtype == self.row_dtype:
                torch.mm(part, weight.T, out=logits)
            else:
                logits.copy_(torch.mm(part, weight.T))
            if self.bias is not None:
                logits += self.bias.detach()[: self.columns]
            if self.logit_scale != 1.0:
                logits *= self.logit_scale
            if self.logit_softcap is not None:
                logits.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)
            yield rows, logits, work


@dataclass
class _Run:
    """One evaluation of an objective: what goes in besides tensors with gradients, and the sums that come out."""

    head: _Head
    objective: Objective

    def __post_init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def plan(self, hidden: Tensor) -> dict[str, Tensor]:
        """Statistics over all rows that the objective needs before any gradient: a pass of its own."""
        if not self.objective.needs_survey:
            return {}
        teacher, parts = self.head.teacher, []
        for rows, logits, work in self.head.chunks(hidden):
            parts.append(self.objective.survey(self._student(rows, logits, work, False), teacher[rows]))
        return self.objective.plan({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def chunks(self, hidden: Tensor, differentiable: bool) -> Iterator[tuple[slice, StudentReduction, Tensor]]:
        """(rows, the student there, the objective's loss summed over them), adding up the statistics on the way."""
        plan = self.plan(hidden)
        for rows, logits, work in self.head.chunks(hidden):
            student = self._student(rows, logits, work, differentiable)
            part = {name: values[rows] for name, values in plan.items()}
            with torch.set_grad_enabled(differentiable):
                loss, statistics = self.objective.rows(student, self.head.teacher[rows], part)
                total = loss.sum()
            self._add("loss", loss)
            self._add("rows", torch.ones_like(loss))
            self._add("not_finite", ~loss.isfinite())
            for name, values in statistics.items():
                self._add(name, values)
            yield rows, student, total

    def _student(self, rows: slice, logits: Tensor, work: Tensor, differentiable: bool) -> StudentReduction:
        teacher, candidates = self.head.teacher, self.objective.candidates
        return StudentReduction(
            logits,
            teacher.top_ids[rows],
            teacher.label_ids[rows],
            candidates=min(candidates, self.head.columns - teacher.top_ids.shape[1]),
            differentiable=differentiable,
            work=work,
        )

    def _add(self, name: str, values: Tensor) -> None:
        total = values.detach().sum(dtype=torch.float64)
        self.sums[name] = self.sums[name] + total if name in self.sums else total


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, run: _Run) -> Tensor:
        head, (needs_hidden, needs_weight, needs_bias, _) = run.head, ctx.needs_input_grad
        dtype, columns = head.matmul_dtype, head.columns
        # float16 has no room for a logit gradient of 1e-9: its products run in float32.
        dtype = torch.float32 if dtype == torch.float16 else dtype
        differentiable = needs_hidden or needs_weight or needs_bias
        device = hidden.device
        with torch.autocast(device.type, enabled=False):
            used = weight[:columns].to(dtype)
            d_hidden = torch.empty_like(hidden, dtype=head.row_dtype) if needs_hidden else None
            d_weight = torch.zeros_like(weight, dtype=head.row_dtype) if needs_weight else None
            d_bias = torch.zeros_like(bias, dtype=head.row_dtype) if needs_bias and bias is not None else None
            for rows, student, loss in run.chunks(hidden, differentiable):
                if not differentiable:
                    continue
                gradient = student.logit_gradient(loss, softcap=head.logit_softcap)
                if head.logit_scale != 1.0:
                    gradient *= head.logit_scale
                low = gradient.to(dtype)
                if d_hidden is not None:
                    d_hidden[rows] = torch.mm(low, used)
                if d_weight is not None:
                    part = hidden[rows].to(dtype)
                    if dtype == head.row_dtype:
                        d_weight[:columns].addmm_(low.T, part)
                    else:  # a product in low precision is added up in float32, a block of ids at a time
                        for start in range(0, columns, BLOCK_IDS):
                            ids = slice(start, min(start + BLOCK_IDS, columns))
                            d_weight[ids] += torch.mm(low[:, ids].T, part)
                if d_bias is not None:
                    d_bias[:columns] += gradient.sum(0)
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return run.sums["loss"].to(head.row_dtype, copy=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the head's gradients were handed out already: run forward again for a second backward")
        gradients, ctx.gradients = ctx.gradients, None
        return (
            *(
                None if gradient is None else gradient.mul_(scale.to(gradient.dtype)).to(dtype)
                for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            ),
            None,
        )
