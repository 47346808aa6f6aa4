"""The registry: a name and its options → an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor

from distiller.rows import StudentReduction, TeacherRows
from distiller.taid import Taid
from distiller.tail import Tail
from storage_schemas.errors import RequestError

Statistics = dict[str, Tensor]


class Term(Protocol):
    """One loss between the student's and the teacher's rows, with whatever state it keeps."""

    def rows(
        self, student: StudentReduction, teacher: TeacherRows, tail: Tail, temperature: float | Tensor
    ) -> tuple[Tensor, Statistics]:
        """[R] the loss in nats, differentiable to the student, and [R] statistics to be summed over rows."""

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
    """Hard-label cross-entropy, -log q of the token that follows. Knows no temperature."""

    def rows(
        self, student: StudentReduction, teacher: TeacherRows, tail: Tail, temperature: float | Tensor
    ) -> tuple[Tensor, Statistics]:
        return -student.label_log_q(), {}


@dataclass
class Objective:
    """A weighted sum of terms over one tail: what the head evaluates and the trainer steps."""

    name: str
    terms: list[tuple[float, Term]]
    tail: Tail = field(default_factory=Tail)
    temperature: float = 1.0

    needs_survey = False

    @property
    def candidates(self) -> int:
        """How many of the student's largest ids off the stored ones become outcomes of their own."""
        return self.tail.candidates

    def survey(self, student: StudentReduction, teacher: TeacherRows) -> Statistics:
        """[R] statistics of a chunk, without gradient, from which `plan` decides. Only if `needs_survey`."""
        return {}

    def plan(self, surveyed: Statistics) -> Statistics:
        """[N] instructions for `rows`, from what was surveyed over all N rows."""
        return {}

    def rows(self, student: StudentReduction, teacher: TeacherRows, plan: Statistics) -> tuple[Tensor, Statistics]:
        """[R] the loss in nats, and [R] statistics to be summed."""
        loss, statistics = student.log_rest.new_zeros(()), {}
        for weight, term in self.terms:
            part, found = term.rows(student, teacher, self.tail, self.temperature)
            loss = loss + weight * part
            statistics.update(found)
        return loss, statistics

    def update(self, sums: Mapping[str, float], step: int, total_steps: int) -> None:
        """Move what adapts; once per optimiser step, with sums over all ranks and micro-batches.

        step: optimiser steps done before this one (the Trainer's global_step when the gradients are complete).
        """
        for _, term in self.terms:
            term.update(sums, step, total_steps)

    def metrics(self) -> dict[str, float]:
        """What a person may want to watch, e.g. {"t": 0.41}."""
        return {name: value for _, term in self.terms for name, value in term.metrics().items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that adapts, JSON-able."""
        return {"terms": [term.state_dict() for _, term in self.terms]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for (_, term), saved in zip(self.terms, state["terms"], strict=True):
            term.load_state_dict(saved)


TERMS: dict[str, type[Any]] = {"taid": Taid, "cross_entropy": CrossEntropy}


def make_objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of that name. Raises RequestError for an unknown name or option, listing the known ones."""
    if name not in TERMS:
        raise RequestError(f'unknown objective "{name}": choose one of {", ".join(sorted(TERMS))}')
    options = dict(options or {})
    known = [item.name for item in fields(TERMS[name]) if item.init]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise RequestError(f'objective "{name}" has no option {unknown}; it knows {known}')
    return Objective(name, [(1.0, TERMS[name](**options))])
