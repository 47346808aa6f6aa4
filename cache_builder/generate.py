"""The first stage of `build --generate`: the teacher answers prompts. The second is the ordinary build over answers.

The cache's own folder keeps them:

    generated/plan.json     what must agree for a build to go on: prompts, sampling, teacher; which prompts make a batch
    generated/00000.jsonl   one closed batch, a row a prompt: id, input_ids, completion_mask (the answer's tokens, its
                            end-of-turn token included, are targets) and finish_reason ("stop", "length"; "none" for a
                            prompt that is empty or leaves no room, whose input_ids are empty)

Each is created whole or not at all, and a batch that is there is not generated again. The answers are scored like any
other text, so there is one capture path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from tqdm import tqdm

from cache_builder.config import GenerateSettings
from cache_builder.corpus import Corpus, describe_segment
from cache_builder.engine import Answer, GeneratingEngine, Sampling
from cache_builder.generated_rows import GeneratedRows, is_row
from cache_builder.prompts import Prompt, Prompts
from cache_builder.teacher import Teacher
from storage_schemas.errors import CorruptShard, IdentityMismatch, RequestError
from storage_schemas.manifest import (
    SCHEMA_VERSION,
    Digest,
    Document,
    Scalar,
    describe_differences,
    flatten,
    parse_document,
)
from storage_schemas.storage import Storage

_FOLDER = "generated"
_PLAN = f"{_FOLDER}/plan.json"


class BatchPlan(Document):
    """Prompts [start, stop) of the dataset. digest: SHA-256 over their ids and tokens."""

    start: NonNegativeInt
    stop: PositiveInt
    digest: Digest


class GenerationPlan(Document):
    """generated/plan.json. segment: what the prompts, the sampling and the teacher are, flat.

    counts: prompts `dropped` for want of room, and `skipped` because they are empty.
    """

    format: Literal["logitcask"] = "logitcask"
    schema_version: PositiveInt = SCHEMA_VERSION
    segment: dict[str, Scalar]
    counts: dict[str, int]
    batches: tuple[BatchPlan, ...]


def find_stop_token_ids(teacher: Teacher, settings: GenerateSettings) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's end of sequence, those of generation_config.json (of the
    model's configuration where there is none), and the settings'."""
    from transformers import AutoConfig, GenerationConfig

    directory = Path(teacher.engine.model)
    if (directory / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(directory)
    else:
        trusted = teacher.engine.trust_remote_code
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trusted).get_text_config()
    found = {*settings.stop_token_ids}
    for own in (teacher.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        found |= set() if own is None else {own} if isinstance(own, int) else {*own}
    return tuple(sorted(found))


def describe_generation(
    prompts: Prompts, settings: GenerateSettings, stop_token_ids: Sequence[int], shard_tokens: int
) -> dict[str, Scalar]:
    """A segment's description as `describe_segment` makes it, of prompts, with everything that shapes the answers."""
    sampling: dict[str, Any] = {**settings.model_dump(), "stop_token_ids": ", ".join(map(str, stop_token_ids))}
    return {
        **describe_segment(prompts, shard_tokens),
        **{f"generate.{name}": value for name, value in sampling.items()},
    }


class Generation:
    """The answers to prompts in a cache's folder: those that are there, and those to come."""

    def __init__(
        self,
        prompts: Prompts,
        settings: GenerateSettings,
        teacher: Teacher,
        storage: Storage,
        segment: Mapping[str, Scalar],
        stop_token_ids: tuple[int, ...],
    ) -> None:
        """segment: what `describe_generation` gives. Raises IdentityMismatch naming what differs from what is there."""
        self.prompts = prompts
        self.settings = settings
        self.storage = storage
        self._stop_token_ids = stop_token_ids
        identity = {"teacher": teacher.identity.model_dump(), "tokenizer": teacher.tokenizer_identity.model_dump()}
        own = {name: value for name, value in segment.items() if name != "shard_tokens"}
        self._segment = {**own, **dict(flatten(identity))}
        self.plan = self._read_plan()

    def run(self, open_teacher: Callable[[], GeneratingEngine], worker: tuple[int, int], *, progress: bool) -> None:
        """Answer every prompt that has no answer yet. worker (i, n): the batches i, i + n … first, then those that no
        other builder has left meanwhile.

        Raises RequestError for prompts that cannot be answered, before the teacher is loaded or anything written.
        """
        plan = self.plan or self._make_plan(progress=progress)
        present = self.storage.sizes(_FOLDER)
        pending = [ordinal for ordinal in range(len(plan.batches)) if _batch_name(ordinal) not in present]
        if self.plan is None and present:
            raise RequestError(
                f"{self.storage.url}/{_FOLDER} holds answers without their plan.json, which said how they were made; "
                "restore it, or remove the folder"
            )
        if not pending:
            return
        engine = open_teacher()
        if self.plan is None and not self.storage.put_new(_PLAN, plan.to_json()):
            plan = self._read_plan() or plan  # another builder's, which is the same or refused
        self.plan = plan
        with tqdm(total=len(self.prompts), desc="answering", unit="prompt", disable=not progress) as bar:
            bar.update(len(self.prompts) - sum(plan.batches[at].stop - plan.batches[at].start for at in pending))
            for ordinal in sorted(pending, key=lambda ordinal: (ordinal - worker[0]) % worker[1] != 0):
                if not self._is_there(ordinal):
                    content = self._answer(plan.batches[ordinal], engine)
                    self.storage.put_new(_batch_name(ordinal), content)
                bar.update(plan.batches[ordinal].stop - plan.batches[ordinal].start)

    def open_corpus(self) -> Corpus:
        """The answered prompts as a corpus of input_ids; its rows are the prompts' rows."""
        changes = {"text_column": None, "id_column": "id", "chat_template": None, "empty_documents": "skip"}
        prompts = self.prompts
        settings = prompts.settings.model_copy(update=changes)
        rows = GeneratedRows(len(prompts), self.settings.batch_prompts, self.read_batch)
        return Corpus(rows, settings, prompts.tokenizer, prompts.vocab_size, digest=prompts.source_digest)

    def count(self) -> dict[str, int]:
        """Prompts dropped and skipped, and `unfinished` answers: those that no stop token ended."""
        assert self.plan is not None
        batches = (self.read_batch(ordinal) for ordinal in range(len(self.plan.batches)))
        unfinished = sum(row["finish_reason"] == "length" for batch in batches for row in batch)
        return {**self.plan.counts, "unfinished": unfinished}

    def read_batch(self, ordinal: int) -> list[dict[str, Any]]:
        """The rows of one batch. Raises CorruptShard where the file is damaged or missing."""
        assert self.plan is not None
        name, batch = _batch_name(ordinal), self.plan.batches[ordinal]
        try:
            rows = [json.loads(line) for line in self.storage.get(name).splitlines()]
            sound = len(rows) == batch.stop - batch.start and all(map(is_row, rows))
        except FileNotFoundError as error:
            raise CorruptShard(
                f"{self.storage.url}/{name} is missing; restore it, or build into a new cache"
            ) from error
        except ValueError:
            sound = False
        if not sound:
            raise CorruptShard(
                f"{self.storage.url}/{name} is damaged; restore it or, where no shard was built yet, delete it and run "
                "the same build again"
            )
        return rows

    def _is_there(self, ordinal: int) -> bool:
        return _batch_name(ordinal) in self.storage.sizes(_FOLDER)

    def _read_plan(self) -> GenerationPlan | None:
        try:
            plan = parse_document(GenerationPlan, self.storage.get(_PLAN), _PLAN)
        except (FileNotFoundError, NotADirectoryError):
            return None
        differences = describe_differences(plan.segment, self._segment)
        if differences:
            raise IdentityMismatch(
                f"the answers in {self.storage.url}/{_FOLDER} were begun with other settings "
                f"({'; '.join(differences)}); give the settings they were begun with, or choose another output"
            )
        return plan

    def _make_plan(self, *, progress: bool) -> GenerationPlan:
        counts, batches, size = {"dropped": 0, "skipped": 0}, [], self.settings.batch_prompts
        with tqdm(total=len(self.prompts), desc="tokenising", unit="prompt", disable=not progress) as bar:
            for start in range(0, len(self.prompts), size):
                stop = min(start + size, len(self.prompts))
                read = self.prompts.read(start, stop)
                counts["skipped"] += sum(len(prompt.token_ids) == 0 for prompt in read)
                counts["dropped"] += sum(len(prompt.token_ids) > 0 == self.prompts.room(prompt) for prompt in read)
                batches.append(BatchPlan(start=start, stop=stop, digest=_digest(read)))
                bar.update(stop - start)
        if sum(counts.values()) == len(self.prompts):
            raise RequestError(
                f"no prompt of {self.prompts.settings.dataset!r} can be answered: {counts['skipped']} are empty, "
                f"{counts['dropped']} leave no room within max_length = {self.prompts.settings.max_length}; raise it"
            )
        return GenerationPlan(segment=self._segment, counts=counts, batches=tuple(batches))

    def _answer(self, batch: BatchPlan, engine: GeneratingEngine) -> bytes:
        """The file of one batch."""
        prompts = self.prompts.read(batch.start, batch.stop)
        if _digest(prompts) != batch.digest:
            raise RequestError(
                f"prompts {batch.start} to {batch.stop - 1} of {self.prompts.settings.dataset!r} are not what they "
                "were when the answers were begun; restore the dataset, the tokenizer and the settings, or build a new "
                "cache"
            )
        asked = [prompt for prompt in prompts if self.prompts.room(prompt)]
        sampling = [self._sampling(prompt) for prompt in asked]
        answers = iter(engine.generate([prompt.token_ids for prompt in asked], sampling) if asked else ())
        rows = [_make_row(prompt, next(answers) if self.prompts.room(prompt) else None) for prompt in prompts]
        highest = max((max(row["input_ids"], default=0) for row in rows), default=0)
        if highest >= self.prompts.vocab_size:
            raise RequestError(
                f"the teacher wrote the id {highest}, outside the tokenizer's vocabulary of {self.prompts.vocab_size}: "
                "its padding is too large to be kept out; lower temperature or top_p"
            )
        return b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)

    def _sampling(self, prompt: Prompt) -> Sampling:
        settings = self.settings
        most = min(settings.max_tokens, self.prompts.room(prompt))
        return Sampling(
            max_tokens=most,
            min_tokens=min(settings.min_tokens, most),
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            seed=derive_seed(settings.seed, prompt.row),
            stop_token_ids=self._stop_token_ids,
        )


def derive_seed(seed: int, row: int) -> int:
    """The seed of one answer, 0 ≤ seed < 2⁶³: its own whatever stands beside it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:8], "big") >> 1


def _make_row(prompt: Prompt, answer: Answer | None) -> dict[str, Any]:
    if answer is None:
        return {"id": prompt.document_id, "input_ids": [], "completion_mask": [], "finish_reason": "none"}
    return {
        "id": prompt.document_id,
        "input_ids": [*prompt.token_ids.tolist(), *answer.token_ids.tolist()],
        "completion_mask": [0] * len(prompt.token_ids) + [1] * len(answer.token_ids),
        "finish_reason": answer.finish_reason,
    }


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.document_id, len(prompt.token_ids)]).encode())
        digest.update(prompt.token_ids.astype(np.dtype("<i4")).tobytes())
    return digest.hexdigest()


def _batch_name(ordinal: int) -> str:
    return f"{_FOLDER}/{ordinal:05d}.jsonl"
