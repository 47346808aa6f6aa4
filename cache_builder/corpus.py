"""A corpus: any `datasets` source as tokenised sequences with stable ids and masks."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cache_builder.columns import Columns, find_columns, make_document_id
from cache_builder.corpus_plan import CorpusCounts, CorpusPlan, plan_shards, serialise_sequence
from cache_builder.corpus_settings import CorpusSettings
from cache_builder.rendering import RenderedDocument, Renderer
from cache_builder.source import find_local, open_dataset, source_digest
from storage_schemas.errors import RequestError
from storage_schemas.manifest import ShardPlan
from storage_schemas.records import TokenSequence

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Corpus",
    "CorpusCounts",
    "CorpusPlan",
    "CorpusSettings",
    "describe_segment",
    "plan_shards",
    "source_digest",
]

BATCH_DOCUMENTS = 64
"""Rows read at once."""


class Corpus:
    """Documents with random access; `Corpus.open` makes one of settings alone.

    Memory does not grow with the corpus: rows stay in the memory map of `datasets`.
    """

    def __init__(
        self,
        dataset: Dataset,
        settings: CorpusSettings,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        segment: int = 0,
        digest: str | None = None,
    ) -> None:
        """A corpus of rows that are open already; `digest` is their source's. Arguments and errors as in `open`.

        Of the dataset it uses `features.arrow_schema`, `select_columns`, `len` and slices.
        """
        schema = dataset.features.arrow_schema
        self.columns = find_columns({field.name: field.type for field in schema}, settings)
        self.settings = settings
        self.source_digest = digest
        names = dict.fromkeys((*self.columns.used, self.columns.id_column or self.columns.used[0]))
        self._dataset = dataset.select_columns(list(names))
        self._renderer = Renderer(tokenizer, self.columns, settings)
        self._vocab_size = vocab_size
        self._segment = segment

    @classmethod
    def open(
        cls, settings: CorpusSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int, segment: int = 0
    ) -> Corpus:
        """Open the source and find its columns; nothing is tokenised yet.

        vocab_size: ids below it are the teacher's. segment: the number in front of every sequence id.
        Raises RequestError for an unknown source, split or column, an empty dataset, or conversations for which the
        tokenizer has no template.
        """
        digest = find_digest(settings)
        return cls(open_dataset(settings, digest), settings, tokenizer, vocab_size, segment, digest)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def template_digest(self) -> str | None:
        """Of the chat template in use; None where there is none."""
        return None if self._renderer.chat is None else self._renderer.chat.digest

    @property
    def appends_eos(self) -> bool:
        """Whether this corpus's documents are ended with the tokenizer's end-of-sequence token."""
        return self._renderer.appends_eos

    def render(self, row: int) -> list[TokenSequence]:
        """The sequences of one document, a pure function of its row; none if it is dropped or skipped.

        Raises RequestError for an empty document (unless skipped), ids outside the vocabulary, or messages that cannot
        be rendered.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)}")
        return next(self.documents(row, row + 1))

    def documents(self, start: int, stop: int, counts: CorpusCounts | None = None) -> Iterator[list[TokenSequence]]:
        """What `render` gives for each of the rows [start, stop), in batches underneath; adds to `counts`."""
        counts = counts if counts is not None else CorpusCounts()
        for first in range(start, stop, BATCH_DOCUMENTS):
            columns = self._dataset[first : min(first + BATCH_DOCUMENTS, stop)]
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            numbers = range(first, first + len(rows))
            ids = [make_document_id(self.columns, row, number) for row, number in zip(rows, numbers, strict=True)]
            labels = [f"document {number} (id {name})" for number, name in zip(numbers, ids, strict=True)]
            rendered = self._renderer.render(rows, labels)
            for number, name, label, document in zip(numbers, ids, labels, rendered, strict=True):
                yield self._cut(document, number, name, label, counts)

    def sequences(self, shard: ShardPlan) -> list[TokenSequence]:
        """The sequences of a shard, in order; raises RequestError when they are no longer those of the plan."""
        sequences = [piece for pieces in self.documents(shard.start, shard.stop) for piece in pieces]
        digest = hashlib.sha256()
        for sequence in sequences:
            digest.update(serialise_sequence(sequence))
        if digest.hexdigest() != shard.digest:
            raise RequestError(
                f"documents {shard.start} to {shard.stop - 1} of {self.settings.dataset!r} are not what they were when "
                "the plan was made; restore the dataset, the tokenizer and the settings, or build into a new cache"
            )
        return sequences

    def _cut(
        self, document: RenderedDocument, row: int, document_id: str, label: str, counts: CorpusCounts
    ) -> list[TokenSequence]:
        ids, mask, length = document.token_ids, document.completion_mask, self.settings.max_length
        counts.documents += 1
        if len(ids) == 0:
            if self.settings.empty_documents == "error":
                raise RequestError(
                    f'{label} has no tokens; take it out of the dataset, or set empty_documents = "skip"'
                )
            counts.skipped += 1
            return []
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise RequestError(
                f"{label}: its token ids reach from {ids.min()} to {ids.max()}, outside the vocabulary of "
                f"{self._vocab_size}; tokenise it with the teacher's tokenizer"
            )
        if len(ids) > length and self.settings.overflow == "drop":
            counts.dropped += 1
            counts.tokens_lost += len(ids)
            return []
        if len(ids) > length and self.settings.overflow == "truncate":
            counts.truncated += 1
            counts.tokens_lost += len(ids) - length
            ids, mask = ids[:length], mask[:length]
        pieces = []
        for number, start in enumerate(range(0, len(ids), length)):
            targets = mask[start : start + length].copy()
            targets[0] = False  # the token before it is in another sequence
            name = f"{self._segment}/{row}/{number}"
            pieces.append(TokenSequence(name, document_id, ids[start : start + length], targets))
        targets_found = sum(int(piece.completion_mask.sum()) for piece in pieces)
        counts.split += len(pieces) > 1
        counts.sequences += len(pieces)
        counts.tokens += len(ids)
        counts.targets += targets_found
        counts.targetless += targets_found == 0
        counts.straddling_tokens += document.straddling
        return pieces


