"""Whether a student keeps the documents of a packed row apart."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from distiller.student import hidden_states, inner_model
from storage_schemas.errors import RequestError

_LENGTHS = (5, 7, 4)
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Relative to the largest hidden state; a leak shows as a tenth or more of it."""


def wants_flat_rows(model: Any) -> bool:
    """Whether the attention kernel separates packed documents only in a single row, as the flash kernels do."""
    return "flash" in str(getattr(inner_model(model).config, "_attn_implementation", ""))


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Refuse a model that lets a document of a packed row see its neighbours.

    A packed row carries only position ids that start anew with each document. Attention in transformers reads the
    borders from them; recurrent and convolutional layers, and models without position ids, do not.
    """
    model = inner_model(model)
    remedy = "set data.packing=false for this student"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise RequestError(
            f"expected a model that takes position ids to pack rows, got {type(model).__name__}; {remedy}"
        )
    weight = model.get_input_embeddings().weight
    if weight.is_meta:
        return
    training = model.training
    model.eval()
    vocab_size = int(model.config.get_text_config().vocab_size)
    documents = [(torch.arange(n, device=weight.device) * 7 + n) % vocab_size for n in _LENGTHS]
    positions = [torch.arange(n, device=weight.device) for n in _LENGTHS]
    packed = {"input_ids": torch.cat(documents)[None], "position_ids": torch.cat(positions)[None]}
    together = hidden_states(model, packed)[0].float()
    apart = torch.cat([hidden_states(model, {"input_ids": document[None]})[0] for document in documents]).float()
    model.train(training)
    gap = float((together - apart).abs().max() / apart.abs().max().clamp_min(1e-6))
    if not gap <= _TOLERANCE.get(weight.dtype, 6e-2):
        raise RequestError(
            f"expected a model that keeps packed documents apart, got {type(model).__name__}, whose states change "
            f"by {gap:.2g} of their range; {remedy}"
        )
