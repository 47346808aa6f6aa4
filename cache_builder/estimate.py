"""What a build would come to, from a sample of its documents: tokens, bytes and hours. Nothing is written."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from cache_builder.config import BuildSettings
from cache_builder.corpus import Corpus, CorpusCounts
from cache_builder.engine import Capture
from cache_builder.open_engine import open_engine
from cache_builder.teacher import find_teacher, find_tokenizer
from storage_schemas.codecs import RowLayout, bound_payload, get_codec
from storage_schemas.containers import get_container
from storage_schemas.errors import RequestError
from storage_schemas.manifest import CacheIdentity, CaptureIdentity
from storage_schemas.records import StoredSequence, TokenSequence
from storage_schemas.writer import CacheWriter

SEED = 0
MEASURED_TOKENS = 16384
"""Tokens scored to measure the teacher, at most; or one sequence where that is longer."""
_SEQUENCE_NUMBERS = 64
"""Bytes of a sequence's lengths, offset and checksum in the index of its shard, at most."""
_SHARD_ENTRIES = 2048
"""Bytes of a shard in the plan and the manifest, and of its index without a sequence, at most."""


@dataclass(frozen=True)
class Amount:
    """A total over all documents and its standard error, which is 0 where every document was read."""

    total: float
    standard_error: float


@dataclass(frozen=True)
class Measurement:
    """One closed batch through teacher and codec. tokens_per_second counts encoding; load_seconds is start-up."""

    sequences: int
    tokens: int
    tokens_per_second: float
    bytes_per_token: float
    load_seconds: float


@dataclass(frozen=True)
class Estimate:
    """bytes_are_measured: by encoding rows of the teacher; else bytes are the codec's upper bound.

    hours is None where no speed is known. counts: what became of the sampled documents, see CorpusCounts.
    """

    documents: int
    sampled_documents: int
    sequences: Amount
    tokens: Amount
    targets: Amount
    bytes: Amount
    bytes_per_token: float
    bytes_are_measured: bool
    tokens_per_second: float | None
    hours: Amount | None
    measurement: Measurement | None
    counts: dict[str, int]
    settings: dict[str, object]


def estimate(
    settings: BuildSettings,
    *,
    sample: int = 1000,
    tokens_per_second: float | None = None,
    measure: bool = False,
    progress: bool = True,
) -> Estimate:
    """Render `sample` documents, drawn without replacement by a fixed seed (all, where there are no more), and
    extrapolate: N·mean ± N·s/√n·√(1 − n/N).

    measure: load the teacher, score and encode some of the sampled sequences, and use their tokens/s and bytes/token.
    tokens_per_second: the speed to reckon with otherwise. Raises RequestError for settings that a build would refuse,
    as far as the sample shows, and where prompts are to be answered: nobody knows yet how long answers are.
    """
    if settings.generate is not None:
        raise RequestError(
            "expected documents to score, got prompts to answer, and how long answers are is not known before; build "
            "a few with corpus.max_documents, and see their tokens with inspect"
        )
    if measure and tokens_per_second is not None:
        raise RequestError("expected either a given speed or a measured one; leave out tokens per second, or measure")
    codec = get_codec(settings.cache.codec)
    tokenizer, vocab_size = find_tokenizer(settings.engine)
    if settings.cache.top_k > vocab_size:
        raise RequestError(
            f"expected top_k of at most the vocabulary's {vocab_size} ids, got {settings.cache.top_k}; 64 is usual"
        )
    corpus = Corpus.open(settings.corpus, tokenizer, vocab_size)
    counts = CorpusCounts()
    rows = tqdm(_draw(len(corpus), sample), desc="tokenising", unit="doc", disable=not progress)
    documents = [next(corpus.documents(row, row + 1, counts)) for row in rows]
    if not counts.sequences:
        raise RequestError(f"none of {len(documents)} documents leaves a sequence; raise max_length, or sample more")
    tokens = _extrapolate([sum(map(len, pieces)) for pieces in documents], len(corpus))
    measurement = _measure(settings, [piece for pieces in documents for piece in pieces]) if measure else None
    if measurement is None:
        layout = RowLayout(settings.cache.top_k, vocab_size, settings.cache.extras)
        bound = functools.partial(bound_payload, codec, layout)
        stored, speed = _bound_bytes(settings, documents, len(corpus), bound), tokens_per_second
    else:
        stored, speed = _scale(tokens, measurement.bytes_per_token), measurement.tokens_per_second
    return Estimate(
        documents=len(corpus),
        sampled_documents=len(documents),
        sequences=_extrapolate([len(pieces) for pieces in documents], len(corpus)),
        tokens=tokens,
        targets=_extrapolate(
            [sum(int(piece.completion_mask.sum()) for piece in pieces) for pieces in documents], len(corpus)
        ),
        bytes=stored,
        bytes_per_token=stored.total / tokens.total,
        bytes_are_measured=measurement is not None,
        tokens_per_second=speed,
        hours=None if speed is None else _scale(tokens, 1 / speed / 3600),
        measurement=measurement,
        counts=dataclasses.asdict(counts),
        settings={
            "codec": settings.cache.codec,
            "top_k": settings.cache.top_k,
            "format": settings.cache.format,
            "max_length": settings.corpus.max_length,
            "overflow": settings.corpus.overflow,
            "engine": settings.engine.name,
            "seed": SEED,
        },
    )


