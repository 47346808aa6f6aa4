"""Random models of several architectures, a few thousand weights each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB_SIZE = 61

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_student(architecture: str = "llama", *, seed: int = 0, attention: str = "sdpa", **changes: Any) -> Any:
    """A float32 model in training mode; its logits are far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _make(architecture, {**_SHAPE, **changes})
    model.set_attn_implementation(attention)
    return model


def _make(architecture: str, shape: dict[str, Any]) -> Any:
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    if architecture == "llama-tied":
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    if architecture == "qwen2":
        windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
        return Qwen2ForCausalLM(Qwen2Config(**{**shape, **windows}))
    if architecture == "gemma2":
        caps = {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 4.0}
        return Gemma2ForCausalLM(Gemma2Config(**{**shape, **caps}))
    if architecture == "granite":
        return GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=3.0))
    if architecture == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64, "vocab_size": shape["vocab_size"]}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **ids, initializer_range=0.3))
    raise ValueError(architecture)


def make_tokenizer() -> Any:
    """Whole words "token-0" … "token-60": the vocabulary of `teacher_cache.VOCABULARY`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"token-{i}": i for i in range(VOCAB_SIZE)}, unk_token="token-0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="token-0", eos_token="token-2")
