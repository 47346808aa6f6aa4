"""The registry: a name and its options → an objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from distiller.adakd import AdaKD, hellinger
from distiller.outcomes import Tail
from distiller.rows import StudentReduction, TeacherRows
from distiller.taid import Taid
from distiller.tail import TAILS, StudentTail
from distiller.terms import (
    ABKD,
    CTKD,
    DKD,
    JSD,
    TVD,
    AdaptiveKL,
    CrossEntropy,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewRKL,
    Statistics,
    Term,
)
from storage_schemas.errors import RequestError


@dataclass
class Objective:
    """A weighted sum of terms over one tail, perhaps with AdaKD's choice of rows: what the head evaluates and the
    trainer steps.

    temperature: softmax temperature of both sides. adakd: needs a gradient-free pass over all rows, the survey.
    """

    name: str
    terms: Sequence[tuple[float, Term]]
    tail: Tail = field(default_factory=StudentTail)
    temperature: float = 1.0
    adakd: AdaKD | None = None

    @property
    def needs_survey(self) -> bool:
        """Whether `rows` needs a plan made from all rows."""
        return self.adakd is not None

    @property
    def candidates(self) -> int:
        """How many of the student's largest ids off the stored ones become outcomes of their own."""
        return self.tail.candidates

    def survey(self, student: StudentReduction, teacher: TeacherRows) -> Statistics:
        """[R] of a chunk, without gradient: the difficulty, the loss before selection, and its statistics."""
        outcomes = self.tail.outcomes(student, teacher)
        loss, statistics = self._sum_terms(student, teacher, self.temperature)
        return {**statistics, "difficulty": hellinger(outcomes.log_p, outcomes.log_q), "loss_before_selection": loss}

    def plan(self, surveyed: Statistics) -> Statistics:
        """[N] what `rows` needs, from what was surveyed over all N rows; with several ranks a collective call.

        A rank without rows takes part with `sit_out`.
        """
        assert self.adakd is not None
        statistics = {f"surveyed {name}": values for name, values in surveyed.items() if name != "difficulty"}
        return {**statistics, **self.adakd.plan(surveyed["difficulty"], self.temperature)}

    def sit_out(self, device: torch.device | str = "cpu") -> None:
        """What a rank whose micro-batch has no rows calls instead of the head, so that the others need not wait."""
        if self.adakd is not None:
            self.adakd.plan(torch.empty(0, device=device), self.temperature)

    def rows(self, student: StudentReduction, teacher: TeacherRows, plan: Statistics) -> tuple[Tensor, Statistics]:
        """[R] the loss in nats, and [R] statistics to be summed."""
        loss, statistics = self._sum_terms(student, teacher, plan.get("temperature", self.temperature))
        if "weight" in plan:
            loss = loss * plan["weight"]
        # What was seen of all rows at the same temperature counts, not what the selection left of it.
        prefix = "surveyed "
        statistics |= {name.removeprefix(prefix): values for name, values in plan.items() if name.startswith(prefix)}
        return loss, statistics

    def _sum_terms(
        self, student: StudentReduction, teacher: TeacherRows, temperature: float | Tensor
    ) -> tuple[Tensor, Statistics]:
        total, statistics = torch.zeros_like(student.log_rest), {}
        for weight, term in self.terms:
            loss, found = term.rows(student, teacher, self.tail, temperature)
            total = total + weight * loss
            statistics.update(found)
        return total, statistics

    def update(self, sums: Mapping[str, float], step: int, total_steps: int) -> None:
        """Move what adapts; once per optimiser step, with sums over all ranks and micro-batches.

        step: optimiser steps done before this one (the Trainer's global_step when the gradients are complete).
        """
        for _, term in self.terms:
            term.update(sums, step, total_steps)
        if self.adakd is not None:
            self.adakd.update(sums["loss_before_selection"] / sums["rows"], step, total_steps)

    def metrics(self) -> dict[str, float]:
        """What a person may want to watch, e.g. {"t": 0.41}."""
        found = {name: value for _, term in self.terms for name, value in term.metrics().items()}
        return found | (self.adakd.metrics() if self.adakd is not None else {})

    def state_dict(self) -> dict[str, Any]:
        """Everything that adapts, JSON-able."""
        return {
            "name": self.name,
            "terms": [term.state_dict() for _, term in self.terms],
            "adakd": None if self.adakd is None else self.adakd.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises RequestError when it is another objective's."""
        if state["name"] != self.name or len(state["terms"]) != len(self.terms):
            raise RequestError(
                f'the checkpoint was trained with the objective "{state["name"]}", got "{self.name}": resume with the '
                "same objective, or start a new run from that checkpoint's weights"
            )
        for (_, term), saved in zip(self.terms, state["terms"], strict=True):
            term.load_state_dict(saved)
        if self.adakd is not None:
            self.adakd.load_state_dict(state["adakd"])


TERMS: dict[str, type[Any]] = {
    "abkd": ABKD,
    "adaptive_kl": AdaptiveKL,
    "cross_entropy": CrossEntropy,
    "ctkd": CTKD,
    "dkd": DKD,
    "forward_kl": ForwardKL,
    "jsd": JSD,
    "reverse_kl": ReverseKL,
    "skew_kl": SkewKL,
    "skew_rkl": SkewRKL,
    "taid": Taid,
    "tvd": TVD,
}
"""Objectives of one term. Besides these: "adakd" over a `base`, and "mix" of several `parts`."""

OBJECTIVES = (*TERMS, "adakd", "mix")

COMMON: dict[str, Any] = {
    "temperature": 1.0,
    "tail": "student",
    "tail_kappa": StudentTail.kappa,
    "tail_cap": StudentTail.cap,
    "cross_entropy_weight": 0.0,
}
"""Options of every objective. cross_entropy_weight w: (1 - w) · objective + w · hard-label cross-entropy."""


def make_objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of that name.

    options: those of the term (`distiller.terms`, `distiller.taid`), those in `COMMON`, and
    "adakd": `base`, the name of a term ("forward_kl"), and AdaKD's own options; "mix": `parts`, a list of tables with
    `name`, `weight` and the term's options. Raises RequestError for an unknown name or option, listing the known ones.
    """
    left = dict(options or {})
    common = {key: _typed(name, key, left.pop(key, default), default) for key, default in COMMON.items()}
    adakd = None
    if name == "adakd":
        base = left.pop("base", "forward_kl")
        own = {item.name: left.pop(item.name) for item in _options(AdaKD) if item.name in left}
        adakd = _build("adakd", AdaKD, own)
        terms = [(1.0, _make_term(base, left, also=[item.name for item in _options(AdaKD)]))]
    elif name == "mix":
        parts = left.pop("parts", None)
        if not isinstance(parts, list) or not parts or not all(isinstance(part, Mapping) for part in parts):
            raise RequestError(
                f'objective "mix" expects parts, a list of tables such as {{name = "jsd", weight = 0.5}}, got {parts!r}'
            )
        if left:
            raise RequestError(f'objective "mix" has no option {sorted(left)}; it knows {["parts", *COMMON]}')
        terms = [_make_part(part) for part in parts]
    elif name in TERMS:
        terms = [(1.0, _make_term(name, left))]
    else:
        raise RequestError(f'unknown objective "{name}": choose one of {", ".join(sorted(OBJECTIVES))}')
    hard = common["cross_entropy_weight"]
    if not 0 <= hard <= 1:
        raise RequestError(f"expected 0 <= cross_entropy_weight <= 1, got {hard}")
    if hard:
        terms = [(weight * (1 - hard), term) for weight, term in terms] + [(hard, CrossEntropy())]
    if not common["temperature"] > 0:
        raise RequestError(f"expected temperature > 0, got {common['temperature']}")
    return Objective(name, terms, _make_tail(common), common["temperature"], adakd)


def _make_tail(common: Mapping[str, Any]) -> Tail:
    name, kappa, cap = common["tail"], common["tail_kappa"], common["tail_cap"]
    if name not in TAILS:
        raise RequestError(f'unknown tail "{name}": choose one of {", ".join(sorted(TAILS))}')
    if cap < 0:
        raise RequestError(f"expected tail_cap >= 0, the number of ids that may be capped, got {cap}")
    if name == StudentTail.name:
        return StudentTail(kappa=kappa, cap=cap)
    return TAILS[name]()


def _make_part(part: Mapping[str, Any]) -> tuple[float, Term]:
    left = dict(part)
    weight = _typed("mix", "weight", left.pop("weight", 1.0), 1.0)
    if weight < 0:
        raise RequestError(f"expected weight >= 0 for a part of the mix, got {weight}")
    return weight, _make_term(left.pop("name", ""), left)


def _make_term(name: str, options: Mapping[str, Any], also: Sequence[str] = ()) -> Term:
    if name not in TERMS:
        raise RequestError(f'unknown objective "{name}": choose one of {", ".join(sorted(TERMS))}')
    term: Term = _build(name, TERMS[name], options, also)
    return term


def _build(name: str, kind: type[Any], options: Mapping[str, Any], also: Sequence[str] = ()) -> Any:
    known = {item.name: item.default for item in _options(kind)}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise RequestError(f'objective "{name}" has no option {unknown}; it knows {[*known, *also, *COMMON]}')
    return kind(**{key: _typed(name, key, value, known[key]) for key, value in options.items()})


def _options(kind: type[Any]) -> list[Any]:
    return [item for item in fields(kind) if item.init]


def _typed(name: str, key: str, value: Any, default: Any) -> Any:
    """The value as the default's type; whole numbers serve as fractions."""
    kind = type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise RequestError(f'objective "{name}" expects {key} as {kind.__name__}, got {value!r}')
    return value
