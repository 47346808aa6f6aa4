"""CacheWriter: the only way into a cache. open → store_plan → pending → commit … → seal."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping

import google_crc32c

from storage_schemas.codecs import encode_sequence, get_codec
from storage_schemas.containers import get_container
from storage_schemas.errors import CorruptShard, IdentityMismatch, RequestError
from storage_schemas.manifest import (
    CacheIdentity,
    Manifest,
    Plan,
    Provenance,
    Scalar,
    Segment,
    ShardEntry,
    ShardIndex,
    describe_differences,
    parse_document,
)
from storage_schemas.records import SequenceTopK, StoredSequence, find_defect
from storage_schemas.storage import Storage, open_storage

logger = logging.getLogger(__name__)

_IDENTITY, _PROVENANCE, _PLAN = "identity.json", "provenance.json", "plan.json"


class CacheWriter:
    """Fills one cache, alone or beside other writers: a shard is committed by the one that creates its index.

    A shard's file carries its own SHA-256 in its name, so two writers never disagree about what a name holds, and the
    one create-if-absent of the index decides whose file counts.
    """

    def __init__(self, storage: Storage, identity: CacheIdentity) -> None:
        self.storage = storage
        self.identity = identity
        self.committed_tokens = 0
        self.committed_bytes = 0
        """What this writer has encoded, of its shards and their indexes: for progress."""
        self._codec = get_codec(identity.codec)
        self._container = get_container(identity.container)

    @classmethod
    def open(cls, url: str, identity: CacheIdentity) -> CacheWriter:
        """The writer of a new cache, or of one begun with the same identity. Writes nothing yet.

        Raises IdentityMismatch naming every field that differs, both values and the remedy.
        """
        writer = cls(open_storage(url), identity)
        writer._check_identity()
        return writer

    def _check_identity(self) -> None:
        try:
            stored = parse_document(CacheIdentity, self.storage.get(_IDENTITY), _IDENTITY)
        except (FileNotFoundError, NotADirectoryError):
            return
        differences = describe_differences(stored.model_dump(), self.identity.model_dump())
        if differences:
            raise self._mismatch(differences)

    def record_provenance(self, provenance: Mapping[str, str]) -> None:
        """Store what is about to score the first shard; a warning names each thing that differs from what did."""
        ours = Provenance(provenance=dict(provenance))
        if self.storage.put_new(_PROVENANCE, ours.to_json()):
            return
        stored = parse_document(Provenance, self.storage.get(_PROVENANCE), _PROVENANCE)
        for difference in describe_differences(stored.provenance, ours.provenance):
            logger.warning("resuming %s on something else, which may change low bits: %s", self.storage.url, difference)

    def plan(self, segment: Mapping[str, Scalar]) -> Plan | None:
        """The stored plan, or None where there is none yet. Raises IdentityMismatch where it is of another corpus."""
        try:
            plan = parse_document(Plan, self.storage.get(_PLAN), _PLAN)
        except (FileNotFoundError, NotADirectoryError):
            return None
        differences = describe_differences(plan.segment, segment)
        if differences:
            raise self._mismatch(differences)
        return plan

    def store_plan(self, plan: Plan) -> Plan:
        """Begin the cache: store its identity and this plan, unless another builder did; what is stored counts.

        Raises IdentityMismatch where another builder began another cache here meanwhile.
        """
        if not plan.shards:
            raise RequestError("expected a corpus with at least one sequence, got none; nothing to build")
        if not self.storage.put_new(_IDENTITY, self.identity.to_json()):
            self._check_identity()
        if self.storage.put_new(_PLAN, plan.to_json()):
            return plan
        stored = self.plan(plan.segment)
        assert stored is not None
        return stored

    def total_bytes(self) -> int:
        """Bytes of every file of the cache as it stands."""
        return sum(self.storage.sizes().values()) + sum(self.storage.sizes("shards").values())

    def pending(self, plan: Plan) -> list[int]:
        """Ordinals of the shards that no one has committed yet."""
        present = self.storage.sizes("shards")
        return [ordinal for ordinal in range(len(plan.shards)) if _index_name(ordinal) not in present]

    def commit(self, ordinal: int, records: Iterable[SequenceTopK]) -> bool:
        """Encode and store one shard. False where another builder had committed it, whose file then counts.

        Raises CorruptShard where a record breaks an invariant: an engine's defect must not become a cache.
        """
        layout, rows = self.identity.layout, []
        for record in records:
            defect = find_defect(record, vocab_size=layout.vocab_size, top_k=layout.top_k, extras=layout.extras)
            if defect is not None:
                raise CorruptShard(f"the teacher's rows for sequence {record.sequence_id} are not valid: {defect}")
            payload = encode_sequence(self._codec, layout, record)
            rows.append(StoredSequence(record.sequence_id, record.document_id, len(record), payload))
        content, offsets = self._container.pack(rows)
        sha256 = hashlib.sha256(content).hexdigest()
        index = ShardIndex(
            file=f"shards/{ordinal:05d}-{sha256[:16]}{self._container.suffix}",
            file_bytes=len(content),
            file_sha256=sha256,
            sequence_ids=tuple(row.sequence_id for row in rows),
            document_ids=tuple(row.document_id for row in rows),
            tokens=tuple(row.tokens for row in rows),
            offsets=tuple(offsets),
            lengths=tuple(len(row.payload) for row in rows),
            crc32c=tuple(google_crc32c.value(row.payload) for row in rows),
        )
        index_content = index.to_json()
        self.committed_tokens += sum(index.tokens)
        self.committed_bytes += len(content) + len(index_content)
        self.storage.put_new(index.file, content)
        if self.storage.put_new(_index_name(ordinal), index_content):
            return True
        if self._index(ordinal)[1].file != index.file:
            self.storage.remove(index.file)
        return False

    def seal(self, plan: Plan) -> Manifest | None:
        """Write the manifest; None while shards are missing. Raises CorruptShard where an index is not the plan's."""
        if self.pending(plan):
            return None
        present = self.storage.sizes("shards")
        entries = tuple(self._entry(ordinal, plan, present) for ordinal in range(len(plan.shards)))
        manifest = Manifest(
            generation=1,
            identity_sha256=hashlib.sha256(self.identity.to_json()).hexdigest(),
            segments=(
                Segment(
                    plan=_PLAN,
                    plan_sha256=hashlib.sha256(self.storage.get(_PLAN)).hexdigest(),
                    sequences=plan.sequences,
                    tokens=plan.tokens,
                ),
            ),
            shards=entries,
        ).sealed()
        self.storage.put_new("manifest-1.json", manifest.to_json())
        return manifest

    def _entry(self, ordinal: int, plan: Plan, present: Mapping[str, int]) -> ShardEntry:
        content, index = self._index(ordinal)
        planned = plan.shards[ordinal]
        got = (len(index.tokens), sum(index.tokens), present.get(index.file))
        expected = (planned.sequences, planned.tokens, index.file_bytes)
        if got != expected:
            raise CorruptShard(
                f"shard {ordinal:05d} should hold (sequences, tokens, bytes) {expected} and holds {got}; "
                f"delete {_index_name(ordinal)} and run the same build again"
            )
        return ShardEntry(
            ordinal=ordinal,
            segment=0,
            file=index.file,
            file_bytes=index.file_bytes,
            file_sha256=index.file_sha256,
            index=_index_name(ordinal),
            index_bytes=len(content),
            index_sha256=hashlib.sha256(content).hexdigest(),
            sequences=len(index.tokens),
            tokens=sum(index.tokens),
        )

    def _mismatch(self, differences: list[str]) -> IdentityMismatch:
        begun = "was built" if self.storage.sizes("shards") else "holds no shard yet, but was begun"
        return IdentityMismatch(
            f"{self.storage.url} {begun} with other settings ({'; '.join(differences)}); "
            "give the settings it was built with, or choose another output"
        )

    def _index(self, ordinal: int) -> tuple[bytes, ShardIndex]:
        content = self.storage.get(_index_name(ordinal))
        return content, parse_document(ShardIndex, content, _index_name(ordinal))


def _index_name(ordinal: int) -> str:
    return f"shards/{ordinal:05d}.index"
