"""Prompts that the teacher is to answer: a dataset whose rows end where an answer would begin."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache_builder.columns import find_prompt_columns, make_document_id
from cache_builder.corpus import find_digest
from cache_builder.corpus_settings import CorpusSettings
from cache_builder.rendering import Renderer
from cache_builder.source import open_dataset
from storage_schemas.errors import RequestError
from storage_schemas.records import Int32

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """token_ids: [T] int32, empty where the row is; row: its number in the dataset."""

    row: int
    document_id: str
    token_ids: Int32


class Prompts:
    """Prompts with random access: a column `prompt` of strings or messages, or `messages` that end with a user's turn.

    Strings are continued as they are; messages are rendered with the start of the assistant's turn.
    """

    appends_eos = False

    def __init__(
        self,
        dataset: Dataset,
        settings: CorpusSettings,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        digest: str | None = None,
    ) -> None:
        """Prompts of rows that are open already; `digest` is their source's. Arguments and errors as in `open`."""
        schema = {field.name: field.type for field in dataset.features.arrow_schema}
        self.columns = find_prompt_columns(schema, settings)
        self.settings = settings
        self.source_digest = digest
        if "completion" in schema:
            warnings.warn("the column 'completion' is not read: the teacher answers the prompts", stacklevel=2)
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._dataset = dataset.select_columns(
            list(dict.fromkeys((*self.columns.used, self.columns.id_column or self.columns.used[0])))
        )
        self._renderer = Renderer(tokenizer, self.columns, settings.model_copy(update={"append_eos": False}))

    @classmethod
    def open(cls, settings: CorpusSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Prompts:
        """Open the source and find its column; nothing is tokenised yet.

        Raises RequestError for an unknown source, split or column, an empty dataset, or conversations for which the
        tokenizer has no template.
        """
        digest = find_digest(settings)
        return cls(open_dataset(settings, digest), settings, tokenizer, vocab_size, digest)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def template_digest(self) -> str | None:
        """Of the chat template in use; None where there is none."""
        return None if self._renderer.chat is None else self._renderer.chat.digest

    def read(self, start: int, stop: int) -> list[Prompt]:
        """The prompts of the rows [start, stop), a pure function of each row.

        Raises RequestError for a row that has no prompt in it, unless empty ones are skipped, or that does not end
        where an answer would begin; and for one without room for an answer, unless such are dropped.
        """
        columns = self._dataset[start:stop]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        ids = [make_document_id(self.columns, row, number) for number, row in enumerate(rows, start)]
        labels = [f"document {number} (id {name})" for number, name in enumerate(ids, start)]
        rendered = self._renderer.render_prompts(rows, labels)
        prompts = []
        for number, (name, label, token_ids) in enumerate(zip(ids, labels, rendered, strict=True), start):
            self._check(token_ids, label)
            prompts.append(Prompt(number, name, token_ids))
        return prompts

    def room(self, prompt: Prompt) -> int:
        """Tokens that an answer can have; none for an empty prompt."""
        return max(0, self.settings.max_length - len(prompt.token_ids)) if len(prompt.token_ids) else 0

    def _check(self, token_ids: Int32, label: str) -> None:
        settings = self.settings
        if len(token_ids) == 0 and settings.empty_documents == "error":
            raise RequestError(f'{label} is empty; take it out of the dataset, or set empty_documents = "skip"')
        if len(token_ids) >= settings.max_length and settings.overflow != "drop":
            raise RequestError(
                f"{label}: its prompt of {len(token_ids)} tokens leaves no room for an answer within max_length = "
                f'{settings.max_length}; raise max_length, or set overflow = "drop"'
            )
        if len(token_ids) and token_ids.max() >= self.vocab_size:
            raise RequestError(
                f"{label}: its token ids reach to {token_ids.max()}, outside the vocabulary of {self.vocab_size}"
            )
