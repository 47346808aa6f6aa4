"""What the teacher wrote, as rows that a corpus reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

_SCHEMA = pa.schema(
    [("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("completion_mask", pa.list_(pa.int8()))]
)
_FINISH_REASONS = ("stop", "length", "none")


class GeneratedRows:
    """The rows of all batches, in order, as much of a `datasets.Dataset` as a corpus uses; one batch in memory."""

    features = SimpleNamespace(arrow_schema=_SCHEMA)

    def __init__(self, count: int, batch_prompts: int, read_batch: Callable[[int], list[dict[str, Any]]]) -> None:
        """count: rows in all; batch_prompts: rows in each batch but the last; read_batch: the rows of a batch."""
        self._count = count
        self._batch_prompts = batch_prompts
        self._read_batch = read_batch
        self._held: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return self._count

    def select_columns(self, names: Sequence[str]) -> GeneratedRows:
        assert set(names) <= set(_SCHEMA.names)
        return self

    def __getitem__(self, rows: slice) -> dict[str, list[Any]]:
        found = list(self._read(rows.start, rows.stop))
        return {name: [row[name] for row in found] for name in _SCHEMA.names}

    def _read(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        size = self._batch_prompts
        for ordinal in range(start // size, (stop - 1) // size + 1):
            if self._held[0] != ordinal:
                self._held = (ordinal, self._read_batch(ordinal))
            first = ordinal * size
            yield from self._held[1][max(0, start - first) : stop - first]


def is_row(row: Any) -> bool:
    """Whether a line of a batch holds what it should."""
    return (
        isinstance(row, dict)
        and isinstance(row.get("id"), str)
        and row.get("finish_reason") in _FINISH_REASONS
        and all(isinstance(row.get(name), list) for name in ("input_ids", "completion_mask"))
        and len(row["input_ids"]) == len(row["completion_mask"])
        and all(type(value) is int for value in row["input_ids"])
        and set(row["completion_mask"]) <= {0, 1}
    )
