"""What a cache says of itself: its identity, its plan, the index of each shard, and the manifest that vouches for all.

Every one of these is JSON with sorted keys, a frozen pydantic model, and the same bytes for the same content: no time
of day, no machine's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from storage_schemas.codecs import RowLayout
from storage_schemas.errors import CorruptShard, UnsupportedFormat

SCHEMA_VERSION = 1

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Scalar = str | int | float | bool | None


class Document(BaseModel):
    """A JSON file of a cache."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    def to_json(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"


D = TypeVar("D", bound=Document)


def parse_document(model: type[D], content: bytes, name: str) -> D:
    """Raises CorruptShard where the bytes are not such a document, UnsupportedFormat where a newer version wrote it."""
    try:
        table = json.loads(content)
        version = table.get("schema_version", SCHEMA_VERSION)
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise UnsupportedFormat(
                f"{name} has schema version {version}, known here: {SCHEMA_VERSION}; update logitcask"
            )
        return model.model_validate_json(content)
    except (ValidationError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptShard(f"{name} is damaged or not a {model.__name__.lower()}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        item = error.errors()[0]
        return f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def tokenizer_digest(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 over the id → token map, ids ascending: equal for tokenizers that give every id the same meaning."""
    digest = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        encoded = token.encode("utf-8", "surrogatepass")
        digest.update(f"{index} {len(encoded)} ".encode() + encoded)
    return digest.hexdigest()


class TeacherIdentity(Document):
    model: str
    revision: str | None
    weights_digest: str
    dtype: str
    head_dtype: str
    quantization: str | None


class TokenizerIdentity(Document):
    digest: Digest
    vocab_size: PositiveInt
    template_digest: Digest | None


class CaptureIdentity(Document):
    top_k: PositiveInt
    normalization: Literal["full vocabulary, temperature 1"] = "full vocabulary, temperature 1"
    extras: tuple[str, ...] = ()


class CacheIdentity(Document):
    """identity.json: what must agree for two caches to be one."""

    format: Literal["logitcask"] = "logitcask"
    schema_version: PositiveInt = SCHEMA_VERSION
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    capture: CaptureIdentity
    codec: str
    container: str

    @property
    def layout(self) -> RowLayout:
        return RowLayout(self.capture.top_k, self.tokenizer.vocab_size, self.capture.extras)


class Provenance(Document):
    """provenance.json: engine, versions, hardware. Recorded, warned about when it differs, never refused."""

    format: Literal["logitcask"] = "logitcask"
    provenance: dict[str, str]


class ShardPlan(Document):
    """Documents [start, stop) of the corpus and what they render to. digest: SHA-256 over the sequences' ids, tokens
    and masks."""

    start: NonNegativeInt
    stop: PositiveInt
    sequences: PositiveInt
    tokens: PositiveInt
    targets: NonNegativeInt
    digest: Digest


class Plan(Document):
    """plan.json: a corpus as ranges of documents, fixed before the first shard and by the corpus alone.

    segment: what the corpus is, flat. counts: documents cut, split, skipped and the like. digest: as a shard's, over
    all sequences; it does not depend on where the shards end.
    """

    format: Literal["logitcask"] = "logitcask"
    schema_version: PositiveInt = SCHEMA_VERSION
    segment: dict[str, Scalar]
    counts: dict[str, int]
    digest: Digest
    shards: tuple[ShardPlan, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def sequences(self) -> int:
        return sum(shard.sequences for shard in self.shards)


class ShardIndex(Document):
    """NNNNN.index: the file it vouches for; for each sequence its ids, tokens, byte range and that range's CRC-32C."""

    format: Literal["logitcask"] = "logitcask"
    schema_version: PositiveInt = SCHEMA_VERSION
    file: str
    file_bytes: PositiveInt
    file_sha256: Digest
    sequence_ids: tuple[str, ...]
    document_ids: tuple[str, ...]
    tokens: tuple[PositiveInt, ...]
    offsets: tuple[NonNegativeInt, ...]
    lengths: tuple[PositiveInt, ...]
    crc32c: tuple[NonNegativeInt, ...]

    def to_json(self) -> bytes:
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()


class ShardEntry(Document):
    """A shard as the manifest lists it."""

    ordinal: NonNegativeInt
    segment: NonNegativeInt
    file: str
    file_bytes: PositiveInt
    file_sha256: Digest
    index: str
    index_bytes: PositiveInt
    index_sha256: Digest
    sequences: PositiveInt
    tokens: PositiveInt


class Segment(Document):
    """A part of the corpus, as its plan described it."""

    plan: str
    plan_sha256: Digest
    sequences: NonNegativeInt
    tokens: NonNegativeInt


class Manifest(Document):
    """manifest-N.json: it exists when the cache does. `digest` is over the document without it."""

    format: Literal["logitcask"] = "logitcask"
    schema_version: PositiveInt = SCHEMA_VERSION
    generation: PositiveInt
    identity_sha256: Digest
    segments: tuple[Segment, ...]
    shards: tuple[ShardEntry, ...]
    digest: Digest | None = None

    def sealed(self) -> Manifest:
        return self.model_copy(update={"digest": self._content_digest()})

    def is_sealed(self) -> bool:
        return self.digest == self._content_digest()

    def _content_digest(self) -> str:
        return hashlib.sha256(self.model_copy(update={"digest": None}).to_json()).hexdigest()


def flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe_differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """One phrase for each field that differs: its name, the stored value and the one asked for."""
    left, right = dict(flatten(stored)), dict(flatten(asked))
    return [
        f"{name}: the cache has {left.get(name)!r}, asked for {right.get(name)!r}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]
