"""Payloads ↔ one Arrow IPC file: one record batch with a row per sequence.

`pyarrow.ipc.open_file(path).read_pandas()` opens it. Our reader does not: it takes a payload's range from the index.
One batch for the whole shard and not one per sequence: a batch's metadata would weigh on a corpus of short answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from storage_schemas.records import StoredSequence

_FIELDS: dict[str, pa.DataType] = {
    "sequence_id": pa.string(),
    "document_id": pa.string(),
    "tokens": pa.int32(),
    "payload": pa.large_binary(),
}
SCHEMA = pa.schema(_FIELDS)


def pack_arrow(rows: Sequence[StoredSequence]) -> tuple[bytes, list[int]]:
    """The file and the offset of each payload in it."""
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in SCHEMA]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    content = sink.getvalue()
    # Read back without a copy: the column's own buffers say where in the file the payloads lie.
    values = pa.ipc.open_file(content).get_batch(0).column("payload").buffers()[2]
    assert values is not None
    offsets, position = [], values.address - content.address
    for row in rows:
        offsets.append(position)
        position += len(row.payload)
    return content.to_pybytes(), offsets
