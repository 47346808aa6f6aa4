"""Documents → token ids and the targets among them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cache_builder.chat import ChatTemplate, Message, RenderedChat, Span
from cache_builder.columns import MASK_COLUMNS, Columns
from cache_builder.corpus_settings import CorpusSettings
from storage_schemas.errors import RequestError
from storage_schemas.records import Bool, Int32

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Int64 = NDArray[np.int64]
Row = Mapping[str, Any]

BATCH_CHARACTERS = 1 << 20
"""Text tokenised in one call; an encoding takes some hundred bytes a token."""
IGNORED_LABEL = -100
BYTE_LEVEL_SPACE = "Ġ"
"""How byte-level vocabularies write a space."""


@dataclass(frozen=True)
class RenderedDocument:
    """token_ids: [T] int32; completion_mask: [T] bool, False at index 0; both empty for an empty document.

    straddling: tokens that begin before a target span and reach into it, which makes them no targets.
    """

    token_ids: Int32
    completion_mask: Bool
    straddling: int = 0


class Renderer:
    """Rows of a corpus → rendered documents; what becomes of a row depends on nothing but the row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: Columns, settings: CorpusSettings) -> None:
        self._tokenizer = tokenizer
        self._columns = columns
        self._eos = tokenizer.eos_token_id
        self._added_tokens = int(tokenizer.num_special_tokens_to_add())
        self.appends_eos = settings.append_eos and not columns.chat and columns.format != "input_ids"
        self.chat = ChatTemplate(tokenizer, settings) if columns.chat else None
        if settings.chat_template is not None and self.chat is None:
            kind = " + ".join(columns.content)
            raise RequestError(f"chat_template is for messages, and {settings.dataset!r} holds {kind}; leave it out")
        if self.appends_eos and self._eos is None:
            raise RequestError("the tokenizer has no end-of-sequence token; set append_eos = false")
        if columns.format in ("messages", "prompt_completion"):
            if not tokenizer.is_fast:
                raise RequestError(
                    "conversations and prompt + completion need a fast tokenizer, which tells where each token lies in "
                    f"the text, and {type(tokenizer).__name__} is none; use a tokenizer with a tokenizer.json"
                )
            self._leading_spaces = _leading_spaces(tokenizer)

    def render(self, rows: Sequence[Row], labels: Sequence[str]) -> Iterator[RenderedDocument]:
        """One rendered document a row; `labels` name the rows in errors.

        Raises RequestError for rows that are not in the column format, and where the chat template fails.
        """
        if self._columns.format == "input_ids":
            return (self._take_ids(row, label) for row, label in zip(rows, labels, strict=True))
        if self._columns.format == "text":
            return self._render_text([self._text(row, 0, label) for row, label in zip(rows, labels, strict=True)])
        if self.chat is not None:
            return self._render_chats([self._chat(row, label) for row, label in zip(rows, labels, strict=True)])
        return self._render_pairs(
            [(self._text(row, 0, label), self._text(row, 1, label)) for row, label in zip(rows, labels, strict=True)]
        )

    def render_prompts(self, rows: Sequence[Row], labels: Sequence[str]) -> Iterator[Int32]:
        """The tokens [T] behind which the teacher answers each row of the format "prompt": messages with the start of
        the assistant's turn, strings as they are. Empty for an empty row; raises RequestError as `render`."""
        if self.chat is not None:
            texts = [self._chat_prompt(row, label) for row, label in zip(rows, labels, strict=True)]
            yield from (np.array(token_ids, dtype=np.int32) for token_ids, _ in self._encode(texts, special=False))
            return
        texts = [self._text(row, 0, label) for row, label in zip(rows, labels, strict=True)]
        for text, document in zip(texts, self._render_text(texts), strict=True):
            ids = document.token_ids
            ended = self._added_tokens and len(ids) > 1 and ids[-1] == self._eos
            # An end that the tokenizer puts behind every text would end the answer before it begins.
            yield ids[:-1] if ended and not text.endswith(self._tokenizer.eos_token) else ids

    def _chat_prompt(self, row: Row, label: str) -> str:
        assert self.chat is not None
        messages = _messages(row[self._columns.content[0]])
        tools = _parse(row.get("tools"), "tools", list, label)
        kwargs = _parse(row.get("chat_template_kwargs"), "chat_template_kwargs", dict, label)
        return self.chat.render_prompt(messages, label, tools=tools or None, kwargs=kwargs) if messages else ""

    def _text(self, row: Row, index: int, label: str) -> str:
        name = self._columns.content[index]
        value = row[name]
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{label}: expected a string in column {name!r}, got {type(value).__name__}; convert it")
        return value or ""

    def _chat(self, row: Row, label: str) -> RenderedChat:
        assert self.chat is not None
        parts = [_messages(row[name]) for name in self._columns.content]
        prompt, messages = parts if len(parts) == 2 else ([], parts[0])
        if not prompt and not messages:
            return RenderedChat("", ())
        tools = _parse(row.get("tools"), "tools", list, label)
        kwargs = _parse(row.get("chat_template_kwargs"), "chat_template_kwargs", dict, label)
        return self.chat.render(messages, label, prompt=prompt, tools=tools or None, kwargs=kwargs)

    def _render_text(self, texts: list[str]) -> Iterator[RenderedDocument]:
        for token_ids, _ in self._encode(texts, special=True):
            ids = np.array(token_ids, dtype=np.int32)
            yield self._finish(ids, np.ones(len(ids), dtype=np.bool_))

    def _render_pairs(self, pairs: list[tuple[str, str]]) -> Iterator[RenderedDocument]:
        """Prompt and completion are tokenised as the one text that a model reads; a token that covers the end of the
        one and the start of the other stays as it is, and is no target."""
        texts = [prompt + completion for prompt, completion in pairs]
        encoded = self._encode(texts, special=True)
        for (prompt, _), text, (token_ids, encoding) in zip(pairs, texts, encoded, strict=True):
            assert encoding is not None
            ids = np.array(token_ids, dtype=np.int32)
            starts, ends = self._extents(encoding, ids, len(text))
            straddling = _count_straddling(starts, ends, [(len(prompt), len(text))])
            yield self._finish(ids, starts >= len(prompt), straddling)

    def _render_chats(self, chats: list[RenderedChat]) -> Iterator[RenderedDocument]:
        encoded = self._encode([chat.text for chat in chats], special=False)
        for chat, (token_ids, encoding) in zip(chats, encoded, strict=True):
            assert encoding is not None
            ids = np.array(token_ids, dtype=np.int32)
            starts, ends = self._extents(encoding, ids, len(chat.text))
            bounds = np.array(chat.spans, dtype=np.int64).reshape(-1)
            inside = np.searchsorted(bounds, starts, side="right") % 2 == 1
            yield _document(ids, inside, _count_straddling(starts, ends, chat.spans))

    def _take_ids(self, row: Row, label: str) -> RenderedDocument:
        ids = np.asarray(row[self._columns.content[0]] or (), dtype=np.int64)
        mask = np.ones(len(ids), dtype=np.bool_)
        for name in self._columns.beside:
            values = row[name]
            if values is None:
                continue
            if len(values) != len(ids):
                raise RequestError(
                    f"{label}: {name} has {len(values)} entries for {len(ids)} input_ids; mend the document"
                )
            if name in MASK_COLUMNS:
                mask &= np.asarray(values) != (IGNORED_LABEL if name == "labels" else 0)
            elif not all(values):
                raise RequestError(f"{label}: its input_ids are padded (attention_mask has zeros); save them unpadded")
        if len(ids) and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
            raise RequestError(
                f"{label}: input_ids reach from {ids.min()} to {ids.max()}; expected ids of the tokenizer"
            )
        return _document(ids.astype(np.int32), mask)

    def _encode(self, texts: list[str], *, special: bool) -> Iterator[tuple[list[int], Encoding | None]]:
        """Each text's ids and, from a fast tokenizer, its encoding; in calls of about `BATCH_CHARACTERS`."""
        start = 0
        while start < len(texts):
            stop, characters = start + 1, len(texts[start])
            while stop < len(texts) and characters + len(texts[stop]) <= BATCH_CHARACTERS:
                characters += len(texts[stop])
                stop += 1
            encoded = self._tokenizer(
                texts[start:stop],
                add_special_tokens=special,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # else it warns of texts longer than the model's context, which overflow settles
            )
            yield from zip(encoded["input_ids"], encoded.encodings or [None] * (stop - start), strict=True)
            start = stop

    def _extents(self, encoding: Encoding, ids: Int32, length: int) -> tuple[Int64, Int64]:
        """Where each token starts and ends in the text, [T] each; what the tokenizer added is at -1 or at `length`."""
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets[:, 0], offsets[:, 1]
        if self._leading_spaces is not None:
            spaces = self._leading_spaces[ids]
            before = np.concatenate(([0], ends[:-1]))  # a space that the tokenizer put in front is not in the text
            starts = np.where(spaces > 0, np.maximum(starts - spaces, before), starts)
        if self._added_tokens:
            own = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
            first, last = (int(own[0]), int(own[-1])) if len(own) else (len(ids), len(ids))
            starts[:first], ends[:first] = -1, -1
            starts[last + 1 :], ends[last + 1 :] = length, length
        return starts, ends

    def _finish(self, ids: Int32, mask: Bool, straddling: int = 0) -> RenderedDocument:
        """Without the special token that the tokenizer adds where the text has it already; then the end of sequence."""
        if len(ids) <= self._added_tokens:
            return _document(ids[:0], mask[:0])
        if self._added_tokens and len(ids) > 1:
            if ids[0] == ids[1] == self._tokenizer.bos_token_id:
                ids, mask = ids[1:], mask[1:]
            if ids[-1] == ids[-2:][0] == self._eos:
                ids, mask = ids[:-1], mask[:-1]
        if self.appends_eos and ids[-1] != self._eos:
            ids, mask = np.append(ids, np.int32(self._eos)), np.append(mask, True)
        return _document(ids, mask, straddling)


