"""A real cache of a tiny teacher, written the way a builder writes one."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storage_schemas.manifest import (
    CacheIdentity,
    CaptureIdentity,
    Plan,
    ShardPlan,
    TeacherIdentity,
    TokenizerIdentity,
    tokenizer_digest,
)
from storage_schemas.reader import CacheReader
from storage_schemas.records import SequenceTopK, sort_rows
from storage_schemas.writer import CacheWriter

VOCABULARY = {f"token-{i}": i for i in range(61)}
CODEC = "ld16"


@torch.no_grad()
def score(
    model: Any,
    name: str,
    token_ids: Sequence[int],
    mask: Sequence[bool],
    *,
    top_k: int,
    vocab_size: int,
    entropy: bool = False,
) -> SequenceTopK:
    """The teacher's rows of one sequence, from its full float32 logits."""
    tokens = torch.tensor([list(token_ids)])
    log_p = model(input_ids=tokens, use_cache=False).logits[0].double()[:, :vocab_size].log_softmax(-1)
    values, ids = log_p.topk(top_k)
    top_ids, top_logprobs = sort_rows(ids.numpy(), values.float().numpy())
    rest = log_p.exp().scatter(1, ids, 0.0).sum(-1).log()
    label = torch.full((len(token_ids),), float("nan"), dtype=torch.float64)
    label[:-1] = log_p[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    return SequenceTopK(
        sequence_id=name,
        document_id=name.split("#")[0],
        token_ids=np.array(token_ids, np.int32),
        completion_mask=np.array(mask, bool),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        log_tail_mass=rest.float().numpy(),
        label_logprob=label.float().numpy(),
        extras={"entropy": -(log_p.exp() * log_p).sum(-1).float().numpy()} if entropy else {},
    )


def write_cache(
    path: Path,
    model: Any,
    *,
    lengths: Sequence[int] = (12, 7, 16, 9, 5, 14, 10, 8),
    shards: int = 2,
    top_k: int = 8,
    vocabulary: dict[str, int] | None = None,
    prompt: int = 2,
    seed: int = 0,
    codec: str = CODEC,
    entropy: bool = False,
) -> CacheReader:
    """A sealed cache of random sequences of these lengths, spread over `shards` shards in order; the first `prompt`
    tokens of each are no targets."""
    vocabulary = VOCABULARY if vocabulary is None else vocabulary
    vocab_size = len(vocabulary)
    identity = CacheIdentity(
        teacher=TeacherIdentity(
            model="tiny",
            revision=None,
            weights_digest="0" * 64,
            dtype="float32",
            head_dtype="float32",
            quantization=None,
        ),
        tokenizer=TokenizerIdentity(digest=tokenizer_digest(vocabulary), vocab_size=vocab_size, template_digest=None),
        capture=CaptureIdentity(top_k=top_k, extras=("entropy",) if entropy else ()),
        codec=codec,
        container="arrow",
    )
    generator = np.random.default_rng(seed)
    records = []
    for i, length in enumerate(lengths):
        tokens = generator.integers(3, vocab_size, length).tolist()
        mask = [position >= prompt for position in range(length)]
        records.append(
            score(model, f"doc-{seed}-{i}", tokens, mask, top_k=top_k, vocab_size=vocab_size, entropy=entropy)
        )
    writer = CacheWriter.open(str(path), identity)
    bounds = np.linspace(0, len(records), shards + 1).round().astype(int)
    parts = [records[a:b] for a, b in itertools.pairwise(bounds)]
    plan = Plan(
        segment={"source": "test", "seed": seed},
        counts={},
        digest="0" * 64,
        shards=tuple(
            ShardPlan(
                start=int(a),
                stop=int(b),
                sequences=len(part),
                tokens=sum(len(record) for record in part),
                targets=sum(int(record.completion_mask.sum()) for record in part),
                digest=hashlib.sha256(bytes(str(a), "ascii")).hexdigest(),
            )
            for a, b, part in zip(bounds[:-1], bounds[1:], parts, strict=True)
        ),
    )
    writer.store_plan(plan)
    for ordinal, part in enumerate(parts):
        writer.commit(ordinal, part)
    writer.seal(plan)
    return CacheReader.open(str(path))
