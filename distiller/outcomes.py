"""Rows → outcomes: pairs of log-probabilities on which any divergence is a plain sum.

The stored ids are outcomes by themselves; how the rest becomes outcomes is the tail's choice (`distiller.tail`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distiller.rows import StudentReduction, TeacherRows
from storage_schemas.errors import RequestError

FLOOR = -100.0
"""Teacher log-probabilities are floored here (nats), so that a one-hot teacher has finite divergences."""


@dataclass(frozen=True)
class Outcomes:
    """log_p: [R, n] the teacher, without gradient. log_q: [R, n] the student, differentiable. Nats.

    The last `rest_columns` are groups of ids inside which both sides are taken to be proportional; all others are
    single ids. inner_entropy: [R, n] weights of the columns -> [R] the entropy that the grouping hides, without
    gradient. target: [R] the label's column, where it was asked for.
    """

    log_p: Tensor
    log_q: Tensor
    rest_columns: int
    inner_entropy: Callable[[Tensor], Tensor]
    target: Tensor | None = None


@dataclass
class Powers:
    """log Σ p^a and log Σ q^a of each outcome: [R, n], not normalised."""

    log_p: Tensor
    log_q: Tensor
    rest_columns: int = 0
    inner_entropy: Callable[[Tensor], Tensor] = lambda weights: weights.new_zeros(len(weights))


class Tail:
    """One interface for every choice; subclasses say what the outcomes' powers are."""

    name = ""
    candidates = 0
    normalised = True
    """Whether the outcomes at temperature 1 need no normalising."""
    temperatures = True
    """Whether other temperatures than 1 have a meaning."""

    def outcomes(
        self,
        student: StudentReduction,
        teacher: TeacherRows,
        temperature: float | Tensor = 1.0,
        *,
        power: float = 1.0,
        with_label: bool = False,
    ) -> Outcomes:
        """Both sides at softmax temperature `temperature` (> 0, a number or [R]).

        power: give log Σ p^power of each outcome instead of log p. with_label: the label is an outcome by itself,
        with the teacher's own stored probability.
        """
        exponent = 1.0 / temperature
        if not (is_one(exponent) or self.temperatures):
            raise RequestError(
                f'tail "{self.name}" has no probabilities at a temperature other than 1, which adakd with idts and '
                'ctkd use too: choose tail "student", or temperature 1'
            )
        normalise = not (is_one(exponent) and self.normalised)
        if normalise:
            student = student.unnormalised()
        known = _known(student, teacher, with_label)
        at_temperature = self._powers(student, known, exponent)
        powers = at_temperature if power == 1.0 else self._powers(student, known, power * exponent)
        log_p, log_q = powers.log_p, powers.log_q
        if normalise:
            log_p = log_p - power * at_temperature.log_p.logsumexp(1, keepdim=True)
            log_q = log_q - power * at_temperature.log_q.logsumexp(1, keepdim=True)
        return Outcomes(log_p, log_q, powers.rest_columns, powers.inner_entropy, known.target)

    def _powers(self, student: StudentReduction, known: Known, exponent: float | Tensor) -> Powers:
        raise NotImplementedError


@dataclass
class Known:
    """What is certain: single ids with both sides' log-probabilities [R, n], and the teacher's mass elsewhere [R].

    The student's candidates, which the cache knows nothing about, are not among the ids.
    """

    teacher: TeacherRows
    log_p: Tensor
    log_q: Tensor
    log_rest_mass: Tensor
    target: Tensor | None
    label_outside: Tensor | None
    """[R] bool: the label is an outcome of its own because it is not stored; None where nobody asked."""


def _known(student: StudentReduction, teacher: TeacherRows, with_label: bool) -> Known:
    stored = teacher.top_ids.shape[1]
    dtype = student.log_q.dtype
    log_p = teacher.top_logprobs.to(dtype).clamp(min=FLOOR)
    log_q = student.log_q[:, :stored]
    log_mass = teacher.log_tail_mass.to(dtype).clamp(min=FLOOR)
    if not with_label:
        return Known(teacher, log_p, log_q, log_mass, None, None)
    match = teacher.top_ids == teacher.label_ids[:, None]
    outside = ~match.any(1)
    target = torch.where(outside, stored, match.int().argmax(1))
    log_label = teacher.label_logprob.to(dtype).clamp(min=FLOOR)
    # A quantised label may claim more than the tail's mass: something always remains.
    remaining = log_mass + torch.log1p(-(log_label - log_mass).clamp(max=-1e-3).exp())
    absent = torch.full_like(log_label, FLOOR)
    label_p = torch.where(outside, log_label, absent)
    label_q = torch.where(outside, student.label_log_q(), absent)
    log_p, log_q = (torch.cat(pair, 1) for pair in ((log_p, label_p[:, None]), (log_q, label_q[:, None])))
    return Known(teacher, log_p, log_q, torch.where(outside, remaining, log_mass), target, outside)


def square(temperature: float | Tensor) -> float | Tensor:
    """The factor τ² that keeps the gradient's size as the temperature grows."""
    return temperature * temperature


def is_one(exponent: float | Tensor) -> bool:
    return isinstance(exponent, float | int) and exponent == 1


def scale(values: Tensor, exponent: float | Tensor) -> Tensor:
    if is_one(exponent):
        return values
    return values * (exponent[:, None] if isinstance(exponent, Tensor) else exponent)
