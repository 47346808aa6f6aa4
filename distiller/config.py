"""Every setting of `distiller train`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from storage_schemas.settings import Settings


class StudentSettings(Settings):
    """The model that learns."""

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What holds the weights and the optimiser's state; bf16 autocast is `training.bf16`."""
    attn_implementation: str | None = None
    freeze_embeddings: bool = False


class DataSettings(Settings):
    """What it learns from."""

    cache: str
    eval_cache: str | None = None
    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Hold out this fraction of the documents of `cache`, by a stable hash of their ids."""
    max_length: int | None = Field(default=None, ge=2)
    targets: Literal["completion", "all"] = "completion"
    packing: bool = False
    shuffle_window: int = Field(default=4, ge=1)
    """Shards whose sequences are shuffled among each other."""


class ObjectiveSettings(Settings):
    """The objective's name; every other key goes to the objective itself, which knows its own options."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    name: str = "taid"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TrainSettings(Settings):
    """All of it. `training` takes transformers' TrainingArguments under their own names."""

    output: str
    student: StudentSettings
    data: DataSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    training: dict[str, Any] = Field(default_factory=dict)
