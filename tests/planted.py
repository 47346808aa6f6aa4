"""A teacher whose next-token distribution is known from the current token alone: whoever is off by one is found out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from storage_schemas.records import SequenceTopK


def make_planted_teacher(path: Path, tokenizer: PreTrainedTokenizerFast, *, padding: int = 0) -> np.ndarray:
    """Save a float32 Llama whose layers add nothing, so that row i depends on token i and on nothing before it.

    Returns the table [V, V] float64: the log-probabilities after each token, over the tokenizer's V ids. `padding`
    further ids of the model are likely everywhere, and belong to no token.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size, width = len(tokenizer), 64
    config = LlamaConfig(
        vocab_size=size + padding,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generator = np.random.default_rng(7)
    embedding = generator.normal(size=(size + padding, width)).astype(np.float32)
    following = generator.permutation(size)  # the token that most likely follows each one
    head = np.zeros_like(embedding)
    head[following] = embedding[:size] / np.sqrt(width)
    head[size:] = embedding[:padding] * 0.02
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.from_numpy(embedding))
        model.lm_head.weight.copy_(torch.from_numpy(head))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    exact = embedding.astype(np.float64)
    hidden = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + config.rms_norm_eps)
    logits = (hidden @ head.astype(np.float64).T)[:size, :size]
    table = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    assert (table.argmax(axis=1) == following).all()
    return table


def assert_planted(record: SequenceTopK, table: np.ndarray, *, atol: float, tail_atol: float | None = None) -> None:
    """Every row is the table's row of the token at its position."""
    rows = table[record.token_ids]
    order = np.argsort(-rows, axis=1, kind="stable")
    expected = np.take_along_axis(rows, order, axis=1)[:, : record.top_k]
    np.testing.assert_allclose(record.top_logprobs, expected, atol=atol)
    # The ids at their own values, so that a near tie may stand in either order.
    np.testing.assert_allclose(np.take_along_axis(rows, record.top_ids.astype(np.int64), axis=1), expected, atol=atol)
    assert (record.top_ids[:, 0] == order[:, 0]).all()
    labels = rows[np.arange(len(record) - 1), record.token_ids[1:]]
    np.testing.assert_allclose(record.label_logprob[:-1], labels, atol=atol)
    assert np.isnan(record.label_logprob[-1])
    tail = np.logaddexp.reduce(np.take_along_axis(rows, order, axis=1)[:, record.top_k :], axis=1)
    np.testing.assert_allclose(record.log_tail_mass, tail, atol=atol if tail_atol is None else tail_atol)
