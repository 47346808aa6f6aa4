"""A planted tokenizer, whose every token is known by hand, and documents rendered with it."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cache_builder import corpus_plan
from cache_builder.columns import find_columns
from cache_builder.corpus import Corpus
from cache_builder.corpus_settings import CorpusSettings
from cache_builder.rendering import RenderedDocument, Renderer
from storage_schemas.records import TokenSequence
from tests.conftest import TINY_VOCAB_SIZE

WORDS = (
    *("system", "user", "assistant", "hi", "yo", "more", "ok", "be", "nice", "the", "sky", "is", "blue", "ask", "tell"),
    *("<think>", "</think>", "a", "b", "2025", "[TOOLS]"),
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops what an assistant thought in all turns but the last, as reasoning models' templates do.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DIALOGUE: list[dict[str, Any]] = [
    {"role": "system", "content": "be nice"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo yo"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "ok"},
]
DIALOGUE_MARKED = (
    "<|im_start|>system\nbe nice<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    "<|im_start|>assistant\n«yo»« »«yo»«<|im_end|>»\n<|im_start|>user\nmore<|im_end|>\n"
    "<|im_start|>assistant\n«ok»«<|im_end|>»\n"
)


def make_tokenizer(template: str | None = CHATML, *, prefix: str = "", suffix: str = "") -> PreTrainedTokenizerFast:
    """Words, single spaces and newlines are one token each, so that every character lies in a known token.

    prefix, suffix: special tokens that it adds to a text by itself.
    """
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, " ", "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| |\S+"), "isolated")
    if prefix or suffix:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*prefix.split(), "$A", *suffix.split()]),
            special_tokens=[(token, vocabulary[token]) for token in f"{prefix} {suffix}".split()],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=4,  # far less than any text here: the corpus's own max_length rules
    )
    fast.chat_template = template
    return fast


def make_renderer(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], **settings: Any) -> Renderer:
    schema = pa.Table.from_pylist(rows).schema
    chosen = CorpusSettings(dataset="planted", max_length=64, **settings)
    columns = find_columns({field.name: field.type for field in schema}, chosen)
    return Renderer(tokenizer, columns, chosen)


def render(tokenizer: PreTrainedTokenizerBase, *rows: dict[str, Any], **settings: Any) -> list[RenderedDocument]:
    # Arrow makes the rows what a dataset's are: every struct has every key.
    rows = tuple(pa.Table.from_pylist(list(rows)).to_pylist())
    renderer = make_renderer(tokenizer, list(rows), **settings)
    return list(renderer.render(rows, [f"document {number}" for number in range(len(rows))]))


def mark(tokenizer: PreTrainedTokenizerFast, document: RenderedDocument) -> str:
    assert document.token_ids.dtype == np.int32
    assert document.completion_mask.dtype == np.bool_
    assert document.token_ids.shape == document.completion_mask.shape
    assert not document.completion_mask[:1].any()
    tokens = tokenizer.convert_ids_to_tokens(document.token_ids.tolist())
    return "".join(f"«{token}»" if hit else token for token, hit in zip(tokens, document.completion_mask, strict=True))


def marked(tokenizer: PreTrainedTokenizerFast, *rows: dict[str, Any], **settings: Any) -> list[str]:
    return [mark(tokenizer, document) for document in render(tokenizer, *rows, **settings)]


def make_corpus(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, segment: int = 0, **fields: Any
) -> Corpus:
    chosen = CorpusSettings(dataset="planted", **{"max_length": 8, **fields})
    return Corpus(datasets.Dataset.from_list(rows), chosen, tokenizer, TINY_VOCAB_SIZE, segment)


def ids_of(*counts: int) -> list[dict[str, Any]]:
    """Documents of so many tokens; all ids of all documents differ as far as the vocabulary goes."""
    values = iter(np.arange(sum(counts)) % TINY_VOCAB_SIZE)
    return [{"input_ids": [int(next(values)) for _ in range(count)]} for count in counts]


def everything(corpus: Corpus) -> list[TokenSequence]:
    return [piece for row in range(len(corpus)) for piece in corpus.render(row)]


def same(left: list[TokenSequence], right: list[TokenSequence]) -> bool:
    return [corpus_plan.serialise_sequence(item) for item in left] == [
        corpus_plan.serialise_sequence(item) for item in right
    ]
