"""Training rows → one torch batch: padded tokens, and the teacher's rows of the whole batch in one compact block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distiller.stream import TrainingRow


class Collator:
    """Rows → batch of B rows of T tokens with N positions that carry loss.

    input_ids, position_ids: [B, T] int64. attention_mask: [B, T] int64, left out where rows are packed (several
    documents in a row): there the position ids alone keep documents apart. row_index: [N] int64 into the B·T
    positions. teacher: top_ids [N, k] int64, top_logprobs [N, k] float32, log_tail_mass [N], label_ids [N] int64,
    label_logprob [N], extras {name: [N]}.
    packed: whether rows hold several documents. flatten: all rows after one another as one row without padding, as
    variable-length attention kernels want it.
    """

    def __init__(self, *, pad_token_id: int = 0, packed: bool = False, flatten: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.packed = packed
        self.flatten = flatten

    def __call__(self, rows: Sequence[TrainingRow]) -> dict[str, Any]:
        width = max(len(row) for row in rows)
        starts = np.arange(len(rows)) * width
        if self.flatten:
            starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
            width = sum(len(row) for row in rows)
        shape = (1 if self.flatten else len(rows), width)
        tokens = np.full(shape, self.pad_token_id, dtype=np.int64).reshape(-1)
        positions = np.zeros(shape, dtype=np.int64).reshape(-1)
        attended = np.zeros(shape, dtype=np.int64).reshape(-1)
        for row, start in zip(rows, starts, strict=True):
            stop = start + len(row)
            tokens[start:stop], positions[start:stop], attended[start:stop] = row.token_ids, row.position_ids, 1
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(tokens.reshape(shape)),
            "position_ids": torch.from_numpy(positions.reshape(shape)),
            "row_index": _join([row.positions + start for row, start in zip(rows, starts, strict=True)], np.int64),
            "teacher": {
                "top_ids": _join([row.top_ids for row in rows], np.int64),
                "top_logprobs": _join([row.top_logprobs for row in rows], np.float32),
                "log_tail_mass": _join([row.log_tail_mass for row in rows], np.float32),
                "label_ids": _join([row.label_ids for row in rows], np.int64),
                "label_logprob": _join([row.label_logprob for row in rows], np.float32),
                "extras": {name: _join([row.extras[name] for row in rows], np.float32) for name in rows[0].extras},
            },
        }
        if not (self.packed or self.flatten):
            batch["attention_mask"] = torch.from_numpy(attended.reshape(shape))
        return batch


def _join(parts: Sequence[np.ndarray[Any, Any]], dtype: Any) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype, copy=False))