def render_estimate(found: Estimate) -> str:
    """The same for a terminal: a table, then what it rests on."""
    rows = [("documents", f"{found.documents:,}", "")]
    for name in ("sequences", "tokens", "targets", "bytes"):
        amount = getattr(found, name)
        error = f"± {amount.standard_error:,.0f}" if found.sampled_documents < found.documents else ""
        rows.append((name, f"{amount.total:,.0f}", error))
    rows.append(("bytes per token", f"{found.bytes_per_token:.1f}", "" if found.bytes_are_measured else "at most"))
    if found.hours is not None:
        rows.append(("tokens per second", f"{found.tokens_per_second:,.0f}", ""))
        hours, error = (f"{value:,.2f}" for value in dataclasses.astuple(found.hours))
        rows.append(("hours", hours, f"± {error}" if found.sampled_documents < found.documents else ""))
    lines = [f"{name:20}{value:>20}  {note}".rstrip() for name, value, note in rows]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in _assumptions(found))])


def _assumptions(found: Estimate) -> list[str]:
    known = found.settings
    whole = found.sampled_documents == found.documents
    said = [
        "every document was tokenised: sequences, tokens and targets are exact"
        if whole
        else f"from {found.sampled_documents:,} documents drawn with seed {known['seed']}; ± is one standard error of "
        "the drawing"
    ]
    how = f"{known['codec']} at top_k = {known['top_k']} in {known['format']}"
    if found.measurement is not None:
        measured = found.measurement
        said.append(
            f"bytes and speed were measured with {how}: {measured.sequences:,} sequences of {measured.tokens:,} tokens "
            f"in one batch, encoding included, on this machine with the engine {known['engine']}; a full shard may be "
            f"faster, and loading the teacher ({measured.load_seconds:.0f} s) comes on top"
        )
    else:
        said.append(
            f"bytes are an upper bound of {how}, as if nothing could be compressed; --measure encodes real rows"
        )
        if found.hours is None:
            said.append("no speed is known, so there are no hours: give --tokens-per-second, or --measure")
        else:
            said.append("the speed is as given; loading the teacher comes on top")
    seen = {name: found.counts[name] for name in ("dropped", "skipped", "truncated", "split", "targetless")}
    return said + [f"{name} among the documents tokenised: {count:,}" for name, count in seen.items() if count]


def _draw(documents: int, sample: int) -> list[int]:
    """Rows in ascending order; an estimate of the same corpus draws the same."""
    if sample < 2:
        raise RequestError(f"expected a sample of at least 2 documents, got {sample}; 1000 is usual")
    if documents <= sample:
        return list(range(documents))
    return sorted(np.random.default_rng(SEED).choice(documents, sample, replace=False).tolist())


