"""The `[corpus]` table: which documents to read and how to make sequences of them."""

from __future__ import annotations

import datetime
from typing import Any, Literal

from pydantic import Field

from storage_schemas.settings import Settings


class CorpusSettings(Settings):
    """One source of documents and its rendering. Column formats are TRL's: `text`, `messages`,
    `prompt` + `completion` (strings or message lists), `input_ids`."""

    dataset: str = Field(min_length=1)
    """A hub name, or a local file, directory (also one of `save_to_disk`) or glob; or one of datasets' own loaders
    (`json`, `parquet`, `csv`, `text`, `arrow`) with `data_files`."""
    subset: str | None = None
    split: str = "train"
    """May carry datasets' slices: `train[:1%]`."""
    revision: str | None = None
    data_files: str | tuple[str, ...] | None = None
    sample_by: Literal["line", "paragraph", "document"] | None = None
    """What is one document of a text file; datasets' default is a line."""
    max_documents: int | None = Field(default=None, ge=1)

    text_column: str | None = None
    """The one column to read, of text, messages or ids; None detects TRL's formats."""
    id_column: str | None = None
    """A stable document id; None takes a hash of the document's content."""

    max_length: int = Field(ge=2)
    """Tokens of a sequence at most."""
    overflow: Literal["split", "truncate", "drop"] = "split"
    """What becomes of a document that is longer: pieces, its head, or nothing."""
    append_eos: bool = True
    """End `text` and plain `prompt` + `completion` with the tokenizer's end-of-sequence token, as TRL does. Chat
    templates end their turns themselves, and `input_ids` are taken as they are."""
    empty_documents: Literal["error", "skip"] = "error"

    chat_template: str | None = None
    """Path of a Jinja template, in place of the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    chat_template_date: datetime.date | None = None
    """What a template that asks for today's date is told; without it such a template is refused, for a cache must
    not depend on the day it was made."""
