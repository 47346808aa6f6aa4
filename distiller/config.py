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
    """Several whole sequences in a row of `max_length` tokens, kept apart by their position ids."""
    shuffle_window: int = Field(default=4, ge=1)
    """Shards whose sequences are shuffled among each other."""


class ObjectiveSettings(Settings):
    """The objective's name; every other key goes to the objective itself, which knows its own options."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    name: str = "taid"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class LoraSettings(Settings):
    """Low-rank adapters in place of full training; they are merged into the student that is written. Needs peft."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class EarlyStoppingSettings(Settings):
    """Stop when held-out KL has not fallen by `threshold` nats in `patience` evaluations."""

    patience: int = Field(ge=1)
    threshold: float = Field(default=0.0, ge=0)


class TrainSettings(Settings):
    """All of it. `training` takes transformers' TrainingArguments under their own names."""

    output: str
    student: StudentSettings
    data: DataSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    lora: LoraSettings | None = None
    early_stopping: EarlyStoppingSettings | None = None
    training: dict[str, Any] = Field(default_factory=dict)
