"""Every setting of `cache-builder build`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

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
    worker: str = Field(default="0/1", pattern="^[0-9]+/[1-9][0-9]*$")
    """i/n takes every n-th shard from the i-th on, 0 ≤ i < n; who finishes last seals."""

    @property
    def worker_of(self) -> tuple[int, int]:
        """(i, n)."""
        i, n = map(int, self.worker.split("/"))
        return i, n

    @model_validator(mode="after")
    def _worker_is_one_of_n(self) -> Self:
        i, n = self.worker_of
        if i >= n:
            raise ValueError(f"worker {self.worker} is not one of {n}: expected 0/{n} to {n - 1}/{n}")
        return self


class BuildSettings(Settings):
    """All of it: `[engine]`, `[corpus]`, `[cache]`."""

    engine: EngineSettings
    corpus: CorpusSettings
    cache: CacheSettings
