"""The default teacher on real vLLM: against the reference teacher, a planted one, and its own public path.

Engines start slowly, so few are started: the workers are told with each batch what to capture, which lets one engine
serve several captures here.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_builder import vllm_arguments, vllm_capture, vllm_engine
from cache_builder.engine import Capture, Sampling
from cache_builder.engine_settings import EngineSettings
from cache_builder.open_engine import open_engine
from storage_schemas.errors import RequestError
from storage_schemas.records import EXTRAS, SequenceTopK, TokenSequence, find_defect

pytestmark = pytest.mark.vllm

MODEL_VOCAB, VOCAB, TOP_K = 320, 300, 16  # the models' vocabularies are padded
MAX_LENGTH = 64  # the models' own limit
BATCHED_TOKENS = 40  # less than a long sequence: prefill comes in chunks, and steps mix requests
LENGTHS = (1, MAX_LENGTH, 2, 39, 40, 41, 63, 1, 17)

CROSS_ENGINE = 1e-4
"""Nats. float32 on both sides; other kernels add up in another order. Measured 5e-6 on this teacher."""


def save_teacher(path: Path, planted: bool) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=MODEL_VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.2,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
    if planted:
        with torch.no_grad():
            for layer in model.model.layers:  # layers that add nothing: the current token is all that counts
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            embedding, head, _ = planted_weights()
            model.model.embed_tokens.weight.copy_(embedding)
            model.lm_head.weight.copy_(head)
    model.save_pretrained(path)
    return path


def planted_weights() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Embedding, head, and logits [token, id] in float64: the largest logit of token t is that of id 7 t mod VOCAB."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(MODEL_VOCAB, 64, generator=generator), dim=1)
    head = torch.empty(MODEL_VOCAB, 64)
    head[torch.arange(VOCAB) * 7 % VOCAB] = directions[:VOCAB]
    head[VOCAB:] = directions[VOCAB:]
    logits = (directions.double() * 64**0.5) @ head.double().T  # the final norm makes the length √64
    return directions, head, logits.numpy()


def make_sequences(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    return [
        TokenSequence(f"s{at}", f"d{at}", rng.integers(0, VOCAB, size).astype(np.int32), np.arange(size) > 0)
        for at, size in enumerate(lengths)
    ]


def open_vllm(path: Path, capture: Capture, **settings: Any) -> vllm_engine.VLLMEngine:
    table = {"model": str(path), "dtype": "float32", "enforce_eager": True, **settings}
    engine = open_engine(EngineSettings.model_validate(table), capture)
    assert isinstance(engine, vllm_engine.VLLMEngine)
    return engine


def score(
    engine: vllm_engine.VLLMEngine, capture: Capture | None = None, sequences: Sequence[TokenSequence] | None = None
) -> list[SequenceTopK]:
    before = engine._capture
    engine._capture = capture = capture or before
    sequences = make_sequences() if sequences is None else sequences
    try:
        records = list(engine.score(sequences))
    finally:
        engine._capture = before
    assert [record.sequence_id for record in records] == [sequence.sequence_id for sequence in sequences]
    for sequence, record in zip(sequences, records, strict=True):
        np.testing.assert_array_equal(record.token_ids, sequence.token_ids)
        np.testing.assert_array_equal(record.completion_mask, sequence.completion_mask)
        defect = find_defect(record, vocab_size=capture.vocab_size, top_k=capture.top_k, extras=capture.extras)
        assert defect is None, defect
        assert np.isnan(record.label_logprob[-1])
    return records


def assert_same_rows(left: Sequence[SequenceTopK], right: Sequence[SequenceTopK], tolerance: float) -> None:
    """Equal up to rounding; an id may stand in for another at the k-th place only if both have its log-probability."""
    for a, b in zip(left, right, strict=True):
        for row in range(len(a)):
            own, other = (dict(zip(x.top_ids[row].tolist(), x.top_logprobs[row].tolist(), strict=True)) for x in (a, b))
            for token_id in own.keys() | other.keys():
                gap = own.get(token_id, a.top_logprobs[row, -1]) - other.get(token_id, b.top_logprobs[row, -1])
                assert abs(gap) <= tolerance
        np.testing.assert_allclose(a.log_tail_mass, b.log_tail_mass, atol=tolerance, rtol=0)
        np.testing.assert_allclose(a.label_logprob, b.label_logprob, atol=tolerance, rtol=0)
        for name in a.extras:
            np.testing.assert_allclose(a.extras[name], b.extras[name], atol=tolerance, rtol=0)


def assert_planted(records: Sequence[SequenceTopK], logits: np.ndarray, tail_tolerance: float) -> None:
    """Every row is the distribution that was planted for its token. logits: [VOCAB, V], normalised here over V."""
    planted = torch.from_numpy(logits).log_softmax(1).numpy()
    for record in records:
        np.testing.assert_array_equal(record.top_ids[:, 0], record.token_ids.astype(np.int64) * 7 % VOCAB)
        rows = planted[record.token_ids][:, :VOCAB]
        np.testing.assert_allclose(
            record.top_logprobs, -np.sort(-rows, axis=1)[:, : record.top_k], atol=CROSS_ENGINE, rtol=0
        )
        at = np.take_along_axis(rows, record.top_ids, axis=1)
        np.testing.assert_allclose(record.top_logprobs, at, atol=CROSS_ENGINE, rtol=0)
        label = rows[np.arange(len(record) - 1), record.token_ids[1:]]
        np.testing.assert_allclose(record.label_logprob[:-1], label, atol=CROSS_ENGINE, rtol=0)
        tail = np.log1p(-np.exp(at).sum(1))
        np.testing.assert_allclose(record.log_tail_mass, tail, atol=tail_tolerance, rtol=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("tiny"), planted=False)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("planted"), planted=True)


@pytest.fixture(scope="module")
def worker(tiny: Path) -> Iterator[vllm_engine.VLLMEngine]:
    engine = open_vllm(
        tiny, Capture(TOP_K, VOCAB, EXTRAS), max_model_len=MAX_LENGTH, max_num_batched_tokens=BATCHED_TOKENS
    )
    assert engine.provenance()["capture_path"] == "worker"
    yield engine
    engine.close()


def test_the_worker_path_is_the_reference_teacher(tiny: Path, worker: vllm_engine.VLLMEngine) -> None:
    for capture in (worker._capture, Capture(VOCAB, VOCAB, EXTRAS), Capture(1, MODEL_VOCAB)):
        reference = open_engine(EngineSettings(name="hf", model=str(tiny)), capture)
        records = score(worker, capture)
        assert_same_rows(records, list(reference.score(make_sequences())), CROSS_ENGINE)
        assert all(np.isneginf(record.log_tail_mass).all() == (capture.top_k == VOCAB) for record in records)


def test_a_batch_does_not_depend_on_what_came_before(worker: vllm_engine.VLLMEngine) -> None:
    first = score(worker)
    score(worker, sequences=make_sequences([MAX_LENGTH] * 5, seed=1))
    assert list(worker.score([])) == []
    for a, b in zip(first, score(worker), strict=True):
        assert a.extras.keys() == b.extras.keys() == set(EXTRAS)
        for left, right in [
            *((getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.name != "extras"),
            *((a.extras[name], b.extras[name]) for name in EXTRAS),
        ]:
            assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_records_outlive_the_next_batch(worker: vllm_engine.VLLMEngine) -> None:
    late = worker.score(make_sequences())
    other = score(worker, sequences=make_sequences(seed=1))
    assert_same_rows(list(late), score(worker), tolerance=0)
    assert (other[1].top_ids != score(worker)[1].top_ids).any()


def test_sequences_that_cannot_be_scored_are_refused(worker: vllm_engine.VLLMEngine) -> None:
    with pytest.raises(RequestError, match=r"sequences of 1 to 64 tokens, got 65 in s1"):
        worker.score(make_sequences([3, MAX_LENGTH + 1]))
    stray = TokenSequence("s", "d", np.array([1, VOCAB], dtype=np.int32), np.array([False, True]))
    with pytest.raises(RequestError, match=r"token ids below 300, got 300 in s"):
        worker.score([stray])
    score(worker)  # and the engine is as good as before


def test_answers_are_the_reference_teachers_and_have_seeds_of_their_own(
    tiny: Path, worker: vllm_engine.VLLMEngine
) -> None:
    reference = open_engine(EngineSettings(name="hf", model=str(tiny)), Capture(1, VOCAB))
    prompts = [sequence.token_ids for sequence in make_sequences((1, 33, 2, 60, 17))]  # 60 is prefilled in chunks
    rooms = [min(20, MAX_LENGTH - len(prompt)) for prompt in prompts]
    greedy = [Sampling(max_tokens=room, temperature=0) for room in rooms]
    stop = int(reference.generate(prompts[:1], greedy[:1])[0].token_ids[3])
    for asked in (greedy, [dataclasses.replace(own, stop_token_ids=(stop,)) for own in greedy]):
        answers, expected = worker.generate(prompts, asked), reference.generate(prompts, asked)
        assert [answer.token_ids.tolist() for answer in answers] == [own.token_ids.tolist() for own in expected]
        assert [answer.finish_reason for answer in answers] == [own.finish_reason for own in expected]
    assert (answers[0].token_ids[-1], answers[0].finish_reason) == (stop, "stop")
    assert answers[3].finish_reason == "length"
    # Seeded sampling, where every id is likely: none of the padding, and the same answers in any company.
    short = [prompt for prompt in prompts if len(prompt) <= BATCHED_TOKENS]
    warm = [Sampling(max_tokens=20, temperature=2.0, seed=2**62 + at) for at in range(len(short))]
    first, backwards = worker.generate(short, warm), worker.generate(short[::-1], warm[::-1])[::-1]
    assert [answer.token_ids.tolist() for answer in first] == [answer.token_ids.tolist() for answer in backwards]
    assert max(int(answer.token_ids.max()) for answer in first) < VOCAB
    again = worker.generate(short, [dataclasses.replace(own, seed=own.seed + 9) for own in warm])
    assert [answer.token_ids.tolist() for answer in first] != [answer.token_ids.tolist() for answer in again]
    assert_same_rows(
        score(worker),
        list(open_engine(EngineSettings(name="hf", model=str(tiny)), worker._capture).score(make_sequences())),
        CROSS_ENGINE,
    )  # and it captures as before


def test_where_the_hook_moved_the_public_path_gives_the_same_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, worker: vllm_engine.VLLMEngine
) -> None:
    monkeypatch.setattr(vllm_capture, "V1_HOOK", "_renamed")
    monkeypatch.setattr(vllm_capture, "V2_HOOK", "renamed")
    unpadded = Capture(TOP_K, MODEL_VOCAB)
    with pytest.warns(UserWarning, match=r"CPUModelRunner has neither _renamed nor renamed.*prompt_logprobs") as caught:
        public = open_vllm(tiny, unpadded)
    assert len([item for item in caught if "prompt_logprobs" in str(item.message)]) == 1
    assert public.provenance()["capture_path"] == "public"
    try:
        assert_same_rows(score(public), score(worker, unpadded), CROSS_ENGINE)
        whole = score(public, sequences=make_sequences([MAX_LENGTH]))  # unchunked there, chunked in the workers
        assert_same_rows(whole, score(worker, unpadded, make_sequences([MAX_LENGTH])), CROSS_ENGINE)
        public._capture = Capture(TOP_K, MODEL_VOCAB, ("entropy",))
        with pytest.raises(RequestError, match=r"no extras from prompt_logprobs, got entropy; use capture_path"):
            public._choose_path("public")
        with pytest.raises(RequestError, match=r"cannot capture in its workers \(CPUModelRunner has neither"):
            public._choose_path("worker")
    finally:
        public.close()


def test_a_planted_teacher_is_read_at_every_position(monkeypatch: pytest.MonkeyPatch, planted: Path) -> None:
    # The same token after other tokens, at other places: whoever mixes up rows or requests is found out. Prefix
    # caching is on against our settings, and the batch is repeated: a warm cache would leave rows out.
    _, _, logits = planted_weights()
    monkeypatch.setitem(vllm_arguments.FIXED, "enable_prefix_caching", True)
    capture = Capture(TOP_K, VOCAB)
    engine = open_vllm(planted, capture, capture_path="worker", extra_args={"block_size": 32})
    sequences = [*make_sequences(), *make_sequences()[:3]]
    for _ in range(2):
        assert_planted(score(engine, sequences=sequences), logits[:VOCAB, :VOCAB], CROSS_ENGINE)
    reference = open_engine(EngineSettings(name="hf", model=str(planted)), capture)
    assert_planted(list(reference.score(sequences)), logits[:VOCAB, :VOCAB], CROSS_ENGINE)
    monkeypatch.setitem(vllm_engine._PREFILL, "skip_reading_prefix_cache", False)
    with pytest.raises(RuntimeError, match=r"vLLM left out \d+ of \d+ positions, the first in the sequence s1"):
        engine.score(make_sequences())
    assert engine._llm is None  # a broken engine is closed


def test_the_public_path_drops_padded_ids_and_says_what_it_cannot(planted: Path) -> None:
    with pytest.warns(UserWarning, match=r"20 ids beyond the tokenizer's 300.*stays in the tail"):
        engine = open_vllm(planted, Capture(TOP_K, VOCAB), capture_path="public", max_num_batched_tokens=BATCHED_TOKENS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # once is enough
            records = score(engine)
        _, _, logits = planted_weights()
        assert_planted(records, logits[:VOCAB], CROSS_ENGINE)
        best = np.argsort(-logits, axis=1)[:, :TOP_K]
        assert any((best[record.token_ids] >= VOCAB).any() for record in records)  # padding was there to drop
    finally:
        engine.close()


def test_a_float32_head_on_a_half_precision_model(tiny: Path) -> None:
    engine = open_vllm(tiny, Capture(TOP_K, VOCAB), dtype="bfloat16", head_dtype="float32")
    try:
        assert {name: engine.provenance()[name] for name in ("dtype", "head_dtype")} == {
            "dtype": "bfloat16",
            "head_dtype": "float32",
        }
        records = score(engine)
    finally:
        engine.close()
    ties = sum((np.diff(record.top_logprobs, axis=1) == 0).sum() for record in records)
    assert ties == 0  # a bfloat16 head has 8 bits for a logit: a fifth of these neighbours would tie


@pytest.mark.parametrize(
    ("settings", "capture", "expected"),
    [
        (
            {"extra_args": {"max_num_sequences": 4}},
            Capture(8, VOCAB),
            "no engine argument 'max_num_sequences'; did you",
        ),
        ({"extra_args": {"seed": 1}}, Capture(8, VOCAB), "expected no 'seed' in extra_args"),
        ({"extra_args": {"enable_prefix_caching": True}}, Capture(8, VOCAB), "expected no 'enable_prefix_caching'"),
        ({"max_model_len": MAX_LENGTH + 1}, Capture(8, VOCAB), r"max_model_len \(65\) is greater"),
        ({}, Capture(MODEL_VOCAB + 1, VOCAB), "expected top_k from 1 to the vocabulary of 300 ids, got 321"),
        ({}, Capture(8, MODEL_VOCAB + 1), "within the model's 320 ids, got 321"),
        ({"model": "/nowhere/teacher"}, Capture(8, VOCAB), "vLLM refuses the teacher /nowhere/teacher"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(
    tiny: Path, settings: dict[str, Any], capture: Capture, expected: str
) -> None:
    with pytest.raises(RequestError, match=expected) as refusal:
        open_vllm(tiny, capture, **settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.long
def test_preempted_requests_are_whole(tiny: Path, worker: vllm_engine.VLLMEngine) -> None:
    # Four sequences grow together, a few tokens each a step, in a cache that holds less than two of them.
    engine = open_vllm(
        tiny,
        worker._capture,
        max_num_batched_tokens=64,
        extra_args={
            "num_gpu_blocks_override": 5,
            "block_size": 32,
            "long_prefill_token_threshold": 8,
            "scheduler_reserve_full_isl": False,
        },
    )
    sequences = make_sequences([MAX_LENGTH - 1] * 6)
    preemptions = []
    scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
    original = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        preemptions.append(request.request_id)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    records = score(engine, sequences=sequences)
    assert preemptions
    assert_same_rows(records, score(worker, sequences=sequences), CROSS_ENGINE)
    engine.close()


def score_in_two_ranks(tiny: str) -> None:
    """What the next test runs in a process of its own."""
    capture = Capture(TOP_K, VOCAB, EXTRAS)
    engine = open_vllm(Path(tiny), capture, tensor_parallel_size=2, max_num_batched_tokens=BATCHED_TOKENS)
    try:
        records = [score(engine), score(engine)]
    finally:
        engine.close()
    reference = open_engine(EngineSettings(name="hf", model=tiny), capture)
    for own in records:
        assert_same_rows(own, list(reference.score(make_sequences())), CROSS_ENGINE)


@pytest.mark.long
def test_two_tensor_parallel_ranks(tiny: Path) -> None:
    # vLLM keeps the environment of a process's first engine, and two ranks on a CPU need their cores named.
    code = (
        f"from tests.test_vllm_engine import score_in_two_ranks as run\nif __name__ == '__main__': run({str(tiny)!r})"
    )
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
