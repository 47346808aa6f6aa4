"""Low-rank adapters around a student, by peft."""

from __future__ import annotations

from typing import Any

from distiller.config import LoraSettings
from storage_schemas.errors import RequestError


def add_lora(student: Any, settings: LoraSettings) -> Any:
    """The student with adapters, the only weights that train; RequestError where peft is missing or finds no module."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RequestError(
            f"expected the package peft for [lora], got: {error}; `pip install peft` or leave [lora] out"
        ) from error
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )
    try:
        return get_peft_model(student, config)
    except ValueError as error:
        raise RequestError(f"lora.target_modules does not fit this student: {str(error).splitlines()[0]}") from error
