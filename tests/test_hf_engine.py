"""The reference teacher against the definition, written out once more in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cache_builder.engine import Capture
from cache_builder.engine_settings import EngineSettings
from cache_builder.hf_engine import HFEngine
from cache_builder.open_engine import open_engine
from storage_schemas.errors import RequestError
from storage_schemas.records import EXTRAS, SequenceTopK, TokenSequence, find_defect

MODEL_VOCAB, VOCAB = 320, 300  # the model's vocabulary is padded
MAX_LENGTH = 64


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=MODEL_VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():  # ids that tie at every position: 40..59 share one row of the head
        model.lm_head.weight[40:60] = model.lm_head.weight[40]
        model.lm_head.weight[VOCAB:] *= 3  # padding that would win, if it were let
    return model


@pytest.fixture(scope="module")
def model_dir(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(path)
    return path


def make_sequences(lengths: Sequence[int]) -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    return [
        TokenSequence(f"s{at}", f"d{at}", rng.integers(0, VOCAB, size).astype(np.int32), np.arange(size) > 0)
        for at, size in enumerate(lengths)
    ]


def definition(model: LlamaForCausalLM, sequence: TokenSequence) -> np.ndarray:
    """Log-probabilities [T, VOCAB] in float64, of the logits without the padding."""
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(sequence.token_ids.astype(np.int64))[None]).logits[0]
    return logits[:, :VOCAB].double().log_softmax(-1).numpy()


def check(record: SequenceTopK, logprobs: np.ndarray, top_k: int, extras: tuple[str, ...]) -> None:
    assert find_defect(record, vocab_size=VOCAB, top_k=top_k, extras=extras) is None
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :top_k]  # equal log-probabilities by ascending id
    np.testing.assert_array_equal(record.top_ids, order)
    # float32 of the stored values, nothing else: the same logits in the same arithmetic
    tolerance = {"rtol": 2e-7, "atol": 1e-12}
    np.testing.assert_allclose(record.top_logprobs, np.take_along_axis(logprobs, order, axis=1), **tolerance)
    rest = logprobs.copy()
    np.put_along_axis(rest, order, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(record.log_tail_mass, np.log(np.exp(rest).sum(1)), **tolerance)
        wanted = {
            "entropy": -(np.exp(logprobs) * logprobs).sum(1),
            "log_rest_sqrt_sum": np.log(np.exp(rest / 2).sum(1)),
        }
    label = logprobs[np.arange(len(record) - 1), record.token_ids[1:]]
    np.testing.assert_allclose(record.label_logprob[:-1], label, **tolerance)
    assert np.isnan(record.label_logprob[-1])
    for name in extras:
        np.testing.assert_allclose(record.extras[name], wanted[name], rtol=1e-6)


@pytest.mark.parametrize(("top_k", "extras"), [(1, ()), (16, EXTRAS), (50, ("entropy",)), (VOCAB, EXTRAS)])
def test_every_row_is_the_definition(
    model: LlamaForCausalLM, model_dir: Path, top_k: int, extras: tuple[str, ...]
) -> None:
    engine = open_engine(EngineSettings(name="hf", model=str(model_dir)), Capture(top_k, VOCAB, extras))
    assert isinstance(engine, HFEngine)
    sequences = make_sequences([1, 2, MAX_LENGTH, 17])
    records = list(engine.score(sequences))
    assert [record.sequence_id for record in records] == [sequence.sequence_id for sequence in sequences]
    for sequence, record in zip(sequences, records, strict=True):
        assert record.document_id == sequence.document_id
        np.testing.assert_array_equal(record.token_ids, sequence.token_ids)
        np.testing.assert_array_equal(record.completion_mask, sequence.completion_mask)
        check(record, definition(model, sequence), top_k, extras)
        assert np.isneginf(record.log_tail_mass).all() == (top_k == VOCAB)
    engine.close()


def test_the_smallest_of_equal_ids_are_kept(model_dir: Path) -> None:
    engine = HFEngine(EngineSettings(name="hf", model=str(model_dir)), Capture(VOCAB - 1, VOCAB))
    full = next(engine.score(make_sequences([40])))
    rank = int(np.flatnonzero(full.top_ids[0] == 40)[0])
    assert full.top_ids[0, rank : rank + 20].tolist() == list(range(40, 60))
    half = HFEngine(EngineSettings(name="hf", model=str(model_dir)), Capture(rank + 7, VOCAB))
    assert next(half.score(make_sequences([40]))).top_ids[0, rank:].tolist() == list(range(40, 47))


def test_a_float32_head_on_a_half_precision_model(model: LlamaForCausalLM, model_dir: Path) -> None:
    sequences = make_sequences([33])
    exact = definition(model, sequences[0])
    gaps = {}
    for head_dtype in ("model", "float32"):
        settings = EngineSettings(name="hf", model=str(model_dir), dtype="bfloat16", head_dtype=head_dtype)
        record = next(HFEngine(settings, Capture(16, VOCAB)).score(sequences))
        assert find_defect(record, vocab_size=VOCAB, top_k=16) is None
        gaps[head_dtype] = np.abs(np.take_along_axis(exact, record.top_ids, axis=1) - record.top_logprobs).mean()
        ties = (np.diff(record.top_logprobs, axis=1) == 0) & (record.top_ids[:, 1:] - 40 >= 20)
        assert ties.any() == (head_dtype == "model")  # bfloat16 logits tie beyond the planted twins
    assert 0 < gaps["float32"] < gaps["model"] < 0.5


@pytest.mark.parametrize(
    ("settings", "capture", "expected"),
    [
        ({}, Capture(VOCAB + 1, VOCAB), "expected top_k from 1 to the vocabulary of 300 ids, got 301"),
        ({}, Capture(0, VOCAB), "got 0"),
        ({}, Capture(8, MODEL_VOCAB + 1), "within the model's 320 ids, got 321"),
        ({}, Capture(8, VOCAB, ("variance",)), "unknown extras variance; known are entropy, log_rest_sqrt_sum"),
        ({"tensor_parallel_size": 2, "quantization": "fp8"}, Capture(8, VOCAB), "quantization, tensor_parallel_size"),
        ({"max_model_len": MAX_LENGTH + 1}, Capture(8, VOCAB), "max_model_len of at most 64"),
        ({"model": "/nowhere/teacher"}, Capture(8, VOCAB), "cannot load the teacher /nowhere/teacher"),
    ],
)
def test_what_cannot_be_done_is_refused(
    model_dir: Path, settings: dict[str, object], capture: Capture, expected: str
) -> None:
    with pytest.raises(RequestError, match=expected):
        HFEngine(EngineSettings.model_validate({"name": "hf", "model": str(model_dir), **settings}), capture)


def test_sequences_that_cannot_be_scored_are_refused(model_dir: Path) -> None:
    engine = HFEngine(EngineSettings(name="hf", model=str(model_dir), max_model_len=32), Capture(8, VOCAB))
    assert len(next(engine.score(make_sequences([32])))) == 32
    with pytest.raises(RequestError, match=r"sequences of 1 to 32 tokens, got 33 in s1"):
        engine.score(make_sequences([5, 33]))
    stray = TokenSequence("s", "d", np.array([1, VOCAB], dtype=np.int32), np.array([False, True]))
    with pytest.raises(RequestError, match=r"token ids below 300, got 300 in s"):
        engine.score([stray])
