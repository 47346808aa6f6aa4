"""The plan of a corpus: which documents make which shard, and a digest of what they render to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from storage_schemas.errors import RequestError
from storage_schemas.manifest import ShardPlan
from storage_schemas.records import TokenSequence

if TYPE_CHECKING:
    from cache_builder.corpus import Corpus


@dataclass
class CorpusCounts:
    """What became of the documents. `documents` are all there are; of those, `truncated` lost their tail, `split` gave
    more than one sequence, `dropped` were too long, `skipped` empty, `targetless` have no target in any sequence.

    tokens and targets are those of the sequences; tokens_lost those that truncating and dropping cost;
    straddling_tokens those that reach from outside into a target span and are no targets.
    """

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    targets: int = 0
    truncated: int = 0
    split: int = 0
    dropped: int = 0
    skipped: int = 0
    targetless: int = 0
    tokens_lost: int = 0
    straddling_tokens: int = 0


@dataclass(frozen=True)
class CorpusPlan:
    """Which documents make which shard. `digest` covers every sequence and does not depend on where shards end."""

    shard_tokens: int
    shards: tuple[ShardPlan, ...]
    counts: CorpusCounts
    digest: str


def plan_shards(corpus: Corpus, shard_tokens: int, progress: Callable[[int], object] | None = None) -> CorpusPlan:
    """Render the corpus once and cut it into shards: whole documents, a shard ending with the one that brings it to
    `shard_tokens` tokens.

    The shards depend on nothing but the corpus and shard_tokens. progress: called with 1 after every document.
    Raises RequestError when no document leaves a sequence.
    """
    if shard_tokens < 1:
        raise RequestError(f"expected shard_tokens of at least 1, got {shard_tokens}; 65536 to 262144 suit most stores")
    counts, whole = CorpusCounts(), hashlib.sha256()
    shards: list[ShardPlan] = []
    start, done, digest = 0, CorpusCounts(), hashlib.sha256()

    def close(stop: int) -> ShardPlan:
        return ShardPlan(
            start=start,
            stop=stop,
            sequences=counts.sequences - done.sequences,
            tokens=counts.tokens - done.tokens,
            targets=counts.targets - done.targets,
            digest=digest.hexdigest(),
        )

    for row, pieces in enumerate(corpus.documents(0, len(corpus), counts)):
        for piece in pieces:
            serialised = serialise_sequence(piece)
            digest.update(serialised)
            whole.update(serialised)
        if counts.tokens - done.tokens >= shard_tokens:
            shards.append(close(row + 1))
            start, done, digest = row + 1, dataclasses.replace(counts), hashlib.sha256()
        if progress is not None:
            progress(1)
    if counts.sequences == 0:
        raise RequestError(
            f"no document of {corpus.settings.dataset!r} leaves a sequence: {counts.dropped} are longer than "
            f'max_length = {corpus.settings.max_length}, {counts.skipped} are empty; set overflow = "split"'
        )
    if counts.sequences > done.sequences:
        shards.append(close(len(corpus)))
    elif start < len(corpus):  # documents without a sequence at the end make no shard of their own
        shards[-1] = shards[-1].model_copy(update={"stop": len(corpus)})
    return CorpusPlan(shard_tokens=shard_tokens, shards=tuple(shards), counts=counts, digest=whole.hexdigest())


def serialise_sequence(sequence: TokenSequence) -> bytes:
    """What a digest sees of a sequence; the header carries its lengths, so that no two sequences run into one."""
    header = json.dumps([sequence.sequence_id, sequence.document_id, len(sequence)])
    return b"".join(
        [
            f"{len(header)}:{header}".encode(),
            sequence.token_ids.astype("<i4").tobytes(),
            np.packbits(sequence.completion_mask).tobytes(),
        ]
    )
