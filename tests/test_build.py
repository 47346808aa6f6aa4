"""The builder from a dataset to a sealed cache, with the reference engine."""

import dataclasses
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import cache_builder.build
from cache_builder.build import run
from cache_builder.cli import main
from cache_builder.config import BuildSettings
from storage_schemas.errors import IdentityMismatch
from storage_schemas.reader import CacheReader
from tests.planted import assert_planted, make_planted_teacher

ROUNDING = 1e-3  # nats: float32 logits of another order of summation, on top of ld16's 1e-4


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    words = [
        "the",
        "teacher",
        "reads",
        "text",
        "once",
        "student",
        "learns",
        "what",
        "it",
        "left",
        "of",
        "every",
        "token",
    ]
    generator = random.Random(0)
    with path.open("w") as file:
        for _ in range(24):
            file.write(json.dumps({"text": " ".join(generator.choices(words, k=generator.randint(4, 30)))}) + "\n")
    return path


def make_settings(teacher, dataset, output, **changes):
    table = {
        "engine": {"name": "hf", "model": str(teacher)},
        "corpus": {"dataset": str(dataset), "max_length": 48},
        "cache": {"output": str(output), "top_k": 8, "shard_tokens": 60, "codec": "ld16"},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        table[section][key] = value
    return BuildSettings.model_validate(table)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(Path(path).rglob("*")) if file.is_file()}


def assert_same_cache(left, right):
    left, right = contents(left), contents(right)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_model_dir, documents):
    output = tmp_path_factory.mktemp("caches") / "whole"
    result = run(make_settings(tiny_model_dir, documents, output), progress=False)
    assert result.sealed
    assert result.shards_built == result.shards >= 8
    return output


def test_rows_are_the_teachers(built, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    cache = CacheReader.open(str(built))
    assert cache.token_count == cache.lengths.sum() > 500
    for record in cache:
        with torch.no_grad():
            logits = model(torch.from_numpy(record.token_ids.astype(np.int64))[None]).logits[0]
        exact = logits.double().log_softmax(-1).numpy()
        at_ids = np.take_along_axis(exact, record.top_ids.astype(np.int64), axis=1)
        # Tie-aware: the values at the stored ids, and the k largest values, whatever their ids.
        np.testing.assert_allclose(record.top_logprobs, at_ids, atol=ROUNDING)
        np.testing.assert_allclose(record.top_logprobs, -np.sort(-exact, axis=1)[:, :8], atol=ROUNDING)
        np.testing.assert_allclose(record.log_tail_mass, np.log1p(-np.exp(at_ids).sum(axis=1)), atol=ROUNDING)
        labels = exact[np.arange(len(record) - 1), record.token_ids[1:]]
        np.testing.assert_allclose(record.label_logprob[:-1], labels, atol=ROUNDING)


def test_both_containers_and_codecs_hold_the_same(tmp_path, built, tiny_model_dir, documents):
    for codec, container in (("ld16", "zarr"), ("ld8", "arrow")):
        changes = {"cache__format": container, "cache__codec": codec}
        run(make_settings(tiny_model_dir, documents, tmp_path / codec, **changes), progress=False)
    exact, zarr, small = (CacheReader.open(str(path)) for path in (built, tmp_path / "ld16", tmp_path / "ld8"))
    for a, b, c in zip(exact, zarr, small, strict=True):
        for field in dataclasses.fields(a):
            if field.name != "extras":
                np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
        np.testing.assert_array_equal(a.top_ids, c.top_ids)
        # ld8: half a level of a range of at most 12 nats here, and float16's rounding of values of at most 8.
        np.testing.assert_allclose(a.top_logprobs, c.top_logprobs, atol=12 / 508 + 8 / 2048)


def test_the_same_build_again_loads_no_teacher(built, tiny_model_dir, documents, monkeypatch):
    before = contents(built)
    monkeypatch.setattr(cache_builder.build, "open_engine", None)
    result = run(make_settings(tiny_model_dir, documents, built), progress=False)
    assert (result.shards_built, result.sealed) == (0, True)
    assert contents(built) == before
    arguments = ["build", "--engine", "hf", "--teacher", str(tiny_model_dir), "--dataset", str(documents)]
    arguments += ["--max-length", "48", "--output", str(built), "--top-k", "8", "--shard-tokens", "60"]
    done = CliRunner().invoke(main, [*arguments, "--codec", "ld16"])
    assert done.exit_code == 0
    assert "nothing to do" in done.stdout
    # A flag that is not the cache's: exit 2, the field, both values, what to do.
    done = CliRunner().invoke(main, [*arguments, "--codec", "ld8"])
    assert done.exit_code == 2
    assert "codec: the cache has 'ld16', asked for 'ld8'); give the settings it was built with" in done.stderr
    assert contents(built) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache__top_k": 9}, r"capture\.top_k: the cache has 8, asked for 9"),
        ({"corpus__max_length": 47}, "max_length: the cache has 48, asked for 47"),
        ({"engine__dtype": "bfloat16"}, r"teacher\.dtype: the cache has 'float32', asked for 'bfloat16'"),
        ({"corpus__append_eos": False}, "append_eos: the cache has True, asked for False"),
    ],
)
def test_other_settings_are_refused(built, tiny_model_dir, documents, changes, message):
    before = contents(built)
    with pytest.raises(IdentityMismatch, match=message):
        run(make_settings(tiny_model_dir, documents, built, **changes), progress=False)
    assert contents(built) == before


