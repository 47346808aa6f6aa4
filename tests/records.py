"""Random records for the storage tests: no teacher, any vocabulary, awkward rows on request."""

from __future__ import annotations

import numpy as np

from storage_schemas.manifest import CacheIdentity, CaptureIdentity, Plan, ShardPlan, TeacherIdentity, TokenizerIdentity
from storage_schemas.records import SequenceTopK, sort_rows


def make_record(
    seed: int,
    *,
    tokens: int = 9,
    top_k: int = 4,
    vocab_size: int = 50,
    extras: tuple[str, ...] = (),
    spread: float = 3.0,
    zeros: bool = False,
    name: str | None = None,
) -> SequenceTopK:
    """Rows of a random full distribution, so that stored mass and tail sum to 1. spread 0 makes all ids equal;
    zeros gives some ids probability 0, which the last stored ones then are."""
    generator = np.random.default_rng(seed)
    width = min(vocab_size, top_k + 5)  # ids beyond these have probability 0
    logits = generator.normal(0, 1, (tokens, width)) * spread
    if zeros and width > 1:
        logits[:, width // 2 + 1 :] = -np.inf
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.stack([_sample_ids(generator, vocab_size, width) for _ in range(tokens)])
    top_ids, top_logprobs = sort_rows(ids, logprobs.astype(np.float32))
    rest = -np.sort(-logprobs, axis=1)[:, top_k:]
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(rest).sum(axis=1)) if rest.shape[1] else np.full(tokens, -np.inf)
    label = np.append(-generator.exponential(3, tokens - 1), np.nan)
    mask = generator.random(tokens) < 0.5
    mask[0] = False
    return SequenceTopK(
        sequence_id=name or f"0/{seed}/0",
        document_id=f"document-{seed}",
        token_ids=generator.integers(0, vocab_size, tokens).astype(np.int32),
        completion_mask=mask,
        top_ids=top_ids[:, :top_k].copy(),
        top_logprobs=top_logprobs[:, :top_k].copy(),
        log_tail_mass=tail.astype(np.float32),
        label_logprob=label.astype(np.float32),
        extras={name: generator.normal(size=tokens).astype(np.float32) for name in extras},
    )


def _sample_ids(generator: np.random.Generator, vocab_size: int, width: int) -> np.ndarray:
    if vocab_size <= 10_000:
        return generator.permutation(vocab_size)[:width]
    ids = np.unique(generator.integers(0, vocab_size, 2 * width))
    ids = np.unique(np.append(ids, [0, vocab_size - 1]))  # the ends of the range always
    return generator.permutation(ids)[:width]


def make_identity(**changes: object) -> CacheIdentity:
    """An identity for records of `make_record`'s defaults; `container`, `codec`, `top_k`, `vocab_size`, `extras`."""
    options = {"container": "arrow", "codec": "ld8", "top_k": 4, "vocab_size": 50, "extras": (), **changes}
    return CacheIdentity(
        teacher=TeacherIdentity(
            model="tiny",
            revision=None,
            weights_digest="0" * 64,
            dtype="float32",
            head_dtype="float32",
            quantization=None,
        ),
        tokenizer=TokenizerIdentity(digest="1" * 64, vocab_size=options["vocab_size"], template_digest=None),
        capture=CaptureIdentity(top_k=options["top_k"], extras=options["extras"]),
        codec=options["codec"],
        container=options["container"],
    )


def make_plan(shards: list[list[SequenceTopK]], **segment: object) -> Plan:
    """The plan that records in these shards would have come from, one document a record."""
    plans, start = [], 0
    for records in shards:
        plans.append(
            ShardPlan(
                start=start,
                stop=start + len(records),
                sequences=len(records),
                tokens=sum(map(len, records)),
                targets=sum(int(record.completion_mask.sum()) for record in records),
                digest="2" * 64,
            )
        )
        start += len(records)
    return Plan(segment={"dataset": "made up", **segment}, counts={}, digest="3" * 64, shards=tuple(plans))
