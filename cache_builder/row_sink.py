"""Rows that cross from vLLM's workers to this process: one memory-mapped file a batch, one column a field.

Engine messages would copy and pickle half a kilobyte a row; a shared mapping copies it once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 64


@dataclass(frozen=True)
class RowSink:
    """Columns over one file, all indexed by the row within the batch.

    label_ids [rows] int32 goes to the workers: the token that follows each row. top_ids [rows, k] int32,
    top_logprobs [rows, k], log_tail_mass, label_logprob and the extras [rows] float32 come back; done [rows] uint8 is
    set behind them.
    """

    path: Path
    columns: Mapping[str, NDArray[Any]]

    @classmethod
    def create(cls, rows: int, top_k: int, extras: Sequence[str]) -> RowSink:
        """A new file in the directory for temporary files; raises OSError when there is no room for all of it."""
        handle, name = tempfile.mkstemp(prefix="logitcask-", suffix=".rows")
        try:
            os.posix_fallocate(handle, 0, _layout(rows, top_k, extras)[1])  # later, no room would be a SIGBUS
        except OSError as error:
            os.unlink(name)
            raise OSError(error.errno, error.strerror, name) from error
        finally:
            os.close(handle)
        return cls.open(name, rows, top_k, extras)

    @classmethod
    def open(cls, path: str | Path, rows: int, top_k: int, extras: Sequence[str]) -> RowSink:
        """Map a file that `create` made with the same arguments."""
        layout, size = _layout(rows, top_k, extras)
        file = np.memmap(path, dtype=np.uint8, mode="r+", shape=(size,))
        columns = {
            name: np.ndarray(shape, dtype=dtype, buffer=file, offset=offset)
            for name, (offset, shape, dtype) in layout.items()
        }
        return cls(Path(path), columns)

    def unlink(self) -> None:
        """Remove the name; the mappings live on until they are dropped."""
        self.path.unlink(missing_ok=True)


def _layout(
    rows: int, top_k: int, extras: Sequence[str]
) -> tuple[dict[str, tuple[int, tuple[int, ...], np.dtype[np.generic]]], int]:
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]] = {
        "label_ids": ((rows,), np.dtype(np.int32)),
        "top_ids": ((rows, top_k), np.dtype(np.int32)),
        "top_logprobs": ((rows, top_k), np.dtype(np.float32)),
        "log_tail_mass": ((rows,), np.dtype(np.float32)),
        "label_logprob": ((rows,), np.dtype(np.float32)),
        **{name: ((rows,), np.dtype(np.float32)) for name in extras},
        "done": ((rows,), np.dtype(np.uint8)),
    }
    layout, offset = {}, 0
    for name, (shape, dtype) in shapes.items():
        layout[name] = (offset, shape, dtype)
        offset += -(-int(np.prod(shape)) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return layout, offset