def test_another_teacher_tokenizer_or_template_is_refused(tmp_path, built, tiny_model_dir, documents, tiny_tokenizer):
    import shutil

    copy = tmp_path / tiny_model_dir.name
    shutil.copytree(tiny_model_dir, copy)
    run(make_settings(copy, documents, built), progress=False)  # the same teacher in another place is the same
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(IdentityMismatch, match=r"tokenizer\.template_digest"):
        run(make_settings(copy, documents, built), progress=False)
    shutil.copytree(tiny_model_dir, copy, dirs_exist_ok=True)
    tokenizer = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(tokenizer.replace("<|endoftext|>", "<|end-of-text|>"))
    with pytest.raises(IdentityMismatch, match=r"tokenizer\.digest"):
        run(make_settings(copy, documents, built), progress=False)
    shutil.copytree(tiny_model_dir, copy, dirs_exist_ok=True)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(IdentityMismatch, match=r"teacher\.weights_digest"):
        run(make_settings(copy, documents, built), progress=False)


def test_rows_are_aligned_through_templates_and_truncation(tmp_path, tiny_tokenizer):
    """A planted teacher gives the row of its current token at every position, mask included."""
    table = make_planted_teacher(tmp_path / "teacher", tiny_tokenizer, padding=20)
    turns = [
        [("user", "what is a cache?"), ("assistant", "what the teacher left."), ("user", "why?"), ("assistant", "so.")],
        [("user", "hello " * 30), ("assistant", "a long answer " * 10)],
    ]
    with (tmp_path / "chats.jsonl").open("w") as file:
        for turn in turns:
            messages = [{"role": role, "content": content} for role, content in turn]
            file.write(json.dumps({"messages": messages}) + "\n")
    for overflow in ("truncate", "split"):
        changes = {"corpus__overflow": overflow, "corpus__max_length": 160, "cache__top_k": 16}
        output = tmp_path / overflow
        run(make_settings(tmp_path / "teacher", tmp_path / "chats.jsonl", output, **changes), progress=False)
        cache = CacheReader.open(str(output))
        for record in cache:
            assert_planted(record, table, atol=ROUNDING)
        short = cache.read(0)
        targets = tiny_tokenizer.decode(short.token_ids[short.completion_mask])
        assert targets == "what the teacher left.<|im_end|>so.<|im_end|>"
        if overflow == "split":
            pieces = [cache.read(i) for i in range(1, len(cache))]
            assert len(pieces) > 1
            assert not any(piece.completion_mask[0] for piece in pieces)
            whole = tiny_tokenizer.decode(np.concatenate([piece.token_ids for piece in pieces]))
            assert whole.endswith("a long answer <|im_end|>\n")
        else:
            assert len(cache) == 2
            assert len(cache.read(1)) == 160