def find_digest(settings: CorpusSettings) -> str | None:
    """`source_digest`, with a warning where the hub could not be asked."""
    digest = source_digest(settings)
    if digest is None:
        warnings.warn(
            f"the hub could not be asked for the commit of {settings.dataset!r}; that it has changed will only be "
            "noticed when a shard is rendered; set revision to a commit",
            stacklevel=3,
        )
    return digest


class Source(Protocol):
    """What is known of documents before they are read: a corpus, or prompts that have no answers yet."""

    settings: CorpusSettings
    columns: Columns
    source_digest: str | None

    def __len__(self) -> int: ...

    @property
    def template_digest(self) -> str | None: ...

    @property
    def appends_eos(self) -> bool: ...


def describe_segment(corpus: Source, shard_tokens: int) -> dict[str, Any]:
    """What defines a segment of a cache, flat and by names a person knows; a resumed build must find it unchanged.

    source_digest is None where the hub could not be asked: unknown, not different.
    """
    settings, columns = corpus.settings, corpus.columns
    local = find_local(settings) is not None
    return {
        "dataset": Path(settings.dataset).expanduser().resolve().name if local else settings.dataset,
        "source_digest": corpus.source_digest,
        "subset": settings.subset,
        "split": settings.split,
        "sample_by": settings.sample_by,
        "max_documents": settings.max_documents,
        "documents": len(corpus),
        "format": columns.format,
        "columns": ", ".join(columns.used),
        "id_column": columns.id_column,
        "max_length": settings.max_length,
        "overflow": settings.overflow,
        "append_eos": corpus.appends_eos,
        "empty_documents": settings.empty_documents,
        "chat_template_digest": corpus.template_digest,
        "chat_template_kwargs": json.dumps(settings.chat_template_kwargs, sort_keys=True, default=str)
        if columns.chat
        else None,
        "chat_template_date": str(settings.chat_template_date or "") if columns.chat else None,
        "shard_tokens": shard_tokens,
    }
