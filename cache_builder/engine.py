"""What the builder asks of a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage_schemas.records import SequenceTopK, TokenSequence


@dataclass(frozen=True)
class Capture:
    """What to keep of each row: `top_k` ids of the first `vocab_size` ones (the tokenizer's; a model's padding beyond
    them is removed by renormalising), and the `extras` named in `storage_schemas.records.EXTRAS`."""

    top_k: int
    vocab_size: int
    extras: tuple[str, ...] = ()


class TeacherEngine(Protocol):
    """A loaded teacher."""

    def provenance(self) -> Mapping[str, str]:
        """Engine, versions and hardware: recorded with a cache, warned about when they differ, never refused."""

    def score(self, sequences: Sequence[TokenSequence]) -> Iterator[SequenceTopK]:
        """One closed batch: the distributions of every sequence, in the order given.

        Nothing may depend on what an earlier call scored; that is what lets a resumed build equal an undisturbed one.
        """

    def close(self) -> None:
        """Free the teacher's memory and end the processes it started."""
