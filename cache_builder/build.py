"""documents → cache: the main flow, top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from types import MappingProxyType

from tqdm import tqdm

from cache_builder.config import BuildSettings
from cache_builder.corpus import Corpus, describe_segment, plan_shards
from cache_builder.engine import Capture, GeneratingEngine, TeacherEngine
from cache_builder.generate import Generation, describe_generation, find_stop_token_ids
from cache_builder.open_engine import open_engine
from cache_builder.prompts import Prompts
from cache_builder.teacher import Teacher, find_teacher
from storage_schemas.codecs import get_codec
from storage_schemas.errors import RequestError
from storage_schemas.manifest import CacheIdentity, CaptureIdentity, Plan, Scalar
from storage_schemas.records import SequenceTopK
from storage_schemas.writer import CacheWriter


@dataclass(frozen=True)
class BuildResult:
    """What a build did. bytes: of every file of the cache. seconds: of this run, the engine's start included."""

    output: str
    sealed: bool
    shards_built: int
    shards: int
    sequences: int
    tokens: int
    bytes: int
    seconds: float
    counts: dict[str, int]

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


def run(settings: BuildSettings, *, progress: bool = True) -> BuildResult:
    """Build the cache that the settings describe, or what is missing of it.

    Raises RequestError for settings that cannot be met, IdentityMismatch where the output holds another cache; neither
    changes what is there.
    """
    started = time.monotonic()
    get_codec(settings.cache.codec)
    teacher = find_teacher(settings.engine)
    identity = _identify(settings, teacher)
    writer = CacheWriter.open(settings.cache.output, identity)
    with ExitStack() as stack:

        @functools.cache
        def load_teacher() -> GeneratingEngine:
            """Loaded when it is first needed: a build with nothing to do loads none."""
            capture = Capture(identity.capture.top_k, identity.tokenizer.vocab_size, identity.capture.extras)
            longest = teacher.engine.max_model_len or settings.corpus.max_length
            engine = open_engine(teacher.engine.model_copy(update={"max_model_len": longest}), capture)
            stack.callback(engine.close)
            writer.record_provenance({**engine.provenance(), **_arguments(settings)})
            return engine

        if settings.generate is None:
            corpus, plan = _find_plan(writer, settings, teacher, progress=progress)
        else:
            corpus, plan = _generate(writer, settings, teacher, load_teacher, progress=progress)
        worker, workers = settings.cache.worker_of
        pending = [ordinal for ordinal in writer.pending(plan) if ordinal % workers == worker]
        if pending:
            _score_shards(writer, corpus, plan, pending, load_teacher(), progress=progress)
    sealed = writer.seal(plan) is not None
    return BuildResult(
        output=settings.cache.output,
        sealed=sealed,
        shards_built=len(pending),
        shards=len(plan.shards),
        sequences=plan.sequences,
        tokens=plan.tokens,
        bytes=writer.total_bytes(),
        seconds=time.monotonic() - started,
        counts=plan.counts,
    )


def _identify(settings: BuildSettings, teacher: Teacher) -> CacheIdentity:
    if settings.cache.top_k > teacher.tokenizer_identity.vocab_size:
        raise RequestError(
            f"expected top_k of at most the vocabulary's {teacher.tokenizer_identity.vocab_size} ids, "
            f"got {settings.cache.top_k}; 64 is usual"
        )
    return CacheIdentity(
        teacher=teacher.identity,
        tokenizer=teacher.tokenizer_identity,
        capture=CaptureIdentity(top_k=settings.cache.top_k, extras=tuple(sorted(settings.cache.extras))),
        codec=settings.cache.codec,
        container=settings.cache.format,
    )


def _arguments(settings: BuildSettings) -> dict[str, str]:
    """The resolved settings, less where the cache goes: a copy of a cache is the same cache."""
    return {
        "logitcask": version("logitcask"),
        "arguments": settings.model_dump_json(exclude={"cache": {"output", "worker"}}, exclude_none=True),
    }


def _find_plan(
    writer: CacheWriter, settings: BuildSettings, teacher: Teacher, *, progress: bool
) -> tuple[Corpus, Plan]:
    """The corpus, and its stored plan; made now, by one pass over the documents, where there is none."""
    corpus = Corpus.open(settings.corpus, teacher.tokenizer, teacher.tokenizer_identity.vocab_size)
    segment = describe_segment(corpus, settings.cache.shard_tokens)
    stored = writer.plan(segment)
    if stored is None:
        stored = _make_plan(writer, corpus, segment, settings.cache.shard_tokens, progress=progress)
    return corpus, stored


def _generate(
    writer: CacheWriter,
    settings: BuildSettings,
    teacher: Teacher,
    load_teacher: Callable[[], GeneratingEngine],
    *,
    progress: bool,
) -> tuple[Corpus, Plan]:
    """The corpus of the teacher's answers and its plan; before there is a plan, every prompt is answered."""
    assert settings.generate is not None
    prompts = Prompts.open(settings.corpus, teacher.tokenizer, teacher.tokenizer_identity.vocab_size)
    stop_token_ids = find_stop_token_ids(teacher, settings.generate)
    segment = describe_generation(prompts, settings.generate, stop_token_ids, settings.cache.shard_tokens)
    stored = writer.plan(segment)
    generation = Generation(prompts, settings.generate, teacher, writer.storage, segment, stop_token_ids)
    if stored is None:
        generation.run(load_teacher, settings.cache.worker_of, progress=progress)
        corpus = generation.open_corpus()
        shard_tokens, counts = settings.cache.shard_tokens, generation.count()
        stored = _make_plan(writer, corpus, segment, shard_tokens, counts, progress=progress)
    return generation.open_corpus(), stored


def _make_plan(
    writer: CacheWriter,
    corpus: Corpus,
    segment: dict[str, Scalar],
    shard_tokens: int,
    counts: Mapping[str, int] = MappingProxyType({}),
    *,
    progress: bool,
) -> Plan:
    """counts: what is known of the documents beside what the corpus says of them."""
    with tqdm(total=len(corpus), desc="tokenising", unit="doc", disable=not progress) as bar:
        made = plan_shards(corpus, shard_tokens, progress=bar.update)
    return writer.store_plan(
        Plan(
            segment=segment,
            counts={**dataclasses.asdict(made.counts), **counts},
            digest=made.digest,
            shards=made.shards,
        )
    )


def _score_shards(
    writer: CacheWriter,
    corpus: Corpus,
    plan: Plan,
    pending: list[int],
    engine: TeacherEngine,
    *,
    progress: bool,
) -> None:
    done = plan.tokens - sum(plan.shards[ordinal].tokens for ordinal in pending)
    with (
        tqdm(total=plan.tokens, initial=done, unit="tok", unit_scale=True, disable=not progress) as bar,
        ThreadPoolExecutor(1, thread_name_prefix="encode") as encoder,
    ):

        def commit(ordinal: int, records: Iterator[SequenceTopK]) -> None:
            writer.commit(ordinal, records)
            bar.set_postfix_str(f"{writer.committed_bytes / writer.committed_tokens:.0f} B/tok", refresh=False)
            bar.update(plan.shards[ordinal].tokens)

        # While the teacher scores one shard the one before is encoded and stored, and no third is held.
        encoding: Future[None] | None = None
        for ordinal in pending:
            bar.set_description(f"shard {ordinal + 1}/{len(plan.shards)}")
            records = engine.score(corpus.sequences(plan.shards[ordinal]))
            if encoding is not None:
                encoding.result()
            encoding = encoder.submit(commit, ordinal, records)
        if encoding is not None:
            encoding.result()
