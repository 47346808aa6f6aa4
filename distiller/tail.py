"""What to assume about the teacher's probabilities that were not stored.

A tail turns the student's and the teacher's rows into outcomes: pairs of log-probabilities on which any divergence is
a plain sum. The stored ids are outcomes by themselves; how the rest becomes one or more outcomes is the tail's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distiller.rows import StudentReduction, TeacherRows

FLOOR = -100.0
"""Teacher log-probabilities are floored here (nats), so that a one-hot teacher has finite divergences."""


@dataclass(frozen=True)
class Outcomes:
    """log_p: [R, n] the teacher, without gradient. log_q: [R, n] the student, differentiable. Nats, each row's mass 1.

    The last `rest_columns` are groups of ids inside which both sides are taken to be proportional; all others are
    single ids. inner_entropy: [R, n] weights on the columns -> [R] the entropy that the grouping hides, without
    gradient.
    """

    log_p: Tensor
    log_q: Tensor
    rest_columns: int
    inner_entropy: Callable[[Tensor], Tensor]


class Tail:
    """The student-shaped tail: off the stored ids p_j = (m / Q) q_j, with the student's present q and no gradient."""

    candidates = 0

    def outcomes(self, student: StudentReduction, teacher: TeacherRows, temperature: float | Tensor = 1.0) -> Outcomes:
        """Both sides at softmax temperature `temperature`, a number or [R]."""
        exponent = 1.0 / temperature
        log_rest = student.log_rest_power(exponent)
        scaled = exponent[:, None] if isinstance(exponent, Tensor) else exponent
        log_p = torch.cat([teacher.top_logprobs, teacher.log_tail_mass[:, None]], dim=1)
        log_p = log_p.to(student.log_q.dtype).clamp(min=FLOOR)
        log_q = torch.cat([student.log_q * scaled, log_rest[:, None]], dim=1)
        if not (isinstance(exponent, float) and exponent == 1.0):
            shape = (log_rest - exponent * student.log_rest).detach()  # log Σ_rest (q / Q)^a
            log_p = log_p * scaled
            log_p = torch.cat([log_p[:, :-1], log_p[:, -1:] + shape[:, None]], dim=1).log_softmax(1)
            log_q = log_q.log_softmax(1)

        def inner_entropy(weights: Tensor) -> Tensor:
            return weights[:, -1] * student.rest_entropy(exponent).detach()

        return Outcomes(log_p, log_q, 1, inner_entropy)


def square(temperature: float | Tensor) -> float | Tensor:
    """The factor τ² that keeps the gradient's size as the temperature grows."""
    return temperature * temperature
