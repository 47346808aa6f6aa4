"""What an estimate says, against what a build then does."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from click.testing import CliRunner

from cache_builder.build import run
from cache_builder.cli import main
from cache_builder.config import BuildSettings
from cache_builder.estimate import estimate, render_estimate
from storage_schemas.codecs import CODECS, RowLayout, bound_payload, encode_sequence
from storage_schemas.errors import RequestError
from tests.records import make_record


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    generator = random.Random(0)
    words = ["the", "teacher", "reads", "what", "a", "cache", "holds"]
    with path.open("w") as file:
        for _ in range(60):
            file.write(json.dumps({"text": " ".join(generator.choices(words, k=generator.randint(2, 40)))}) + "\n")
    return path


def make_settings(teacher, dataset, output, **cache):
    return BuildSettings.model_validate(
        {
            "engine": {"name": "hf", "model": str(teacher)},
            "corpus": {"dataset": str(dataset), "max_length": 48},
            "cache": {"output": str(output), "top_k": 8, "shard_tokens": 400, **cache},
        }
    )


@pytest.mark.parametrize(("codec", "container"), [("ld8", "arrow"), ("ld16", "zarr")])
def test_a_whole_reading_is_exact_and_its_bytes_are_a_bound(tmp_path, tiny_model_dir, documents, codec, container):
    settings = make_settings(tiny_model_dir, documents, tmp_path / "cache", codec=codec, format=container)
    found = estimate(settings, progress=False)
    assert not (tmp_path / "cache").exists()
    built = run(settings, progress=False)
    for name in ("sequences", "tokens", "targets"):
        amount = getattr(found, name)
        assert (amount.total, amount.standard_error) == (pytest.approx(built.counts[name]), 0)
    assert built.bytes < found.bytes.total
    assert found.hours is None
    assert not found.bytes_are_measured
    text = render_estimate(found)
    assert "upper bound" in text
    assert "every document was tokenised" in text
    assert "give --tokens-per-second, or --measure" in text


def test_a_measured_estimate_is_what_the_build_takes(tmp_path, tiny_model_dir, documents, monkeypatch):
    """One shard, so that both have the same fixed parts; the plan and the manifest are not in what is measured."""
    settings = make_settings(tiny_model_dir, documents, tmp_path / "cache", shard_tokens=100000)
    found = estimate(settings, measure=True, progress=False)
    assert not (tmp_path / "cache").exists()
    built = run(settings, progress=False)
    shards = sum(file.stat().st_size for file in (tmp_path / "cache" / "shards").iterdir())
    # The whole corpus is measured, in another order: zstd has each sequence by itself, the index numbers vary a little.
    assert found.measurement.tokens == built.tokens
    assert found.bytes.total == pytest.approx(shards, rel=0.01)
    assert found.bytes_are_measured
    assert found.hours.total == pytest.approx(built.tokens / found.measurement.tokens_per_second / 3600)
    assert "were measured with ld8 at top_k = 8 in arrow" in render_estimate(found)


def test_the_standard_error_is_that_of_many_drawings(tmp_path, tiny_model_dir, documents, monkeypatch):
    """Over many seeds the totals are unbiased, and scatter as the formula says."""
    import cache_builder.estimate as module

    settings = make_settings(tiny_model_dir, documents, tmp_path / "cache")
    exact = estimate(settings, progress=False).tokens.total
    totals, errors = [], []
    for seed in range(60):
        monkeypatch.setattr(module, "SEED", seed)
        found = estimate(settings, sample=20, progress=False)
        assert found.sampled_documents == 20
        totals.append(found.tokens.total)
        errors.append(found.tokens.standard_error)
    expected = np.mean(errors)
    assert abs(np.mean(totals) - exact) < 4 * expected / 60**0.5
    # The standard deviation of 60 values is known to 1 / √118 = 9 %; 0.3 is three of those.
    assert np.std(totals, ddof=1) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_no_payload_exceeds_the_bound(codec):
    for tokens, top_k, vocab_size in [(1, 1, 7), (9, 3, 300), (200, 33, 150_000)]:
        layout = RowLayout(top_k, vocab_size)
        record = make_record(tokens, tokens=tokens, top_k=top_k, vocab_size=vocab_size)
        size = len(encode_sequence(CODECS[codec], layout, record))
        assert 0 < size <= bound_payload(CODECS[codec], layout, tokens)


def test_the_command(tmp_path, tiny_model_dir, documents, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["estimate", "--engine", "hf", "--teacher", str(tiny_model_dir), "--dataset", str(documents)]
    arguments += ["--max-length", "48", "--top-k", "8", "--sample", "25"]
    done = CliRunner().invoke(main, [*arguments, "--tokens-per-second", "500", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["documents"], found["sampled_documents"]) == (60, 25)
    assert found["hours"]["total"] == pytest.approx(found["tokens"]["total"] / 500 / 3600)
    assert found["tokens"]["standard_error"] > 0
    text = CliRunner().invoke(main, [*arguments, "--tokens-per-second", "500"]).stdout
    assert re.search(r"^tokens +[\d,]+  ± [\d,]+$", text, re.MULTILINE)
    assert re.search(r"^hours +\d", text, re.MULTILINE)
    assert "the speed is as given" in text
    assert not list(tmp_path.iterdir())


def test_mistakes_get_one_sentence(tmp_path, tiny_model_dir, documents):
    settings = make_settings(tiny_model_dir, documents, tmp_path / "cache")
    with pytest.raises(RequestError, match="either a given speed or a measured one"):
        estimate(settings, tokens_per_second=1, measure=True, progress=False)
    with pytest.raises(RequestError, match="sample of at least 2 documents, got 1"):
        estimate(settings, sample=1, progress=False)
    with pytest.raises(RequestError, match="top_k of at most the vocabulary's 300 ids, got 301"):
        estimate(make_settings(tiny_model_dir, documents, tmp_path / "c", top_k=301), progress=False)
    answering = BuildSettings.model_validate({**settings.model_dump(), "generate": {}})
    with pytest.raises(RequestError, match="got prompts to answer"):
        estimate(answering, progress=False)
