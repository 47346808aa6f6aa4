"""A student: its weights and tokenizer, and where its logits come from."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from distiller.head import TeacherRows, distillation_loss, student_rows
from distiller.objectives import Objective
from storage_schemas.errors import RequestError
from storage_schemas.manifest import CacheIdentity, tokenizer_digest

_PROBE_TOKENS = 8
_PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far hidden × head may stray from the model's own logits, relative to their largest: rounding, not mathematics."""


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap · tanh(scale · (hidden × weightᵀ + bias) / softcap); the tanh only where a softcap is set."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_softcap: float | None
    logit_scale: float

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that head.py takes beside hidden states, weight and teacher."""
        return {"bias": self.bias, "logit_softcap": self.logit_softcap, "logit_scale": self.logit_scale}


def load_student(path: str, *, dtype: str = "float32", attn_implementation: str | None = None) -> Any:
    """The model of a directory or the hub in the dtype that holds its weights; RequestError where there is none."""
    _require_checkpoint(path)
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **extra)
    except (OSError, ValueError, ImportError) as error:
        raise RequestError(f"expected a causal language model in {path}, got: {_first_line(error)}") from error


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a directory or hub model; RequestError where there is none."""
    _require_checkpoint(path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise RequestError(
            f"expected the student's tokenizer in {path}, got: {_first_line(error)}; copy the teacher's there"
        ) from error


def load_config(path: str) -> Any:
    """The configuration of a directory or hub model; RequestError where there is none."""
    _require_checkpoint(path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"expected a model in {path}, got: {_first_line(error)}") from error


def check_compatible(identity: CacheIdentity, tokenizer: Any, config: Any, path: str) -> None:
    """Refuse a student whose ids do not mean what the cache's mean.

    Output rows beyond the tokenizer's vocabulary are padding and are masked; fewer than it are refused.
    """
    cached = identity.tokenizer
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    digest = tokenizer_digest(vocabulary)
    if digest != cached.digest:
        raise RequestError(
            f"expected a student with the cache's tokenizer (digest {cached.digest[:12]}…, {cached.vocab_size} ids), "
            f"got {path} with digest {digest[:12]}…, {len(vocabulary)} ids; use a student with the teacher's tokenizer "
            "or build a cache with a teacher that has the student's"
        )
    rows = int(config.get_text_config().vocab_size)
    if rows < cached.vocab_size:
        raise RequestError(
            f"expected a student with {cached.vocab_size} output rows or more, one per id, got {rows} in {path}; "
            f"resize its embeddings to {cached.vocab_size}"
        )


def check_length(config: Any, max_length: int, path: str) -> None:
    """Refuse sequences longer than the student's positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < max_length:
        raise RequestError(
            f"expected sequences of at most {limit} tokens for {path}, got {max_length}; set --max-length {limit}"
        )


def inner_model(model: Any) -> Any:
    """The transformers model inside a PEFT one, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def output_head(model: Any) -> OutputHead:
    """The output layer of a causal language model, with the scaling and capping that its configuration names."""
    model = inner_model(model)
    layer = model.get_output_embeddings()
    if layer is None or not isinstance(getattr(layer, "weight", None), torch.Tensor):
        raise RequestError(
            f"expected a model with an output layer, got {type(model).__name__}; use a causal language model"
        )
    config = model.config.get_text_config()
    scale = 1.0
    for name, power in (("logit_scale", 1), ("logits_scaling", -1), ("lm_head_multiplier", 1)):
        value = getattr(config, name, None)
        if value is not None:
            scale *= float(value) ** power
    softcap = getattr(config, "final_logit_softcapping", None)
    return OutputHead(layer.weight, getattr(layer, "bias", None), None if softcap is None else float(softcap), scale)


def freeze_embeddings(model: Any) -> int:
    """Freeze the input embedding and, where it is tied, the output layer with it; returns the parameters frozen."""
    weight = inner_model(model).get_input_embeddings().weight
    weight.requires_grad_(False)
    return int(weight.numel())


def hidden_states(model: Any, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states [B, T, d] of the base model, without a key-value cache and without logits.

    Without an attention mask, the position ids alone separate the documents of a packed row.
    """
    base = model.base_model
    known = inspect.signature(base.forward).parameters
    passed = {name: value for name, value in tokens.items() if name in known or name != "position_ids"}
    return base(**passed, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def install_loss(model: Any, objective: Objective, vocab_size: int, *, chunk_rows: int | None = None) -> None:
    """Let the student's own forward compute the loss, so that whatever wraps it (DDP, FSDP, autocast) sees it happen.

    With `row_index` and `teacher` in the call, forward returns {"loss_sum", "sums"}, or per-row figures with
    `measure=True`; without them it is what it was. The model stays itself: tied weights save as before.
    """
    inner = inner_model(model)
    _check_head(inner)
    original = inner.forward

    def forward(
        self: Any,
        *args: Any,
        row_index: torch.Tensor | None = None,
        teacher: Mapping[str, Any] | None = None,
        measure: bool = False,
        **kwargs: Any,
    ) -> Any:
        if row_index is None or teacher is None:
            return original(*args, **kwargs)
        tokens = {
            name: kwargs[name]
            for name in ("input_ids", "attention_mask", "position_ids")
            if kwargs.get(name) is not None
        }
        hidden = hidden_states(self, tokens)
        rows = hidden.reshape(-1, hidden.shape[-1])[row_index]
        head = output_head(self)
        if measure:
            return student_rows(rows, head.weight, TeacherRows(**teacher), vocab_size=vocab_size, **head.arguments())
        if len(row_index) == 0:  # a batch without targets: no loss, but every rank still reduces every gradient
            objective.sit_out(hidden.device)
            nothing = hidden.sum() * 0.0 + head.weight.sum() * 0.0
            return {"loss_sum": nothing, "sums": {}}
        output = distillation_loss(
            rows,
            head.weight,
            TeacherRows(**teacher),
            objective,
            vocab_size=vocab_size,
            chunk_rows=chunk_rows,
            **head.arguments(),
        )
        return {"loss_sum": output.loss_sum, "sums": output.sums}

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    inner.forward = MethodType(forward, inner)


@torch.no_grad()
def _check_head(model: Any) -> None:
    """Refuse a model whose logits are not what its output layer makes of its hidden states.

    A model may scale, cap or split its logits in ways that no configuration key names; a wrong guess would train
    silently on other logits than the model has.
    """
    head = output_head(model)
    if head.weight.is_meta or head.weight.dim() != 2:
        return  # sharded or offloaded: nothing to compare with
    training = model.training
    model.eval()
    count = min(_PROBE_TOKENS, head.weight.shape[0])
    tokens = {"input_ids": torch.arange(count, device=head.weight.device)[None]}
    expected = model(**tokens, use_cache=False).logits.float()
    logits = nn.functional.linear(hidden_states(model, tokens), head.weight, head.bias).float() * head.logit_scale
    if head.logit_softcap is not None:
        logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
    model.train(training)
    scale = max(float(expected.abs().max()), 1e-6)
    gap = float((expected - logits).abs().max()) / scale
    tolerance = _PROBE_TOLERANCE.get(head.weight.dtype, 5e-2)
    if not (math.isfinite(gap) and gap <= tolerance):
        raise RequestError(
            f"expected logits that are the output layer of the last hidden states, got a {type(model).__name__} "
            f"whose own logits differ by {gap:.2g} of their range; this architecture is not supported"
        )


def _require_checkpoint(path: str) -> None:
    """A relative name that is no directory is left to transformers, which takes it for a hub model."""
    local = Path(path)
    if not local.is_dir():
        if not (local.is_absolute() or path.startswith(".") or local.exists()):
            return
        raise RequestError(
            f"expected a hub name or a directory with a model, got {path}; make one with `distiller init-student`"
        )
    if not (local / "config.json").is_file():
        raise RequestError(f"expected config.json in {path}, found none; give the directory of a saved model")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