def _document(ids: Int32, mask: Bool, straddling: int = 0) -> RenderedDocument:
    mask = mask.copy()
    mask[:1] = False  # nothing predicts the first token
    return RenderedDocument(ids, mask, straddling)


def _count_straddling(starts: Int64, ends: Int64, spans: Sequence[Span]) -> int:
    return sum(int(np.count_nonzero((starts < start) & (ends > start))) for start, stop in spans if start < stop)


def _leading_spaces(tokenizer: PreTrainedTokenizerBase) -> Int64 | None:
    """[ids] spaces at the start of each token, where a tokenizer leaves them out of a token's offsets; else None.

    A byte-level post-processor with `trim_offsets` does: " there" would seem to start after its space, and a token
    that begins in the prompt to lie in the completion.
    """
    processor = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"])
    if '"trim_offsets": true' not in processor:
        return None
    vocabulary = tokenizer.get_vocab()
    spaces = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, token_id in vocabulary.items():
        spaces[token_id] = len(token) - len(token.lstrip(BYTE_LEVEL_SPACE))
    return spaces


def _messages(value: list[Message] | None) -> list[Message]:
    return [_without_nulls(message, keep=("content",)) for message in value or ()]


def _parse(value: Any, name: str, kind: type, label: str) -> Any:
    """A column that holds a structure, or the structure as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RequestError(f"{label}: {name} is no JSON ({error}); mend the document") from error
    else:
        value = _without_nulls(value)
    if value is not None and not isinstance(value, kind):
        raise RequestError(f"{label}: expected a {kind.__name__} in {name}, got {str(value)[:80]!r}; mend the document")
    return value


def _without_nulls(value: Any, keep: tuple[str, ...] = ()) -> Any:
    """Without the keys that are null: Arrow gives every struct of a column all keys that any of them has, and templates
    ask whether a key is there."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key in keep}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