SLOW_BUILD = """
import sys, time
import cache_builder.hf_engine as hf
from cache_builder.build import run
from cache_builder.config import BuildSettings
score_one = hf.HFEngine._score_one
def slowly(self, sequence):
    time.sleep(0.03)
    with open(sys.argv[2], "a") as log:
        log.write(sequence.sequence_id + "\\n")
    return score_one(self, sequence)
hf.HFEngine._score_one = slowly
print("shards built", run(BuildSettings.model_validate_json(sys.argv[1]), progress=False).shards_built)
"""


def run_and_kill(settings, log, when):
    """Start a build, kill it once `when(committed shards)` holds; True if it ended by itself before."""
    arguments = [sys.executable, "-c", SLOW_BUILD, settings.model_dump_json(), str(log)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    shards = Path(settings.cache.output) / "shards"
    while process.poll() is None:
        if when(len(list(shards.glob("*.index")))):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode == 0


def kill_and_continue(tmp_path, teacher, documents, moments):
    settings = make_settings(teacher, documents, tmp_path / "killed", cache__shard_tokens=1)
    run(make_settings(teacher, documents, tmp_path / "whole", cache__shard_tokens=1), progress=False)
    assert len(list((tmp_path / "whole" / "shards").glob("*.index"))) >= 20
    log = tmp_path / "scored"
    log.touch()
    for moment in moments:
        committed = {
            name
            for index in (tmp_path / "killed" / "shards").glob("*.index")
            for name in json.loads(index.read_text())["sequence_ids"]
        }
        before = len(log.read_text().splitlines())
        ended = run_and_kill(settings, log, moment)
        assert not committed & set(log.read_text().splitlines()[before:]), "a committed shard was scored again"
        if ended:
            break
    run(settings, progress=False)
    assert_same_cache(tmp_path / "killed", tmp_path / "whole")


def test_killed_and_continued_ends_in_the_same_bytes(tmp_path, tiny_model_dir, documents):
    moments = [lambda shards: shards >= 3, lambda shards: shards >= 15]
    kill_and_continue(tmp_path, tiny_model_dir, documents, moments)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_killed_at_fifty_random_moments(tmp_path, tiny_model_dir, documents):
    generator = random.Random(5)

    def at_random(round_number):
        deadline = time.monotonic() + generator.uniform(0.5, 9)
        return lambda shards: time.monotonic() > deadline

    for repeat in range(10):
        (tmp_path / str(repeat)).mkdir()
        kill_and_continue(tmp_path / str(repeat), tiny_model_dir, documents, map(at_random, range(5)))


def test_several_builders_share_one_cache(tmp_path, built, tiny_model_dir, documents):
    """Disjoint shards in any order of finishing; the last one seals, and the bytes are one builder's."""
    output = tmp_path / "shared"
    results = [
        run(make_settings(tiny_model_dir, documents, output, cache__worker=f"{i}/3"), progress=False) for i in (2, 0, 1)
    ]
    assert [result.sealed for result in results] == [False, False, True]
    assert sum(result.shards_built for result in results) == results[0].shards
    assert all(result.shards_built for result in results)
    ours, theirs = contents(output), contents(built)
    assert ours == theirs
    assert "expected 0/3 to 2/3" in refuse(
        ["--teacher", tiny_model_dir, "--dataset", documents, "--max-length", 48, "--worker", "3/3"], output=output
    )


def test_a_failing_encoder_ends_the_build(tmp_path, tiny_model_dir, documents, monkeypatch):
    """The thread beside the teacher must not fail in silence."""
    from storage_schemas.writer import CacheWriter

    commit = CacheWriter.commit

    def fail(self, ordinal, records):
        if ordinal == 2:
            raise RuntimeError("planted")
        return commit(self, ordinal, records)

    monkeypatch.setattr(CacheWriter, "commit", fail)
    with pytest.raises(RuntimeError, match="planted"):
        run(make_settings(tiny_model_dir, documents, tmp_path / "c"), progress=False)
    assert len(list((tmp_path / "c" / "shards").glob("*.index"))) == 2
    monkeypatch.undo()
    assert run(make_settings(tiny_model_dir, documents, tmp_path / "c"), progress=False).sealed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_build_can_be_continued(tmp_path, tiny_model_dir, documents, number):
    settings = make_settings(tiny_model_dir, documents, tmp_path / "c", cache__shard_tokens=1)
    arguments = [
        "build",
        "--set",
        "cache.codec=ld16",
        "--engine",
        "hf",
        "--teacher",
        tiny_model_dir,
        "--dataset",
        documents,
    ]
    arguments += ["--max-length", 48, "--top-k", 8, "--shard-tokens", 1, "--output", tmp_path / "c"]
    slow = SLOW_BUILD.partition("print(")[0] + "from cache_builder.cli import main\nmain(sys.argv[3:])"
    command = [sys.executable, "-c", slow, "", str(tmp_path / "log"), *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(list((tmp_path / "c" / "shards").glob("*.index"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "run the same command again to continue" in said
    run(settings, progress=False)
    run(make_settings(tiny_model_dir, documents, tmp_path / "whole", cache__shard_tokens=1), progress=False)
    assert_same_cache(tmp_path / "c", tmp_path / "whole")


def refuse(arguments, *, output):
    before = contents(output) if Path(output).is_dir() else None
    done = CliRunner().invoke(main, ["build", "--engine", "hf", *map(str, arguments), "--output", str(output)])
    assert done.exit_code == 2, done.output
    said = done.stderr.strip().splitlines()[-1]  # behind the bar of the tokenising
    assert said.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert before is None or contents(output) == before
    return said


def test_mistakes_get_one_sentence(tmp_path, tiny_model_dir, documents, monkeypatch):
    teacher = ["--teacher", tiny_model_dir, "--max-length", 32]
    good = [*teacher, "--dataset", documents, "--top-k", 8]
    empty, blank = tmp_path / "empty.jsonl", tmp_path / "blank.jsonl"
    empty.write_text("")
    blank.write_text('{"text": "words"}\n{"text": ""}\n')
    (tmp_path / "file").write_text("")
    cases = [
        ([*teacher, "--dataset", tmp_path / "none.jsonl"], "there is no file"),
        ([*teacher, "--dataset", "no-such/dataset"], "no-such/dataset"),
        ([*good, "--set", "corpus.text_column=body"], "body"),
        ([*teacher, "--dataset", empty], "has no documents"),
        ([*teacher, "--dataset", blank], "document 1 .*has no tokens; take it out"),
        ([*teacher, "--dataset", documents, "--top-k", 301], "top_k of at most the vocabulary's 300 ids, got 301"),
        ([*good, "--set", "cache.shard_token=3"], "unknown setting 'cache.shard_token'; did you mean 'shard_tokens'"),
        ([*good, "--codec", "ld9"], "expected a codec among ld16, ld8, got 'ld9'"),
        (["--teacher", tmp_path, *good[2:]], "expected a transformers model"),
        (["--teacher", tmp_path / "none", *good[2:]], "there is none"),
        (["--dataset", documents, "--max-length", 8], "setting engine.model: field required"),
    ]
    for arguments, message in cases:
        assert re.search(message, refuse(arguments, output=tmp_path / "out")), message
    assert not (tmp_path / "out").exists()
    assert "cannot write" in refuse(good, output=tmp_path / "file" / "out")

    written = os.write

    def full(descriptor, content):
        if len(content) > 2000:  # room for the identity, not for a shard
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(descriptor, content)

    monkeypatch.setattr(os, "write", full)
    assert "no space left" in refuse(good, output=tmp_path / "full")
    monkeypatch.undo()
    done = CliRunner().invoke(main, ["build", "--engine", "hf", *map(str, good), "--output", str(tmp_path / "full")])
    assert done.exit_code == 0


def test_inspect_tells_what_a_cache_is(built):
    found = json.loads(CliRunner().invoke(main, ["inspect", str(built), "--json"]).stdout)
    cache = CacheReader.open(str(built))
    assert found["tokens"] == cache.token_count
    assert found["bytes"] == sum(map(len, contents(built).values()))
    tails = np.concatenate([np.exp(record.log_tail_mass) for record in cache])
    assert found["mean_tail_mass"] == pytest.approx(tails.mean())
    assert found["retained_mass"]["8"] == pytest.approx(1 - tails.mean(), abs=1e-4)
    text = CliRunner().invoke(main, ["inspect", str(built)]).stdout
    assert "capture.top_k" in text
    assert f"{cache.token_count:,}" in text
    done = CliRunner().invoke(main, ["inspect", str(built.parent)])
    assert done.exit_code == 2
    assert "no manifest" in done.stderr
