"""A token sequence and its raw rows, as whichever engine computed them, made into one record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage_schemas.records import SequenceTopK, TokenSequence, sort_rows


def make_record(
    sequence: TokenSequence,
    *,
    top_ids: NDArray[Any],
    top_logprobs: NDArray[Any],
    log_tail_mass: NDArray[Any],
    label_logprob: NDArray[Any],
    extras: Mapping[str, NDArray[Any]],
) -> SequenceTopK:
    """The record of a sequence: rows sorted, in the dtypes that are stored, no view of what came in.

    top_ids and top_logprobs: [T, k] in any order and dtype; the others [T]. The last label_logprob is set to NaN, for
    no token follows it.
    """
    top_ids, top_logprobs = sort_rows(top_ids, top_logprobs.astype(np.float32))
    label_logprob = label_logprob.astype(np.float32)
    label_logprob[-1] = np.nan
    return SequenceTopK(
        sequence_id=sequence.sequence_id,
        document_id=sequence.document_id,
        token_ids=sequence.token_ids.astype(np.int32),
        completion_mask=sequence.completion_mask,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        log_tail_mass=log_tail_mass.astype(np.float32),
        label_logprob=label_logprob,
        extras={name: values.astype(np.float32) for name, values in extras.items()},
    )
