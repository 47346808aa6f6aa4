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


class GenerateSettings(Settings):
    """The `[generate]` table: how the teacher answers prompts, under the names of vLLM's SamplingParams.

    A prompt and its answer are one sequence of at most `corpus.max_length` tokens: an answer is cut to what its prompt
    leaves of them. A prompt that leaves no room is refused, or dropped and counted with `corpus.overflow = "drop"`.
    """

    max_tokens: int = Field(default=512, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 is all ids."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    seed: int = 0
    """Each answer's own seed is derived from this one and the number of its row."""
    stop_token_ids: tuple[int, ...] = ()
    """What ends an answer beside the end-of-sequence tokens of the tokenizer and of generation_config.json."""
    batch_prompts: int = Field(default=1024, ge=1)
    """Prompts answered in one closed batch, which is one file; what is lost when a build is killed."""

    @model_validator(mode="after")
    def _most_is_not_below_least(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        return self


class BuildSettings(Settings):
    """All of it: `[engine]`, `[corpus]`, `[cache]` and, where the teacher is to answer prompts, `[generate]`."""

    engine: EngineSettings
    corpus: CorpusSettings
    cache: CacheSettings
    generate: GenerateSettings | None = None
