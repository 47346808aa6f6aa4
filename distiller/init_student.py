"""A student from a model's own layers: fewer of them, everything else kept."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distiller.student import load_config, load_student, load_tokenizer
from storage_schemas.errors import RequestError

_LAYER_NUMBERS = ("mlp_only_layers", "full_attention_layers", "attn_layer_indices", "full_attn_idxs")
"""Configuration keys that list layers by number; other lists as long as the model has layers hold a value for each."""

_NOT_PER_LAYER = ("token", "architectures")
"""Parts of keys whose lists may be as long by chance."""

_CHECK_TOKENS = 12
_CHECK_TOLERANCE = 1e-5
"""The written student computes the same float32 operations as the sliced model: only the kernels' choice may differ."""


@dataclass(frozen=True)
class SlicedModel:
    """What was made: the layers kept, of how many, and parameters before and after."""

    layers: tuple[int, ...]
    model_layers: int
    parameters: int
    model_parameters: int


def init_student(
    model_path: str, output: str, *, keep_layers: int | None = None, layers: str | None = None
) -> SlicedModel:
    """Write an ordinary checkpoint of `model_path` with some of its layers, its tokenizer and generation settings.

    Exactly one of keep_layers (how many, spread evenly, first and last included) and layers (like "0,2,5-9"). The
    result is loaded again and must give the same logits as the sliced model. Raises RequestError.
    """
    if (keep_layers is None) == (layers is None):
        raise RequestError("expected exactly one of --keep-layers and --layers; for example --keep-layers 15")
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(f"expected an output directory that is new or empty, got {output}; name another")
    tokenizer = load_tokenizer(model_path)
    stored = getattr(load_config(model_path), "dtype", None)
    model = load_student(model_path, dtype="float32")
    name, modules = find_layers(model)
    count = len(modules)
    kept = spread_layers(count, keep_layers) if keep_layers is not None else parse_layers(layers or "", count)
    before = sum(p.numel() for p in model.parameters())
    _slice(model, name, kept)
    expected = _logits(model)
    after = sum(p.numel() for p in model.parameters())
    partial = target.parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if isinstance(stored, torch.dtype) and stored.is_floating_point:
            model = model.to(stored)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        written = _logits(load_student(str(partial), dtype="float32"))
        gap = float((written - expected).abs().max() / expected.abs().max().clamp_min(1e-9))
        if not gap <= _CHECK_TOLERANCE:
            raise RequestError(
                f"expected the student written from layers {_numbers(kept)} to compute what they do, got logits "
                f"that differ by {gap:.2g} of their range; this architecture ({type(model).__name__}) depends on layer "
                "numbers in a way that is not supported"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return SlicedModel(kept, count, after, before)


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The one ModuleList that holds the decoder layers, with its name; RequestError where there is no single one."""
    count = int(model.config.get_text_config().num_hidden_layers)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(layer) for layer in module}) <= 2
    ]
    outermost = [
        (name, module) for name, module in found if not any(name.startswith(f"{other}.") for other, _ in found)
    ]
    if len(outermost) != 1:
        raise RequestError(
            f"expected one list of {count} layers in {type(model).__name__}, found {len(outermost)}; "
            "only decoder-only models with all layers in one list can be cut"
        )
    return outermost[0]


def spread_layers(count: int, keep: int) -> tuple[int, ...]:
    """`keep` of `count` layers, evenly spread, first and last included."""
    if not 2 <= keep <= count:
        raise RequestError(
            f"expected --keep-layers between 2 and {count}, the model's layers, got {keep}; choose one of those"
        )
    return tuple((2 * i * (count - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep))  # rounded, in integers


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """The layers of a list like "0,2,5-9": ascending, each once, all within the model."""
    kept: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise RequestError(f"expected layers like 0,2,5-9, got {text!r}; {part.strip()!r} is no number or range")
        first = int(match[1])
        kept.extend(range(first, int(match[2] or first) + 1))
    if not kept or kept != sorted(set(kept)) or kept[-1] >= count:
        raise RequestError(
            f"expected ascending layer numbers from 0 to {count - 1}, each once, got {text!r}; correct --layers"
        )
    return tuple(kept)


def _slice(model: Any, name: str, kept: Sequence[int]) -> None:
    modules = model.get_submodule(name)
    count = len(modules)
    parent, _, attribute = name.rpartition(".")
    sliced = nn.ModuleList([modules[i] for i in kept])
    setattr(model.get_submodule(parent), attribute, sliced)
    for index, layer in enumerate(sliced):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    config = model.config.get_text_config()
    for key, value in list(vars(config).items()):
        if not isinstance(value, (list, tuple)) or any(part in key for part in _NOT_PER_LAYER):
            continue
        if key in _LAYER_NUMBERS:
            setattr(config, key, [new for new, old in enumerate(kept) if old in value])
        elif len(value) == count:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    model.eval()
    tokens = torch.arange(min(_CHECK_TOKENS, int(model.config.get_text_config().vocab_size)))[None]
    return model(input_ids=tokens, use_cache=False).logits.float()  # type: ignore[no-any-return]


def _numbers(kept: Sequence[int]) -> str:
    return ", ".join(str(i) for i in kept)
