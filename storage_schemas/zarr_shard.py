"""Payloads ↔ one Zarr v3 group in a stored ZIP.

`zarr.open_group(zarr.storage.ZipStore(path, mode="r"))` opens it: `payload` is all payloads end to end, `offset`
[n + 1] says where each begins, `tokens` [n] how many tokens it holds; the ids are attributes. Our reader does not
open it: it takes a payload's range from the index. Entry order, timestamps and modes are fixed, so that equal rows
give equal bytes.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from storage_schemas.records import StoredSequence

_PAYLOAD_CHUNK = "payload/c/0"


def pack_zarr(rows: Sequence[StoredSequence]) -> tuple[bytes, list[int]]:
    """The file and the offset of each payload in it."""
    lengths = [len(row.payload) for row in rows]
    offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    arrays: dict[str, NDArray[Any]] = {
        "offset": offset,
        "payload": np.frombuffer(b"".join(row.payload for row in rows), np.uint8),
        "tokens": np.array([row.tokens for row in rows], np.int32),
    }
    entries: dict[str, zarr.core.buffer.Buffer] = {}
    attributes = {
        "sequence_ids": [row.sequence_id for row in rows],
        "document_ids": [row.document_id for row in rows],
    }
    group = zarr.create_group(MemoryStore(entries), zarr_format=3, attributes=attributes)
    for name, values in arrays.items():
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=values.shape,
            # Not compressed: the payloads are. The checksum is for those who read with zarr alone.
            serializer=BytesCodec(),
            compressors=[Crc32cCodec()],
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        array[...] = values
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(entries):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, entries[name].to_bytes())
        chunk = archive.getinfo(_PAYLOAD_CHUNK)
    # A local header is 30 bytes, the name and the extra field; the stored content follows.
    start = chunk.header_offset + 30 + len(chunk.filename.encode()) + len(chunk.extra)
    return sink.getvalue(), [start + int(position) for position in offset[:-1]]
