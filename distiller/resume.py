"""Where a run starts: anew, or exactly where a killed one left off."""

from __future__ import annotations

import json
import logging
import os
import tomllib
from pathlib import Path
from typing import Any

from distiller.config import TrainSettings
from storage_schemas.errors import RequestError
from storage_schemas.manifest import flatten
from storage_schemas.reader import CacheReader

logger = logging.getLogger(__name__)

SETTINGS_NAME = "train.toml"
PROVENANCE_NAME = "provenance.json"

MAY_DIFFER = (
    "output",
    "data.cache",  # its content is compared instead: a cache may have moved
    "data.eval_cache",
    "student.path",
    "early_stopping.",
    "training.dataloader_",
    "training.eval_",
    "training.load_best_model_at_end",
    "training.logging_",
    "training.report_to",
    "training.run_name",
    "training.save_",
)
"""Settings, or beginnings of their names, that do not change what a step computes."""


def find_start(settings: TrainSettings, cache: CacheReader, resume: bool) -> str | None:
    """The last complete checkpoint of the run to resume, or None for a new run, which needs a new or empty directory.

    Raises RequestError where a resumed run would not be the one that was begun.
    """
    output = Path(settings.output)
    if not resume:
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
        if taken and os.environ.get("RANK", "0") == "0":  # another rank may come after the first has begun to write
            raise RequestError(
                f"expected an output directory that is new or empty, got {output}; name another or give --resume"
            )
        return None
    stored = output / SETTINGS_NAME
    if stored.is_file():
        check_same_run(settings, cache, output)
    checkpoint = last_complete_checkpoint(output)
    if checkpoint is None:
        logger.warning("no complete checkpoint in %s: starting from the beginning", output)
        return None
    return str(checkpoint)


def check_same_run(settings: TrainSettings, cache: CacheReader, output: Path) -> None:
    """Refuse to go on with other settings or another cache than the run was begun with."""
    begun = dict(flatten(tomllib.loads((output / SETTINGS_NAME).read_text(encoding="utf-8"))))
    asked = dict(flatten(settings.model_dump(mode="json", exclude_none=True)))
    differences = [
        f"{name}: the run has {begun.get(name)!r}, asked for {asked.get(name)!r}"
        for name in sorted(begun.keys() | asked.keys())
        if begun.get(name) != asked.get(name) and not name.startswith(MAY_DIFFER)
    ]
    provenance = json.loads((output / PROVENANCE_NAME).read_text(encoding="utf-8"))
    if provenance["cache"]["manifest_digest"] != cache.manifest.digest:
        differences.append(f"the cache: its manifest is not the one of {provenance['cache']['url']}")
    if differences:
        raise RequestError(
            f"expected the settings that {output} was begun with to resume it, got others ({'; '.join(differences)}); "
            "give those or name another output"
        )


def last_complete_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint whose last-written file, trainer_state.json, is whole; a kill leaves newer ones torn."""
    found = sorted(
        (path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()),
        key=lambda path: int(path.name.removeprefix("checkpoint-")),
        reverse=True,
    )
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is incomplete, as a killed run leaves it: skipped", path)
            continue
        return path
    return None


def provenance(cache: CacheReader) -> dict[str, Any]:
    """What the run was made of besides its settings: the cache's identity and the versions at work."""
    from importlib.metadata import version

    return {
        "cache": {
            "url": cache.url,
            "manifest_digest": cache.manifest.digest,
            "sequences": len(cache),
            "tokens": cache.token_count,
            "identity": cache.identity.model_dump(mode="json"),
        },
        "versions": {name: version(name) for name in ("logitcask", "torch", "transformers", "accelerate")},
    }
