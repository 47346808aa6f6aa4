"""Cache → rows: a map-style dataset (index → row, a pure function) and a seeded, resumable order over it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from storage_schemas.errors import RequestError
from storage_schemas.reader import CacheReader
from storage_schemas.records import Bool, Float32, Int32, SequenceTopK

Targets = Literal["completion", "all"]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class TrainingRow:
    """Tokens of one row of a batch, and the teacher's distributions at the N positions that carry loss.

    token_ids, position_ids: [T] int32; a position of 0 starts a document. positions: [N] int32, the places in the row
    whose distribution predicts a target. top_ids [N, k] int32, top_logprobs [N, k] float32 nats, log_tail_mass [N],
    label_ids [N] int32 (the token that follows), label_logprob [N] nats, extras: name -> [N] float32.
    """

    token_ids: Int32
    position_ids: Int32
    positions: Int32
    top_ids: Int32
    top_logprobs: Float32
    log_tail_mass: Float32
    label_ids: Int32
    label_logprob: Float32
    extras: Mapping[str, Float32] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_ids)


def training_row(
    record: SequenceTopK, *, max_length: int | None = None, targets: Targets = "completion"
) -> TrainingRow:
    """One sequence as a row of at most `max_length` tokens.

    Position i carries loss where token i + 1 is a target. The last kept position of a cut sequence may, for the cache
    knows the token after it; the last position of a whole one may not.
    """
    length = len(record) if max_length is None else min(len(record), max_length)
    is_target: Bool = record.completion_mask[1 : length + 1]
    if targets == "all":
        is_target = np.ones_like(is_target)
    positions = np.flatnonzero(is_target).astype(np.int32)
    return TrainingRow(
        token_ids=record.token_ids[:length],
        position_ids=np.arange(length, dtype=np.int32),
        positions=positions,
        top_ids=record.top_ids[positions],
        top_logprobs=record.top_logprobs[positions],
        log_tail_mass=record.log_tail_mass[positions],
        label_ids=record.token_ids[positions + 1],
        label_logprob=record.label_logprob[positions],
        extras={name: values[positions] for name, values in record.extras.items()},
    )


def concatenate_rows(rows: Sequence[TrainingRow]) -> TrainingRow:
    """Several rows after one another as one; each keeps its position ids, so a position of 0 marks a seam."""
    starts = np.cumsum([0, *(len(row) for row in rows[:-1])]).astype(np.int32)

    def join(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(row, name) for row in rows])

    per_position = (
        "token_ids",
        "position_ids",
        "top_ids",
        "top_logprobs",
        "log_tail_mass",
        "label_ids",
        "label_logprob",
    )
    return TrainingRow(
        **{name: join(name) for name in per_position},
        positions=np.concatenate([row.positions + start for row, start in zip(rows, starts, strict=True)]),
        extras={name: np.concatenate([row.extras[name] for row in rows]) for name in rows[0].extras},
    )


class CacheDataset(Dataset[TrainingRow]):
    """The sequences of one cache as training rows; index → row is a pure function of the arguments here.

    max_length: tokens of a row; longer sequences are cut to it, which `cut_sequences` and `cut_tokens` count.
    targets: "completion" trains on the cache's targets, "all" on every token. sequences: cache indices to use, all
    when None. packing: rows of several whole sequences of one shard, filled best-fit to `max_length`.
    """

    def __init__(
        self,
        cache: CacheReader,
        *,
        max_length: int | None = None,
        targets: Targets = "completion",
        sequences: Sequence[int] | Int64 | None = None,
        packing: bool = False,
    ) -> None:
        self.cache = cache
        self.max_length = max_length
        self.targets = targets
        self.packing = packing
        chosen = np.arange(len(cache)) if sequences is None else np.asarray(sequences, dtype=np.int64)
        lengths = np.asarray(cache.lengths)[chosen].astype(np.int64)
        scored = lengths >= 2  # a single token is neither predicted nor followed by one
        self.short_sequences = int((~scored).sum())
        chosen, lengths = chosen[scored], lengths[scored]
        if len(chosen) == 0:
            raise RequestError(
                f"expected sequences of two tokens or more to train on, got none of the cache's {len(cache)}; "
                "build a cache with more documents, or hold out a smaller fraction"
            )
        if max_length is not None and max_length < 1:
            raise RequestError(f"expected max_length of 1 or more, got {max_length}; give the tokens a row may have")
        kept = lengths if max_length is None else np.minimum(lengths, max_length)
        self.cut_sequences = int((kept < lengths).sum())
        self.cut_tokens = int((lengths - kept).sum())
        self.token_count = int(kept.sum())
        self.longest = int(kept.max())
        shards = np.asarray(cache.shard_of)[chosen]
        if packing:
            capacity = int(kept.max()) if max_length is None else max_length
            self.members = pack_sequences(kept, shards, capacity, chosen)
        else:
            self.members = [chosen[i : i + 1] for i in range(len(chosen))]
        first_shard = dict(zip(chosen.tolist(), shards.tolist(), strict=True))
        self.shard_of: Int64 = np.array([first_shard[int(row[0])] for row in self.members], dtype=np.int64)

    @property
    def vocab_size(self) -> int:
        """Ids of the teacher's tokenizer; a student's output rows beyond them are padding."""
        return self.cache.identity.tokenizer.vocab_size

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> TrainingRow:
        rows = [
            training_row(self.cache.read(int(i)), max_length=self.max_length, targets=self.targets)
            for i in self.members[index]
        ]
        return rows[0] if len(rows) == 1 else concatenate_rows(rows)


def pack_sequences(lengths: Int64, shards: NDArray[np.integer], capacity: int, indices: Int64) -> list[Int64]:
    """Whole sequences into rows of at most `capacity` tokens, best-fit decreasing, never across shards.

    Per shard, so that a row needs one file, and so that the number of rows and their members never change between
    epochs: that is what lets a run resume inside one. Ties keep the cache's order.
    """
    assert (lengths <= capacity).all()
    packs: list[Int64] = []
    for shard in np.unique(shards):
        members = np.flatnonzero(shards == shard)
        members = members[np.argsort(-lengths[members], kind="stable")]
        by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # free tokens -> open rows
        rooms = np.zeros(capacity + 1, dtype=bool)
        rows: list[list[int]] = []
        for member in members:
            need = int(lengths[member])
            fit = int(np.argmax(rooms[need:])) + need
            if rooms[fit]:
                row = by_room[fit].pop()
                rooms[fit] = bool(by_room[fit])
            else:
                row, fit = [], capacity
                rows.append(row)
            row.append(int(member))
            by_room[fit - need].append(row)
            rooms[fit - need] = True
        packs.extend(indices[np.array(sorted(row), dtype=np.int64)] for row in sorted(rows, key=min))
    return packs


def shuffled_order(shard_of: NDArray[np.integer], *, seed: int, epoch: int, window: int) -> Int64:
    """A permutation of the rows that depends on nothing else than the arguments.

    Shards are permuted, then the rows of each `window` consecutive shards among themselves, so that at most `window`
    shards are in use at a time and a far one is fetched once an epoch.
    """
    generator = np.random.default_rng([seed, epoch])
    shards = generator.permutation(np.unique(shard_of))
    order = np.argsort(shard_of, kind="stable")
    starts = np.searchsorted(shard_of[order], shards, side="left")
    ends = np.searchsorted(shard_of[order], shards, side="right")
    parts = []
    for first in range(0, len(shards), window):
        spans = range(first, min(first + window, len(shards)))
        parts.append(generator.permutation(np.concatenate([order[starts[s] : ends[s]] for s in spans])))
    order = np.concatenate(parts)
    return order.astype(np.int64)


class WindowShuffleSampler(Sampler[int]):
    """`shuffled_order` of the epoch that `set_epoch` named last; it keeps no other state, so resuming needs none."""

    def __init__(self, shard_of: NDArray[np.integer], *, seed: int, window: int) -> None:
        if window < 1:
            raise RequestError(f"expected a shuffle window of 1 shard or more, got {window}; set data.shuffle_window")
        self.shard_of = shard_of
        self.seed = seed
        self.window = window
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.shard_of)

    def __iter__(self) -> Iterator[int]:
        order = shuffled_order(self.shard_of, seed=self.seed, epoch=self.epoch, window=self.window)
        return iter(order.tolist())


def is_held_out(document_id: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a stable hash of its id, so that its pieces stay together."""
    digest = hashlib.sha256(document_id.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def split_held_out(cache: CacheReader, fraction: float) -> tuple[Int64, Int64]:
    """(training, held-out) sequence indices; RequestError where either side would be empty."""
    held_out = np.array([is_held_out(document_id, fraction) for document_id in cache.document_ids], dtype=bool)
    if held_out.all() or not held_out.any():
        raise RequestError(
            f"expected eval_fraction={fraction} to leave documents on both sides, got {int(held_out.sum())} of "
            f"{len(cache)} sequences held out; change the fraction or give an --eval-cache"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
