"""What a cache is, for people and for scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from storage_schemas.manifest import flatten
from storage_schemas.reader import CacheReader

_SAMPLE = 2000
_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def inspect_cache(url: str) -> dict[str, Any]:
    """Identity, provenance, sizes in bytes, and over at most 2,000 sequences (seeded): the mean tail mass, the mean
    mass that the first 1, 2, 4 … ids hold, the teacher's perplexity of the tokens, the share that are targets."""
    cache = CacheReader.open(url)
    chosen = np.sort(np.random.default_rng(0).permutation(len(cache))[:_SAMPLE])
    tail, kept, label, targets = [], [], [], 0
    for i in chosen:
        record = cache.read(int(i))
        tail.append(np.exp(record.log_tail_mass))
        kept.append(np.exp(record.top_logprobs).cumsum(axis=1))
        label.append(record.label_logprob[:-1])
        targets += int(record.completion_mask.sum())
    kept_mass, top_k = np.concatenate(kept), cache.identity.capture.top_k
    files = {**cache.storage.sizes(), **cache.storage.sizes("shards")}
    total = sum(files.values())
    payload = sum(entry.file_bytes for entry in cache.manifest.shards)
    return {
        "identity": cache.identity.model_dump(mode="json"),
        "provenance": cache.provenance,
        "shards": len(cache.manifest.shards),
        "sequences": len(cache),
        "tokens": cache.token_count,
        "bytes": total,
        "bytes_per_token": total / cache.token_count,
        "shard_bytes_per_token": payload / cache.token_count,
        "top_k": top_k,
        "sampled_sequences": len(chosen),
        "mean_tail_mass": float(np.concatenate(tail).mean()),
        "retained_mass": {str(rank): float(kept_mass[:, rank - 1].mean()) for rank in _RANKS if rank <= top_k},
        "teacher_perplexity": float(np.exp(-np.concatenate(label).mean())) if sum(map(len, label)) else None,
        "target_share": targets / int(cache.lengths[chosen].sum()),
    }


def render_inspection(found: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    lines = [f"{name:32} {value}" for name, value in flatten(found["identity"]) if value is not None]
    lines += [f"{'provenance.' + name:32} {value}" for name, value in sorted(found["provenance"].items())]
    lines += [
        f"{'shards':32} {found['shards']:,}",
        f"{'sequences':32} {found['sequences']:,}",
        f"{'tokens':32} {found['tokens']:,}",
        f"{'bytes':32} {found['bytes']:,}",
        f"{'bytes per token':32} {found['bytes_per_token']:.1f} (shards alone {found['shard_bytes_per_token']:.1f})",
        f"{'targets':32} {found['target_share']:.1%} of the tokens",
        f"{'mean tail mass':32} {found['mean_tail_mass']:.4f}",
    ]
    lines += [f"{'mass of the first ' + rank:32} {mass:.4f}" for rank, mass in found["retained_mass"].items()]
    if found["teacher_perplexity"] is not None:
        lines.append(f"{'perplexity of the teacher':32} {found['teacher_perplexity']:.3f}")
    return "\n".join(lines)
