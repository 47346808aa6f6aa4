"""CacheReader: the only door into a cache. manifest → index → byte range → record, each vouching for the next."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import chain

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from storage_schemas.codecs import check_codec_version, decode_sequence
from storage_schemas.errors import CorruptShard, IncompleteCache
from storage_schemas.manifest import CacheIdentity, Manifest, Provenance, ShardEntry, ShardIndex, parse_document
from storage_schemas.records import SequenceTopK, find_defect
from storage_schemas.storage import Storage, check_name, open_storage

_MANIFEST = re.compile(r"manifest-([1-9][0-9]{0,8})\.json")


class CacheReader:
    """A sealed cache: a sequence of `SequenceTopK` in the order of the corpus, shard after shard.

    Can be pickled, and opens nothing until it is read, so that spawned workers may each hold one. Not a byte reaches
    a decompressor before its raw range has passed the CRC-32C of an index that the manifest vouches for.
    """

    def __init__(self, storage: Storage, identity: CacheIdentity, manifest: Manifest) -> None:
        self.storage = storage
        self.identity = identity
        self.manifest = manifest
        self._count = sum(shard.sequences for shard in manifest.shards)
        self._codec = check_codec_version(identity.codec)
        self._layout = identity.layout

    @classmethod
    def open(cls, url: str) -> CacheReader:
        """Raises IncompleteCache without a manifest or with a file missing, CorruptShard where a file is not what the
        manifest says, UnsupportedFormat where a newer version wrote it."""
        storage = open_storage(url)
        manifest = _newest_manifest(storage)
        try:
            content = storage.get("identity.json")
        except FileNotFoundError as error:
            raise IncompleteCache(f"{url} has no identity.json; restore it from a copy of this cache") from error
        if hashlib.sha256(content).hexdigest() != manifest.identity_sha256:
            raise CorruptShard(f"{url}/identity.json is not the one its manifest vouches for; restore it from a copy")
        reader = cls(storage, parse_document(CacheIdentity, content, "identity.json"), manifest)
        reader._check_files()
        return reader

    def __len__(self) -> int:
        return self._count

    @property
    def url(self) -> str:
        return self.storage.url

    @property
    def provenance(self) -> dict[str, str]:
        """What scored the first shard, as far as it was recorded: the manifest does not vouch for it."""
        try:
            return parse_document(Provenance, self.storage.get("provenance.json"), "provenance.json").provenance
        except FileNotFoundError:
            return {}

    @property
    def token_count(self) -> int:
        return sum(shard.tokens for shard in self.manifest.shards)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """[len(self)] int32, tokens of each sequence."""
        return np.array(list(chain.from_iterable(index.tokens for index in self._indexes)), np.int32)

    @cached_property
    def shard_of(self) -> NDArray[np.int32]:
        """[len(self)] int32, which of `manifest.shards` holds each sequence."""
        return np.repeat(np.arange(len(self._indexes), dtype=np.int32), [len(index.tokens) for index in self._indexes])

    @cached_property
    def sequence_ids(self) -> list[str]:
        return list(chain.from_iterable(index.sequence_ids for index in self._indexes))

    @cached_property
    def document_ids(self) -> list[str]:
        return list(chain.from_iterable(index.document_ids for index in self._indexes))

    def read(self, i: int) -> SequenceTopK:
        """Sequence i, decoded. Raises CorruptShard naming the shard, IncompleteCache where its file is gone."""
        if not 0 <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)}")
        ordinal = int(self.shard_of[i])
        index, position = self._indexes[ordinal], i - int(self._first_sequence[ordinal])
        offset, length = index.offsets[position], index.lengths[position]
        try:
            payload = self.storage.get_range(index.file, offset, length)
        except FileNotFoundError as error:
            raise self._missing(self.manifest.shards[ordinal]) from error
        if len(payload) != length or google_crc32c.value(payload) != index.crc32c[position]:
            raise self._corrupt(
                self.manifest.shards[ordinal],
                f"bytes {offset} to {offset + length} (sequence {index.sequence_ids[position]}) fail their checksum",
            )
        record = decode_sequence(
            self._codec,
            self._layout,
            payload,
            tokens=index.tokens[position],
            sequence_id=index.sequence_ids[position],
            document_id=index.document_ids[position],
        )
        defect = find_defect(
            record,
            vocab_size=self._layout.vocab_size,
            top_k=self._layout.top_k,
            extras=self._layout.extras,
            mass_tolerance=_mass_tolerance(float(self._codec.error_bound(record.top_logprobs).max())),
        )
        if defect is not None:
            raise self._corrupt(self.manifest.shards[ordinal], f"sequence {record.sequence_id}: {defect}")
        return record

    def __iter__(self) -> Iterator[SequenceTopK]:
        return (self.read(i) for i in range(len(self)))

    @cached_property
    def _indexes(self) -> list[ShardIndex]:
        return [self._load_index(entry) for entry in self.manifest.shards]

    @cached_property
    def _first_sequence(self) -> NDArray[np.int64]:
        counts = [len(index.tokens) for index in self._indexes]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def _load_index(self, entry: ShardEntry) -> ShardIndex:
        try:
            content = self.storage.get(entry.index)
        except FileNotFoundError as error:
            raise self._missing(entry) from error
        if hashlib.sha256(content).hexdigest() != entry.index_sha256:
            raise self._corrupt(entry, f"{entry.index} fails its checksum")
        index = parse_document(ShardIndex, content, entry.index)
        columns = (index.sequence_ids, index.document_ids, index.offsets, index.lengths, index.crc32c)
        ends = (offset + length for offset, length in zip(index.offsets, index.lengths, strict=False))
        if (
            any(len(column) != len(index.tokens) for column in columns)
            or (len(index.tokens), sum(index.tokens), index.file) != (entry.sequences, entry.tokens, entry.file)
            or any(end > entry.file_bytes for end in ends)
        ):
            raise self._corrupt(entry, f"{entry.index} disagrees with the manifest")
        return index

    def _check_files(self) -> None:
        present = self.storage.sizes("shards")
        for entry in self.manifest.shards:
            for name, size in ((entry.file, entry.file_bytes), (entry.index, entry.index_bytes)):
                if check_name(name) not in present:
                    raise self._missing(entry)
                if present[name] != size:
                    raise self._corrupt(entry, f"{name} is {present[name]:,} bytes, expected {size:,}")

    def _missing(self, entry: ShardEntry) -> IncompleteCache:
        return IncompleteCache(f"{self.url}: shard {entry.ordinal:05d} is missing ({entry.file}); {_REMEDY}")

    def _corrupt(self, entry: ShardEntry, what: str) -> CorruptShard:
        return CorruptShard(f"{self.url}: shard {entry.ordinal:05d} is damaged: {what}; {_REMEDY}")


_REMEDY = "restore that file from a copy, or build the cache again"


def _mass_tolerance(bound: float) -> float:
    """Rows moved by at most `bound` nats sum to within exp(bound) − 1 of 1; float16 tails and rounding on top."""
    return float(np.expm1(min(bound, 50.0))) + 1e-2


def _newest_manifest(storage: Storage) -> Manifest:
    names = storage.sizes()
    generations = sorted((int(match[1]) for name in names if (match := _MANIFEST.fullmatch(name))), reverse=True)
    if not generations:
        hint = (
            "finish it with the same cache-builder build command" if "identity.json" in names else "give a cache's path"
        )
        raise IncompleteCache(f"{storage.url} is not a finished cache: it has no manifest; {hint}")
    name = f"manifest-{generations[0]}.json"
    manifest = parse_document(Manifest, storage.get(name), name)
    if not manifest.is_sealed() or manifest.generation != generations[0]:
        raise CorruptShard(f"{storage.url}/{name} fails its own checksum; restore it from a copy")
    return manifest
