"""Which columns of a dataset make a document, in TRL's formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from cache_builder.corpus_settings import CorpusSettings
from storage_schemas.errors import RequestError

Format = Literal["text", "messages", "prompt_completion", "input_ids", "prompt"]

MASK_COLUMNS = ("completion_mask", "assistant_masks", "labels")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Columns:
    """The format, the columns that hold the document (`chat`: as messages), and those `beside` them that shape its
    rendering or its mask."""

    format: Format
    content: tuple[str, ...]
    chat: bool
    beside: tuple[str, ...] = ()
    id_column: str | None = None

    @property
    def used(self) -> tuple[str, ...]:
        """Every column that decides what a document is; the id is not among them."""
        return (*self.content, *self.beside)


def find_columns(schema: Mapping[str, pa.DataType], settings: CorpusSettings) -> Columns:
    """The columns to read, by the settings or, without them, by TRL's names in TRL's precedence.

    Raises RequestError naming the columns there are.
    """
    there = f"the dataset {settings.dataset!r} has the columns {', '.join(schema)}"
    for setting in ("text_column", "id_column"):
        name = getattr(settings, setting)
        if name is not None and name not in schema:
            raise RequestError(f"there is no column {name!r}: {there}; set {setting} to one of them")
    format_, content = _choose(schema, settings, there)
    chat = format_ in ("messages", "prompt_completion") and not _is_text(schema[content[0]])
    beside: tuple[str, ...] = TEMPLATE_COLUMNS if chat else ()
    if format_ == "input_ids":
        beside = (*MASK_COLUMNS, "attention_mask")
    return Columns(format_, content, chat, tuple(name for name in beside if name in schema), settings.id_column)


def find_prompt_columns(schema: Mapping[str, pa.DataType], settings: CorpusSettings) -> Columns:
    """The column whose rows the teacher is to answer: the settings' text_column, else `prompt`, else `messages`.

    Raises RequestError naming the columns there are.
    """
    there = f"the dataset {settings.dataset!r} has the columns {', '.join(schema)}"
    names = [settings.text_column] if settings.text_column is not None else ["prompt", "messages"]
    name = next((name for name in names if name in schema), None)
    if name is None:
        raise RequestError(f"expected a column of prompts, {' or '.join(names)}: {there}; set text_column")
    if _format_of(schema[name]) not in ("text", "messages"):
        raise RequestError(f"the column {name!r} holds {schema[name]}, neither text nor messages; set text_column")
    if settings.id_column is not None and settings.id_column not in schema:
        raise RequestError(f"there is no column {settings.id_column!r}: {there}; set id_column to one of them")
    chat = not _is_text(schema[name])
    beside = tuple(column for column in TEMPLATE_COLUMNS if chat and column in schema)
    return Columns("prompt", (name,), chat, beside, settings.id_column)


def make_document_id(columns: Columns, row: Mapping[str, Any], number: int) -> str:
    """The id in the row's id column or, without one, a hash of what the document is.

    number: of the row, for errors. Raises RequestError where the id is missing.
    """
    if columns.id_column is None:
        content = {name: row[name] for name in columns.used}
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    value = row[columns.id_column]
    if value is None or value == "":
        raise RequestError(
            f"document {number} has no id in column {columns.id_column!r}; fill it, or leave id_column out"
        )
    return str(value)


def _choose(schema: Mapping[str, pa.DataType], settings: CorpusSettings, there: str) -> tuple[Format, tuple[str, ...]]:
    if settings.text_column is not None:
        name = settings.text_column
        format_ = _format_of(schema[name])
        if format_ is None:
            raise RequestError(
                f"the column {name!r} holds {schema[name]}, which is no text, messages or input_ids: {there}"
            )
        return format_, (name,)
    if "prompt" in schema and "completion" in schema and "input_ids" not in schema:
        formats = {_format_of(schema["prompt"]), _format_of(schema["completion"])}
        if formats not in ({"text"}, {"messages"}):
            raise RequestError(
                f"expected prompt and completion to be both strings or both message lists, they are {schema['prompt']} "
                f"and {schema['completion']}; convert them, or set text_column"
            )
        return "prompt_completion", ("prompt", "completion")
    expected: tuple[Format, ...] = ("input_ids", "messages", "text")
    for name in expected:
        if name in schema:
            if _format_of(schema[name]) != name:
                raise RequestError(
                    f"the column {name!r} holds {schema[name]}, which is no {name}; set text_column or convert it"
                )
            return name, (name,)
    raise RequestError(
        f"expected a column text, messages or input_ids, or the two prompt and completion: {there}; set text_column"
    )


def _format_of(kind: pa.DataType) -> Format | None:
    """What a column of a type can hold; the type of null, of a column without values, passes for text."""
    if _is_text(kind):
        return "text"
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return None
    if pa.types.is_integer(kind.value_type):
        return "input_ids"
    # datasets keeps messages of various keys as JSON, an extension type
    nested = pa.types.is_struct(kind.value_type) or isinstance(kind.value_type, pa.BaseExtensionType)
    return "messages" if nested or pa.types.is_null(kind.value_type) else None


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )
