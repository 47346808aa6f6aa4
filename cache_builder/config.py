"""Every setting of `cache-builder build`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cache_builder.corpus_settings import CorpusSettings
from cache_builder.engine_settings import EngineSettings
from storage_schemas.settings import Settings


class CacheSettings(Settings):
    """The `[cache]` table: where the cache goes and what it keeps."""

    output: str = Field(min_length=1)
    top_k: int = Field(default=64, ge=1)
    extras: tuple[Literal["entropy", "log_rest_sqrt_sum"], ...] = ()
    codec: str = "ld8"
    format: Literal["arrow", "zarr"] = "arrow"
    shard_tokens: int = Field(default=131072, ge=1)
    """A shard is closed when it holds this many tokens; it is also one batch of the teacher."""


class BuildSettings(Settings):
    """All of it: `[engine]`, `[corpus]`, `[cache]`."""

    engine: EngineSettings
    corpus: CorpusSettings
    cache: CacheSettings
