"""What the builder asks of a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from storage_schemas.records import Int32, SequenceTopK, TokenSequence


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


@dataclass(frozen=True)
class Sampling:
    """How one prompt is answered, under the names of vLLM's SamplingParams. temperature 0 is greedy, top_k 0 is off.

    stop_token_ids: every token that ends an answer, the model's own among them; no other does.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the teacher wrote behind a prompt. token_ids: [G] int32, 1 ≤ G ≤ max_tokens, the stop token included."""

    token_ids: Int32
    finish_reason: Literal["stop", "length"]


class GeneratingEngine(TeacherEngine, Protocol):
    """A teacher that can also write."""

    def generate(self, prompts: Sequence[Int32], sampling: Sequence[Sampling]) -> list[Answer]:
        """One closed batch: an answer to each prompt, in the order given, of ids below the capture's vocab_size.

        Every answer has its own seed; nothing may depend on what an earlier call did.
        """
