"""One sequence and the teacher's distributions over it.

Row i is the teacher's distribution after reading tokens 0..i: it predicts token i + 1. The last row is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

EXTRAS = ("entropy", "log_rest_sqrt_sum")
"""Optional scalars of the teacher's full row: its entropy (nats), and log Σ √p over the ids that are not stored
(what makes temperature 2 exact)."""

ROUNDING = 5e-3
"""How far from 1 the probabilities of an engine's row may sum: float32 over a large vocabulary, with room to spare."""


@dataclass(frozen=True)
class TokenSequence:
    """Tokens to score, and which of them are targets.

    token_ids: [T] int32. completion_mask: [T] bool, True where the token is a target of training; the first token
    never is, for nothing predicts it. sequence_id is unique in a cache; document_id is shared by the pieces of one
    document.
    """

    sequence_id: str
    document_id: str
    token_ids: Int32
    completion_mask: Bool

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class SequenceTopK(TokenSequence):
    """A sequence with its stored distributions.

    top_ids: [T, k] int32, top_logprobs: [T, k] float32 nats of the full-vocabulary softmax at temperature 1,
    descending, ties by id. log_tail_mass: [T] float32, log of the mass off the stored ids (-inf when there is none).
    label_logprob: [T] float32, the teacher's log-probability of the token that follows; NaN in the last row, which
    no token follows. extras: name -> [T] float32, a subset of `EXTRAS`.
    """

    top_ids: Int32
    top_logprobs: Float32
    log_tail_mass: Float32
    label_logprob: Float32
    extras: Mapping[str, Float32] = field(default_factory=dict)

    @property
    def top_k(self) -> int:
        return int(self.top_ids.shape[1])


@dataclass(frozen=True)
class StoredSequence:
    """One row of a shard: a payload and what a plain reader wants to know of it."""

    sequence_id: str
    document_id: str
    tokens: int
    payload: bytes


def sort_rows(top_ids: NDArray[np.integer], top_logprobs: NDArray[np.floating]) -> tuple[Int32, Float32]:
    """Rows [T, k] in the stored order: descending log-probability, ties by ascending id."""
    order = np.lexsort((top_ids, -top_logprobs), axis=-1)
    return (
        np.take_along_axis(top_ids, order, axis=-1).astype(np.int32),
        np.take_along_axis(top_logprobs, order, axis=-1).astype(np.float32),
    )


def find_defect(
    record: SequenceTopK, *, vocab_size: int, top_k: int, extras: tuple[str, ...] = (), mass_tolerance: float = ROUNDING
) -> str | None:
    """The first invariant that the record breaks, in words, or None.

    Both sides of the contract ask it: the writer refuses what an engine must not produce, the reader what a checksum
    cannot see. mass_tolerance: how far from 1 the probabilities of a row may sum. Ties may stand in any order here,
    for quantisation makes new ones; `sort_rows` orders the teacher's own.
    """
    count = len(record)
    shapes = {
        "token_ids": (record.token_ids, np.int32, (count,)),
        "completion_mask": (record.completion_mask, np.bool_, (count,)),
        "top_ids": (record.top_ids, np.int32, (count, top_k)),
        "top_logprobs": (record.top_logprobs, np.float32, (count, top_k)),
        "log_tail_mass": (record.log_tail_mass, np.float32, (count,)),
        "label_logprob": (record.label_logprob, np.float32, (count,)),
        **{name: (values, np.float32, (count,)) for name, values in record.extras.items()},
    }
    if count == 0:
        return "it has no tokens"
    if tuple(sorted(record.extras)) != tuple(sorted(extras)):
        return f"extras are {sorted(record.extras)}, expected {sorted(extras)}"
    for name, (array, dtype, shape) in shapes.items():
        if array.dtype != dtype or array.shape != shape:
            return f"{name} is {array.dtype}{list(array.shape)}, expected {np.dtype(dtype)}{list(shape)}"
    if record.completion_mask[0]:
        return "its first token is marked as a target, but nothing predicts it"
    for name, ids in (("token_ids", record.token_ids), ("top_ids", record.top_ids)):
        if ids.min() < 0 or ids.max() >= vocab_size:
            return f"{name} reach from {ids.min()} to {ids.max()}, outside the vocabulary of {vocab_size}"
    values = record.top_logprobs
    if np.isnan(values).any() or np.isnan(record.log_tail_mass).any() or np.isnan(record.label_logprob[:-1]).any():
        return "a log-probability is NaN"
    with np.errstate(invalid="ignore"):  # -inf minus -inf, which is a tie
        steps = np.diff(values, axis=1)
    if (steps > 0).any():
        return "top_logprobs are not descending"
    ordered = np.sort(record.top_ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return "an id stands twice in one row"
    mass = np.exp(values.astype(np.float64)).sum(axis=1) + np.exp(record.log_tail_mass.astype(np.float64))
    worst = int(np.abs(mass - 1).argmax())
    if not abs(mass[worst] - 1) <= mass_tolerance:
        return f"row {worst} has a mass of {mass[worst]:.4f}, expected 1"
    return None
