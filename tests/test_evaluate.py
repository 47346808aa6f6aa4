from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distiller.collate import Collator
from distiller.evaluate import bootstrap_intervals, evaluate, measure_batch, measure_rows
from distiller.stream import CacheDataset
from distiller.worst import WorstTargets
from storage_schemas.reader import CacheReader
from tests.students import make_student
from tests.teacher_cache import write_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return write_cache(tmp_path_factory.mktemp("evaluate") / "cache", make_student(seed=1))


@torch.no_grad()
def slow_figures(model: torch.nn.Module, cache: CacheReader) -> dict[str, float]:
    """The definitions, one position at a time, in float64."""
    kl = nll = teacher_nll = agreed = 0.0
    count = 0
    dataset = CacheDataset(cache)
    for i in range(len(dataset)):
        row = dataset[i]
        logits = model(input_ids=torch.from_numpy(row.token_ids.astype(np.int64))[None]).logits[0].double()
        log_q = logits.log_softmax(-1).numpy()
        for place, position in enumerate(row.positions):
            ids, log_p = row.top_ids[place], row.top_logprobs[place].astype(np.float64)
            inside = log_q[position, ids]
            rest = np.log(np.exp(np.delete(log_q[position], ids)).sum())
            mass = math.exp(row.log_tail_mass[place])
            kl += float((np.exp(log_p) * (log_p - inside)).sum() + mass * (row.log_tail_mass[place] - rest))
            nll -= float(log_q[position, row.label_ids[place]])
            teacher_nll -= float(row.label_logprob[place])
            agreed += float(log_q[position].argmax() == ids[0])
            count += 1
    return {
        "kl": kl / count,
        "perplexity": math.exp(nll / count),
        "teacher_perplexity": math.exp(teacher_nll / count),
        "top1_agreement": agreed / count,
        "targets": float(count),
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_figures_are_their_definitions(cache: CacheReader, architecture: str) -> None:
    student = make_student(architecture).eval()
    expected = slow_figures(student, cache)
    for batch_size in (1, 3):
        figures = evaluate(student, cache, batch_size=batch_size)
        assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)  # float32 logits


def test_the_teacher_itself_is_at_zero(cache: CacheReader) -> None:
    figures = evaluate(make_student(seed=1), cache)
    assert abs(figures["kl"]) < 1e-3  # what the codec rounds
    assert figures["top1_agreement"] > 0.97  # ties after rounding
    assert figures["perplexity"] == pytest.approx(figures["teacher_perplexity"], rel=1e-3)


def test_evaluation_leaves_the_model_as_it_was(cache: CacheReader) -> None:
    student = make_student().train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    evaluate(student, cache)
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_rows_without_targets_have_no_figures(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", make_student(seed=1), lengths=(5, 6), shards=1, prompt=6)
    figures = evaluate(make_student(), cache)
    assert figures["targets"] == 0
    assert math.isnan(figures["kl"])


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Documents of random KL around 1: 95 % intervals of 200 worlds."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        documents = generator.gamma(4.0, 0.25, 60)
        table = np.zeros((120, 5))
        table[:, 0] = 10
        table[:, 1] = np.repeat(documents, 2) * 10  # two sequences of each document, alike
        table[:, 2:4] = 1.0
        clusters = [f"d{i // 2}" for i in range(120)]
        found = bootstrap_intervals(table, clusters, samples=200)
        covered += found["kl_low"] <= 1.0 <= found["kl_high"]
    # 95 % nominal; a bootstrap over 60 documents falls a little short, sequences taken alone would give about 84 %
    assert 0.90 <= covered / 200 <= 0.98


def test_intervals_are_the_same_every_time_and_contain_the_figure(cache: CacheReader) -> None:
    first = evaluate(make_student(), cache, bootstrap_samples=100)
    second = evaluate(make_student(), cache, bootstrap_samples=100)
    assert first == second
    for name in ("kl", "perplexity", "top1_agreement"):
        assert first[f"{name}_low"] <= first[name] <= first[f"{name}_high"]


def test_the_worst_targets_are_those_of_a_full_sort(cache: CacheReader, tmp_path: Path) -> None:
    student = make_student().eval()
    dataset = CacheDataset(cache)
    worst = WorstTargets(7)
    everything = WorstTargets(10_000)
    for collector, batch_size in ((worst, 3), (everything, 1)):
        measure_rows(
            lambda batch: measure_batch(student, batch, dataset.vocab_size),
            dataset,
            Collator(),
            batch_size=batch_size,
            device=torch.device("cpu"),
            worst=collector,
        )
    found, sorted_all = worst.targets(), everything.targets()
    assert len(sorted_all) == sum(len(dataset[i].positions) for i in range(len(dataset)))
    assert [target.kl for target in sorted_all] == sorted((target.kl for target in sorted_all), reverse=True)
    assert [(t.sequence_id, t.position) for t in found] == [(t.sequence_id, t.position) for t in sorted_all[:7]]
    record = next(r for r in cache if r.sequence_id == found[0].sequence_id)
    assert found[0].context_ids[-1] == record.token_ids[found[0].position]
    assert found[0].label_id == record.token_ids[found[0].position + 1]
    assert found[0].top_ids == record.top_ids[found[0].position][:5].tolist()
    halves = [everything.targets()[::2], everything.targets()[1::2]]
    assert worst.merge(halves) == sorted_all[:7]
