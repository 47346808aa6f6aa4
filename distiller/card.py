"""The model card that a trained student carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomli_w

from distiller.config import TrainSettings

_ROWS = (
    ("kl", "KL to the teacher (nats per target)"),
    ("perplexity", "perplexity"),
    ("top1_agreement", "top-1 agreement"),
)


def model_card(settings: TrainSettings, summary: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """README.md of the student: where it comes from, down to the cache's identity, and what was measured."""
    cache, identity = provenance["cache"], provenance["cache"]["identity"]
    teacher, capture = identity["teacher"], identity["capture"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [distillation, logitcask]",
        "---",
        "",
        f"# A student of {teacher['model']}",
        "",
        f"Distilled with the objective `{settings.objective.name}` from a cache of the top {capture['top_k']} "
        f"log-probabilities over {cache['tokens']:,} tokens; {summary['steps']:,} optimiser steps.",
        "",
        "| cache | |",
        "|---|---|",
        f"| teacher | {teacher['model']}, revision {teacher['revision'] or 'none'}, {teacher['dtype']} |",
        f"| teacher's weights | `{teacher['weights_digest']}` |",
        f"| tokenizer | {identity['tokenizer']['vocab_size']:,} ids, `{identity['tokenizer']['digest']}` |",
        f"| stored | top {capture['top_k']}, {capture['normalization']}, codec {identity['codec']} |",
        f"| manifest | `{cache['manifest_digest']}` |",
    ]
    measured = [(f"held_out_{name}", f"start_{name}", words) for name, words in _ROWS if f"held_out_{name}" in summary]
    if measured:
        lines += ["", "| held out | before | after |", "|---|---|---|"]
        lines += [
            f"| {words} | {_number(summary[start])} | {_number(summary[end])} |" for end, start, words in measured
        ]
        lines += ["", f"The teacher's own perplexity there is {_number(summary['held_out_teacher_perplexity'])}."]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    table = settings.model_dump(mode="json", exclude_none=True)
    lines += ["", "Settings:", "", "```toml", tomli_w.dumps(table).strip(), "```", "", f"Made with {versions}.", ""]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