def _extrapolate(values: Sequence[int], documents: int) -> Amount:
    """The total over all documents of a value known for some, and its standard error: drawing without replacement."""
    drawn = np.asarray(values, np.float64)
    deviation = float(drawn.std(ddof=1)) if len(drawn) > 1 else 0.0
    missing = 1 - len(drawn) / documents
    return Amount(float(drawn.mean()) * documents, documents * deviation * math.sqrt(missing / len(drawn)))


def _scale(amount: Amount, factor: float) -> Amount:
    return Amount(amount.total * factor, amount.standard_error * factor)


def _bound_bytes(
    settings: BuildSettings, documents: Sequence[Sequence[TokenSequence]], total: int, bound: Callable[[int], int]
) -> Amount:
    """Bytes of the cache at most: of its payloads, of what its container and index add to each, and of its shards."""
    row = StoredSequence("0/1000000/10", "0" * 16, 1000, b"\0" * 1024)
    one, many = (len(get_container(settings.cache.format).pack([row] * count)[0]) for count in (1, 65))
    added = -(-(many - one) // 64) - len(row.payload) + _SEQUENCE_NUMBERS
    sizes = [
        sum(bound(len(piece)) + added + 2 * len(f"{piece.sequence_id}{piece.document_id}".encode()) for piece in pieces)
        for pieces in documents
    ]
    stored = _extrapolate(sizes, total)
    tokens = sum(len(piece) for pieces in documents for piece in pieces) * total / len(documents)
    shards = math.ceil(tokens / settings.cache.shard_tokens)
    return Amount(stored.total + (shards + 1) * (one + _SHARD_ENTRIES), stored.standard_error)


def _measure(settings: BuildSettings, sequences: Sequence[TokenSequence]) -> Measurement:
    """Score and encode sequences as a build does, up to `MEASURED_TOKENS` of them in one batch after one to warm up."""
    teacher = find_teacher(settings.engine)
    identity = CacheIdentity(
        teacher=teacher.identity,
        tokenizer=teacher.tokenizer_identity,
        capture=CaptureIdentity(top_k=settings.cache.top_k, extras=tuple(sorted(settings.cache.extras))),
        codec=settings.cache.codec,
        container=settings.cache.format,
    )
    tokens = 0
    chosen: list[TokenSequence] = []
    for index in np.random.default_rng(SEED).permutation(len(sequences)):
        if chosen and tokens + len(sequences[index]) > MEASURED_TOKENS:
            break
        chosen.append(sequences[index])
        tokens += len(sequences[index])
    capture = Capture(identity.capture.top_k, identity.tokenizer.vocab_size, identity.capture.extras)
    longest = teacher.engine.max_model_len or settings.corpus.max_length
    started = time.monotonic()
    engine = open_engine(teacher.engine.model_copy(update={"max_model_len": longest}), capture)
    try:
        for _ in engine.score(chosen[:1]):
            pass
        loaded = time.monotonic()
        writer = CacheWriter(_Nowhere(), identity)
        writer.commit(0, engine.score(chosen))
        ended = time.monotonic()
    finally:
        engine.close()
    return Measurement(
        sequences=len(chosen),
        tokens=tokens,
        tokens_per_second=tokens / (ended - loaded),
        bytes_per_token=writer.committed_bytes / tokens,
        load_seconds=loaded - started,
    )


class _Nowhere:
    """A storage that takes everything and keeps nothing."""

    url = "nowhere"

    def put_new(self, name: str, content: bytes) -> bool:
        return True

    def get(self, name: str) -> bytes:
        raise FileNotFoundError(name)

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        raise FileNotFoundError(name)

    def sizes(self, folder: str = "") -> dict[str, int]:
        return {}

    def remove(self, name: str) -> None:
        raise FileNotFoundError(name)
