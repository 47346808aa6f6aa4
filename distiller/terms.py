"""Losses between the student's and the teacher's rows, with their options; the formulas are in `divergences`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from distiller import divergences
from distiller.outcomes import Outcomes, Tail, square
from distiller.rows import StudentReduction, TeacherRows
from storage_schemas.errors import RequestError

Statistics = dict[str, Tensor]


class Term(Protocol):
    """One loss, with whatever state it keeps."""

    def rows(
        self, student: StudentReduction, teacher: TeacherRows, tail: Tail, temperature: float | Tensor
    ) -> tuple[Tensor, Statistics]:
        """[R] the loss in nats, differentiable to the student, and [R] statistics to be summed over rows.

        temperature: of both sides, a number or [R]; the loss is multiplied by its square.
        """

    def update(self, sums: Mapping[str, float], step: int, total_steps: int) -> None: ...
    def metrics(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stateless:
    """For terms that keep nothing between steps."""

    def update(self, sums: Mapping[str, float], step: int, total_steps: int) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state, f"unexpected state {sorted(state)}"


@dataclass
class CrossEntropy(Stateless):
    """Hard-label cross-entropy, -log q of the token that follows; temperatures and tails do not touch it."""

    def rows(
        self, student: StudentReduction, teacher: TeacherRows, tail: Tail, temperature: float | Tensor
    ) -> tuple[Tensor, Statistics]:
        return -student.label_log_q(), {}


class Divergence(Stateless):
    """A pure function of outcomes."""

    with_label = False

    @property
    def power(self) -> float:
        """The outcomes are asked for as log Σ p^power."""
        return 1.0

    def measure(self, outcomes: Outcomes) -> Tensor:
        """[R] nats."""
        raise NotImplementedError

    def rows(
        self, student: StudentReduction, teacher: TeacherRows, tail: Tail, temperature: float | Tensor
    ) -> tuple[Tensor, Statistics]:
        outcomes = tail.outcomes(student, teacher, temperature, power=self.power, with_label=self.with_label)
        return self.measure(outcomes) * square(temperature), {}


@dataclass
class ForwardKL(Divergence):
    """KL(p || q)."""

    def measure(self, outcomes: Outcomes) -> Tensor:
        return divergences.forward_kl(outcomes.log_p, outcomes.log_q)


@dataclass
class ReverseKL(Divergence):
    """KL(q || p)."""

    def measure(self, outcomes: Outcomes) -> Tensor:
        return divergences.reverse_kl(outcomes.log_p, outcomes.log_q)


@dataclass
class JSD(Divergence):
    """Jensen-Shannon with weight beta on the teacher; 0 is the forward, 1 the reverse KL."""

    beta: float = 0.5

    def __post_init__(self) -> None:
        _require(0 <= self.beta <= 1, "jsd expects 0 <= beta <= 1", self.beta)

    def measure(self, outcomes: Outcomes) -> Tensor:
        return divergences.jsd(outcomes.log_p, outcomes.log_q, self.beta)


@dataclass
class TVD(Divergence):
    """Total variation."""

    def measure(self, outcomes: Outcomes) -> Tensor:
        return divergences.tvd(outcomes.log_p, outcomes.log_q)


@dataclass
class SkewKL(Divergence):
    """KL(p || mixture), the mixture holding `skew` of the teacher."""

    skew: float = 0.1

    def __post_init__(self) -> None:
        _require(0 < self.skew < 1, "skew_kl expects 0 < skew < 1", self.skew)

    def measure(self, outcomes: Outcomes) -> Tensor:
        return divergences.skew_kl(outcomes.log_p, outcomes.log_q, self.skew)


@dataclass
class SkewRKL(Divergence):
    """KL(q || mixture), the mixture holding `skew` of the student."""

    skew: float = 0.1

    def __post_init__(self) -> None:
        _require(0 < self.skew < 1, "skew_rkl expects 0 < skew < 1", self.skew)

    def measure(self, outcomes: Outcomes) -> Tensor:
        return divergences.skew_rkl(outcomes.log_p, outcomes.log_q, self.skew)


@dataclass
class AdaptiveKL(Divergence):
    """Forward and reverse KL, weighted by where the gap is."""

    head_mass: float = 0.5

    def __post_init__(self) -> None:
        _require(0 < self.head_mass < 1, "adaptive_kl expects 0 < head_mass < 1", self.head_mass)

    def measure(self, outcomes: Outcomes) -> Tensor:
        return divergences.adaptive_kl(outcomes.log_p, outcomes.log_q, self.head_mass, outcomes.rest_columns)


@dataclass
class DKD(Divergence):
    """Decoupled KD: alpha on the label against the rest, beta on the distribution of the rest."""

    alpha: float = 1.0
    beta: float = 1.0

    with_label = True

    def __post_init__(self) -> None:
        _require(self.alpha >= 0 and self.beta >= 0, "dkd expects alpha, beta >= 0", (self.alpha, self.beta))

    def measure(self, outcomes: Outcomes) -> Tensor:
        assert outcomes.target is not None
        return divergences.dkd(outcomes.log_p, outcomes.log_q, outcomes.target, self.alpha, self.beta)


@dataclass
class ABKD(Divergence):
    """The α-β divergence; its limits are the forward (1, 0) and reverse KL (0, 1), which have names of their own."""

    alpha: float = 0.2
    beta: float = 0.7

    def __post_init__(self) -> None:
        _require(self.alpha > 0 and self.beta > 0, "abkd expects alpha, beta > 0", (self.alpha, self.beta))

    @property
    def power(self) -> float:
        return self.alpha + self.beta

    def measure(self, outcomes: Outcomes) -> Tensor:
        return divergences.ab_divergence(outcomes.log_p, outcomes.log_q, self.alpha, self.beta)


@dataclass
class CTKD:
    """Forward KL at a learned temperature that works against the student (Li et al., 2023, arXiv 2211.16231).

    τ = minimum + spread · σ(θ), and the loss is multiplied by τ²; both are differentiated. θ climbs the loss by plain
    gradient ascent, with a rate that grows from 0 along a half cosine over the first `ramp` of training.
    """

    minimum: float = 1.0
    spread: float = 20.0
    learning_rate: float = 0.05
    ramp: float = 0.05
    theta: float = field(init=False, default=1.0)

    def __post_init__(self) -> None:
        _require(self.minimum > 0 and self.spread >= 0, "ctkd expects minimum > 0, spread >= 0", self.minimum)
        _require(self.learning_rate >= 0, "ctkd expects learning_rate >= 0", self.learning_rate)
        _require(0 <= self.ramp <= 1, "ctkd expects 0 <= ramp <= 1", self.ramp)

    @property
    def temperature(self) -> float:
        return self.minimum + self.spread / (1 + math.exp(-self.theta))

    def rows(
        self, student: StudentReduction, teacher: TeacherRows, tail: Tail, temperature: float | Tensor
    ) -> tuple[Tensor, Statistics]:
        theta = student.log_rest.new_full(student.log_rest.shape, self.theta).requires_grad_(torch.is_grad_enabled())
        learned = temperature * (self.minimum + self.spread * theta.sigmoid())
        outcomes = tail.outcomes(student, teacher, learned)
        loss = divergences.forward_kl(outcomes.log_p, outcomes.log_q) * learned.square()
        if not loss.requires_grad:
            return loss, {"ctkd_slope": torch.zeros_like(loss)}
        (slope,) = torch.autograd.grad(loss.sum(), theta, retain_graph=True)
        return loss, {"ctkd_slope": slope}

    def update(self, sums: Mapping[str, float], step: int, total_steps: int) -> None:
        reached = min(1.0, step / (self.ramp * total_steps)) if self.ramp * total_steps > 0 else 1.0
        strength = 0.5 * (1 - math.cos(math.pi * reached))
        self.theta += self.learning_rate * strength * sums["ctkd_slope"] / sums["rows"]

    def metrics(self) -> dict[str, float]:
        return {"temperature": self.temperature}

    def state_dict(self) -> dict[str, Any]:
        return {"theta": self.theta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.theta = float(state["theta"])


def _require(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise RequestError(f"{expected}, got {got}")
