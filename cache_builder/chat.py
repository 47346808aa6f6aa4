"""Conversations → text through a chat template, and which characters of it the assistant wrote."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_builder.corpus_settings import CorpusSettings
from storage_schemas.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, and the spans of characters [start, stop) that are targets."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """The template of a corpus: the tokenizer's own, or the file that replaces it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: CorpusSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._override = None if settings.chat_template is None else _read(settings.chat_template)
        if self._override is None and not tokenizer.chat_template:
            raise RequestError(
                f"the dataset {settings.dataset!r} holds conversations, but the tokenizer has no chat template; set "
                "chat_template to a Jinja file, or take a tokenizer that has one"
            )
        self._special_tokens = tuple(tokenizer.get_added_vocab())

    @property
    def digest(self) -> str:
        """`sha256:…` of the template's text."""
        text = json.dumps(self._override or self._tokenizer.chat_template, sort_keys=True)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def render(
        self,
        messages: Sequence[Message],
        label: str,
        *,
        prompt: Sequence[Message] = (),
        tools: list[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """Render prompt + messages; targets are the assistant's turns in `messages`.

        Their spans come from the template's generation markers. Without them they come from what the template adds:
        a turn lies between the rendering of all before it with a generation prompt, and the rendering that ends with
        it; both must be prefixes of the whole. Its end-of-turn token belongs to it, white space after that does not.
        Raises RequestError naming the document by `label`.
        """
        conversation = [*prompt, *messages]
        _check_messages(conversation, label)
        turn = _Rendering(self, conversation, label, tools, {**self._settings.chat_template_kwargs, **(kwargs or {})})
        if not turn.has_markers:
            text, _ = turn.through(len(conversation))
            return RenderedChat(text, turn.difference(text, len(prompt), self._special_tokens))
        text, spans = turn.through(len(conversation), track=True)
        start = len(turn.prefix(text, len(prompt), generation_prompt=True)) if prompt else 0
        return RenderedChat(text, tuple(span for span in spans if span[0] >= start))

    def render_prompt(
        self,
        messages: Sequence[Message],
        label: str,
        *,
        tools: list[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The messages, and the start of the assistant's turn that answers them. Raises RequestError as `render`."""
        _check_messages(messages, label)
        if messages[-1]["role"] not in ("user", "tool"):
            raise RequestError(
                f"{label}: expected messages that end with a user's turn, which the teacher answers, got a turn of "
                f"{messages[-1]['role']!r} at the end; take it out, or build without --generate"
            )
        merged = {**self._settings.chat_template_kwargs, **(kwargs or {})}
        return _Rendering(self, list(messages), label, tools, merged).through(len(messages), generation_prompt=True)[0]


@dataclass(frozen=True)
class _Rendering:
    """One conversation on its way through the template."""

    chat: ChatTemplate
    messages: list[Message]
    label: str
    tools: list[Any] | None
    kwargs: Mapping[str, Any]

    @property
    def template(self) -> str:
        return str(self.chat._tokenizer.get_chat_template(self.chat._override, self.tools))

    @property
    def has_markers(self) -> bool:
        return GENERATION_MARKER.search(self.template) is not None

    def through(self, count: int, *, generation_prompt: bool = False, track: bool = False) -> tuple[str, list[Span]]:
        """The first `count` messages as text, and the marked spans if they are to be tracked.

        This is what apply_chat_template renders with; called directly, it gives the spans in characters, which
        apply_chat_template only gives in tokens, and those wrongly where a span starts between two tokens.
        """
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[self.messages[:count]],
                tools=self.tools,
                chat_template=self.template,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=track,
                **{**self.chat._tokenizer.special_tokens_map, "strftime_now": self._today, **self.kwargs},
            )
        except RequestError:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(
                f"{self.label}: the chat template cannot render its messages ({error}); mend the document, or set "
                "chat_template to a template that takes it"
            ) from error
        return texts[0], spans[0] if track else []

    def prefix(self, text: str, count: int, *, generation_prompt: bool = False) -> str:
        """The rendering of the first `count` messages, which must be how `text` begins."""
        try:
            head, _ = self.through(count, generation_prompt=generation_prompt)
        except RequestError as error:
            if count:  # some templates cannot render an empty conversation
                raise
            raise self._not_prefix_preserving(count) from error
        if not text.startswith(head):
            raise self._not_prefix_preserving(count)
        return head

    def difference(self, text: str, first: int, special_tokens: tuple[str, ...]) -> tuple[Span, ...]:
        """The assistant's turns from message `first` on, by prefix differencing."""
        spans = []
        for index in range(first, len(self.messages)):
            if self.messages[index]["role"] != "assistant":
                continue
            start = len(self.prefix(text, index, generation_prompt=True))
            last = index + 1 == len(self.messages)
            turn = (text if last else self.prefix(text, index + 1))[start:]
            ended = turn.rstrip()
            if ended.endswith(special_tokens):  # else the white space itself is what ends the turn
                turn = ended
            spans.append((start, start + len(turn)))
        return tuple(spans)

    def _not_prefix_preserving(self, count: int) -> RequestError:
        return RequestError(
            f"{self.label}: the chat template is not prefix-preserving (what it makes of the first {count} messages is "
            "not how the whole conversation begins), so the assistant's tokens cannot be told; set chat_template to a "
            "template with {% generation %} markers"
        )

    def _today(self, format_: str) -> str:
        date = self.chat._settings.chat_template_date
        if date is None:
            raise RequestError(
                "the chat template asks for today's date, and a cache must not depend on the day it is made; set "
                "chat_template_date to the date it shall be told, such as 2025-01-31"
            )
        return date.strftime(format_)


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the chat template {path!r}: {error}; give the path of a Jinja file") from error


def _check_messages(messages: Sequence[Any], label: str) -> None:
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"{label}: expected messages with a role and a content, got {str(message)[:80]!r}; convert the column"
            )
