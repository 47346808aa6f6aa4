"""The held-out targets where a student is furthest from its teacher."""

from __future__ import annotations

import heapq
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distiller.stream import TrainingRow
from storage_schemas.records import Float32, Int32

CONTEXT_TOKENS = 24
SHOWN = 5


@dataclass(frozen=True)
class WorstTarget:
    """One target: its KL in nats, the tokens that led to it, the token that followed, and the teacher's first choices
    with both log-probabilities (nats)."""

    kl: float
    sequence_id: str
    position: int
    context_ids: list[int]
    label_id: int
    top_ids: list[int]
    teacher_logprobs: list[float]
    student_logprobs: list[float]

    def described(self, tokenizer: Any) -> dict[str, Any]:
        """With the text of its tokens beside their ids."""
        return {
            **asdict(self),
            "context": tokenizer.decode(self.context_ids),
            "label": tokenizer.decode([self.label_id]),
            "top": [tokenizer.decode([i]) for i in self.top_ids],
        }


class WorstTargets:
    """The `count` targets of highest KL among all that it is shown, worst first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._heap: list[tuple[float, str, int, WorstTarget]] = []

    def add(self, sequence_id: str, row: TrainingRow, kl: np.ndarray[Any, Any], student_log_q: Float32) -> None:
        """One row: kl [N] nats, student_log_q [N, k] on the stored ids."""
        for place in np.argsort(-kl)[: self.count]:
            value, position = float(kl[place]), int(row.positions[place])
            if len(self._heap) == self.count and (value, sequence_id, position) <= self._heap[0][:3]:
                break
            target = WorstTarget(
                kl=value,
                sequence_id=sequence_id,
                position=position,
                context_ids=_ids(row.token_ids[max(0, position + 1 - CONTEXT_TOKENS) : position + 1]),
                label_id=int(row.label_ids[place]),
                top_ids=_ids(row.top_ids[place, :SHOWN]),
                teacher_logprobs=[float(v) for v in row.top_logprobs[place, :SHOWN]],
                student_logprobs=[float(v) for v in student_log_q[place, :SHOWN]],
            )
            push = heapq.heappush if len(self._heap) < self.count else heapq.heappushpop
            push(self._heap, (value, sequence_id, position, target))

    def merge(self, others: list[list[WorstTarget]]) -> list[WorstTarget]:
        """The worst of several ranks' lists."""
        found = [target for targets in others for target in targets]
        return sorted(found, key=lambda target: -target.kl)[: self.count]

    def targets(self) -> list[WorstTarget]:
        return [entry[3] for entry in sorted(self._heap, key=lambda entry: entry[:3], reverse=True)]


def _ids(values: Int32) -> list[int]:
    return [int(value) for value in values]
