"""vLLM's public prompt_logprobs as records: what the default teacher falls back to. No vllm import.

Its limits: the tail is 1 − Σ, the order among equals at the k-th place is vLLM's, and a padded vocabulary is
normalised with its padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_builder.engine import Capture
from cache_builder.scored_sequence import make_record
from storage_schemas.errors import RequestError
from storage_schemas.records import SequenceTopK, TokenSequence

SPARE_IDS = 16
"""Ids asked for beyond top_k where the model's vocabulary is padded, to be dropped if they are padding."""

TAIL_FLOOR = 2.0**-23
"""Least tail mass that 1 − Σ of float32 probabilities can tell from none: the spacing of float32 at 1."""


def count_asked(capture: Capture, model_vocab_size: int) -> int:
    """How many log-probabilities a row to ask vLLM for."""
    spare = SPARE_IDS if model_vocab_size > capture.vocab_size else 0
    return min(capture.top_k + spare, model_vocab_size)


def read_output(sequence: TokenSequence, output: Any, capture: Capture, model_vocab_size: int) -> SequenceTopK:
    """The record of one RequestOutput with flat_logprobs, prompt_logprobs and logprobs of `count_asked` ids.

    Each row holds the token that follows and then the largest. The prompt's first entry is empty, for nothing
    predicts the first token; the sampled token's entry is the last row.
    """
    parts = (output.prompt_logprobs, output.outputs[0].logprobs)
    shape = (len(sequence), count_asked(capture, model_vocab_size) + 1)
    ids = np.concatenate([np.asarray(part.token_ids, dtype=np.int64) for part in parts]).reshape(shape)
    logprobs = np.concatenate([np.asarray(part.logprobs, dtype=np.float32) for part in parts]).reshape(shape)
    top_ids, top_logprobs = _drop_padding(ids[:, 1:], logprobs[:, 1:], capture)
    return make_record(
        sequence,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        log_tail_mass=_implied_tail(top_logprobs, model_vocab_size),
        label_logprob=logprobs[:, 0],
        extras={},
    )


def _drop_padding(
    ids: NDArray[np.int64], logprobs: NDArray[np.float32], capture: Capture
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The first top_k columns that are no padding."""
    padding = ids >= capture.vocab_size
    order = np.argsort(padding, axis=1, kind="stable")[:, : capture.top_k]
    if np.take_along_axis(padding, order, axis=1).any():
        raise RequestError(
            f"expected at most {SPARE_IDS} padded ids among the most likely ones, got more; "
            'set capture_path = "worker", which leaves them out before it normalises'
        )
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)


def _implied_tail(top_logprobs: NDArray[np.float32], model_vocab_size: int) -> NDArray[np.float64]:
    """log(1 − Σ) [T], no less than log TAIL_FLOOR; -inf where nothing is left out."""
    if top_logprobs.shape[1] == model_vocab_size:
        return np.full(len(top_logprobs), -np.inf)
    mass = 1 - np.exp(top_logprobs.astype(np.float64)).sum(axis=1)
    floored: NDArray[np.float64] = np.log(np.maximum(mass, TAIL_FLOOR))
    return floored
