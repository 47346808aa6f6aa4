"""TAID: Temporally Adaptive Interpolated Distillation (Shing et al., 2025, arXiv 2501.16937).

The target is a mixture of the student's and the teacher's logits that moves from one to the other as t goes to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distiller.outcomes import Tail, square
from distiller.rows import StudentReduction, TeacherRows
from storage_schemas.errors import RequestError


def interpolate(log_p: Tensor, log_q: Tensor, t: float) -> Tensor:
    """[R, n] log p_t = log softmax((1 - t) log q + t log p), without gradient.

    Mixing log-probabilities is mixing logits: the constants of each row cancel in the softmax.
    """
    return torch.lerp(log_q.detach(), log_p, t).log_softmax(1)


@dataclass
class Taid:
    """TAID and its schedule.

    t_start, t_end: where t begins and ends. schedule: "adaptive" (the authors') or "linear". alpha, beta: step size
    and momentum of the adaptive one (the authors take beta = 0.2 for wider gaps). loss: "kl" reports KL(p_t || q),
    "cross_entropy" the authors' -Σ p_t log q; the gradient is the same.

    The state (t, the previous loss, the momentum) moves once per optimiser step in `update`, from sums over all ranks
    and micro-batches, and never in evaluation. The adaptive schedule watches the cross-entropy whichever is reported.
    """

    t_start: float = 0.4
    t_end: float = 1.0
    schedule: str = "adaptive"
    alpha: float = 5e-4
    beta: float = 0.99
    loss: str = "kl"
    t: float = field(init=False)
    previous_loss: float | None = field(init=False, default=None)
    momentum: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if not 0 <= self.t_start <= self.t_end <= 1:
            raise RequestError(f"taid expects 0 <= t_start <= t_end <= 1, got {self.t_start} and {self.t_end}")
        if self.schedule not in ("adaptive", "linear"):
            raise RequestError(f'taid\'s schedule is "adaptive" or "linear", got "{self.schedule}"')
        if self.loss not in ("kl", "cross_entropy"):
            raise RequestError(f'taid\'s loss is "kl" or "cross_entropy", got "{self.loss}"')
        if not (self.alpha >= 0 and 0 <= self.beta < 1):
            raise RequestError(f"taid expects alpha >= 0 and 0 <= beta < 1, got {self.alpha} and {self.beta}")
        self.t = self.t_start

    def rows(
        self, student: StudentReduction, teacher: TeacherRows, tail: Tail, temperature: float | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[R] the loss in nats, and the cross-entropy that the schedule watches."""
        outcomes = tail.outcomes(student, teacher, temperature)
        target = interpolate(outcomes.log_p, outcomes.log_q, self.t)
        weights = target.exp()
        loss = (weights * (target - outcomes.log_q)).sum(1)
        statistics = {}
        if self.loss == "cross_entropy" or self.schedule == "adaptive":
            entropy = -(weights * target).sum(1) + outcomes.inner_entropy(weights)
            statistics["taid_cross_entropy"] = loss.detach() + entropy
            if self.loss == "cross_entropy":
                loss = loss + entropy
        return loss * square(temperature), statistics

    def update(self, sums: Mapping[str, float], step: int, total_steps: int) -> None:
        """Move t after a step. step: optimiser steps done before this one."""
        floor = self.t_start + (self.t_end - self.t_start) * step / max(total_steps, 1)
        if self.schedule == "linear":
            self.t = min(self.t_end, floor)
            return
        loss = sums["taid_cross_entropy"] / sums["rows"]
        if self.previous_loss is not None:
            change = (self.previous_loss - loss) / (self.previous_loss + 1e-15)
            self.momentum = self.beta * self.momentum + (1 - self.beta) * change
            delta = self.alpha * _sigmoid(self.momentum) * (1 - self.t)
            self.t = min(self.t_end, max(floor, self.t + delta))
        self.previous_loss = loss

    def metrics(self) -> dict[str, float]:
        return {"t": self.t}

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "previous_loss": self.previous_loss, "momentum": self.momentum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.t, self.momentum = float(state["t"]), float(state["momentum"])
        self.previous_loss = None if state["previous_loss"] is None else float(state["previous_loss"])


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))
