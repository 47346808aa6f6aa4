"""Prompts answered by the teacher and captured again, with the reference engine and a tiny random teacher."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, GenerationConfig

import cache_builder.build
from cache_builder.build import run
from cache_builder.cli import main
from cache_builder.config import BuildSettings
from cache_builder.engine import Capture, Sampling
from cache_builder.engine_settings import EngineSettings
from cache_builder.generate import derive_seed
from cache_builder.hf_engine import HFEngine
from cache_builder.open_engine import open_engine
from storage_schemas.errors import CorruptShard, IdentityMismatch, RequestError
from storage_schemas.reader import CacheReader

MAX_LENGTH, MAX_TOKENS = 64, 24
ROUNDING = 1e-3  # nats: float32 logits of another order of summation, on top of ld16's 1e-4


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    with path.open("w") as file:
        for number in range(7):
            file.write(json.dumps({"prompt": "the teacher reads " * (number % 3 + 1) + str(number)}) + "\n")
    return path


def make_settings(teacher, dataset, output, corpus=None, **generate):
    return BuildSettings.model_validate(
        {
            "engine": {"name": "hf", "model": str(teacher)},
            "corpus": {"dataset": str(dataset), "max_length": MAX_LENGTH, **(corpus or {})},
            "cache": {"output": str(output), "top_k": 8, "shard_tokens": 100, "codec": "ld16"},
            "generate": {"max_tokens": MAX_TOKENS, "temperature": 0, "batch_prompts": 2, **generate},
        }
    )


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(Path(path).rglob("*")) if file.is_file()}


def assert_same(left, right):
    left, right = contents(left), contents(right)
    assert left.keys() == right.keys()
    assert not [name for name in left if left[name] != right[name]]


def answer_greedily(model, prompt, most, stops):
    """The definition: the most likely id, again and again, without a cache of keys and values."""
    ids = list(prompt)
    while len(ids) - len(prompt) < most:
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_model_dir, prompts):
    output = tmp_path_factory.mktemp("built") / "cache"
    result = run(make_settings(tiny_model_dir, prompts, output), progress=False)
    assert result.sealed
    return output


def test_the_cache_holds_the_prompts_and_their_greedy_answers(built, tiny_model_dir, tiny_tokenizer, prompts):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    stops = {tiny_tokenizer.eos_token_id}
    cache = CacheReader.open(str(built))
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    assert len(cache) == len(texts)
    for number, (text, record) in enumerate(zip(texts, cache, strict=True)):
        prompt = tiny_tokenizer(text)["input_ids"]
        most = min(MAX_TOKENS, MAX_LENGTH - len(prompt))
        expected = answer_greedily(model, prompt, most, stops)
        assert record.token_ids.tolist() == expected
        asked = torch.tensor([prompt])
        config = GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=[*stops], pad_token_id=0)
        assert model.generate(asked, generation_config=config)[0].tolist() == expected
        assert record.completion_mask.tolist() == [False] * len(prompt) + [True] * (len(expected) - len(prompt))
        assert record.sequence_id == f"0/{number}/0"
        with torch.inference_mode():
            exact = model(input_ids=torch.tensor([expected])).logits[0].double().log_softmax(-1).numpy()
        at = np.take_along_axis(exact, record.top_ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(record.top_logprobs, at, atol=ROUNDING)
        assert (
            record.token_ids[1:][record.completion_mask[1:]] == record.top_ids[:-1, 0][record.completion_mask[1:]]
        ).all()
    assert len({len(record) for record in cache}) > 1


def test_messages_are_answered_after_the_generation_prompt(tmp_path, tiny_model_dir, tiny_tokenizer):
    """The end-of-turn token, which the answer is made to reach, is the last target."""
    chat = [{"role": "user", "content": "why?"}]
    for column in ("prompt", "messages"):
        (tmp_path / f"{column}.jsonl").write_text(json.dumps({column: chat, "name": "a"}) + "\n")
    text = tiny_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    prompt = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    free = answer_greedily(model, prompt, MAX_TOKENS, {tiny_tokenizer.eos_token_id})
    stop = free[len(prompt) + 5]
    expected = answer_greedily(model, prompt, MAX_TOKENS, {tiny_tokenizer.eos_token_id, stop})
    assert expected[-1] == stop
    for column in ("prompt", "messages"):
        output = tmp_path / column
        settings = make_settings(
            tiny_model_dir, tmp_path / f"{column}.jsonl", output, {"id_column": "name"}, stop_token_ids=[stop]
        )
        result = run(settings, progress=False)
        record = CacheReader.open(str(output)).read(0)
        assert record.token_ids.tolist() == expected
        assert record.completion_mask.tolist() == [False] * len(prompt) + [True] * (len(expected) - len(prompt))
        assert record.document_id == "a"
        assert result.counts["unfinished"] == 0
        row = json.loads((output / "generated" / "00000.jsonl").read_text())
        assert (row["finish_reason"], row["input_ids"]) == ("stop", expected)


def test_the_same_build_again_loads_no_teacher(built, tiny_model_dir, prompts, monkeypatch):
    before = contents(built)
    monkeypatch.setattr(cache_builder.build, "open_engine", None)
    result = run(make_settings(tiny_model_dir, prompts, built), progress=False)
    assert (result.shards_built, result.sealed) == (0, True)
    assert contents(built) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.5}, r"generate\.temperature: the cache has 0\.0, asked for 0\.5"),
        ({"max_tokens": 23}, r"generate\.max_tokens: the cache has 24, asked for 23"),
        ({"seed": 1}, r"generate\.seed: the cache has 0, asked for 1"),
        ({"stop_token_ids": [5]}, r"generate\.stop_token_ids: the cache has '2', asked for '2, 5'"),
        ({"corpus": {"max_length": 63}}, "max_length: the cache has 64, asked for 63"),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_other_sampling_is_refused(tmp_path, built, tiny_model_dir, prompts, changes, message, sealed):
    import shutil

    output = tmp_path / "cache"
    shutil.copytree(built, output)
    if not sealed:  # killed after the first batch
        for path in output.rglob("*"):
            if path.is_file() and path.name not in ("00000.jsonl",) and path != output / "generated" / "plan.json":
                path.unlink()
    before = contents(output)
    with pytest.raises(IdentityMismatch, match=message):
        run(make_settings(tiny_model_dir, prompts, output, **changes), progress=False)
    assert contents(output) == before
    plain = make_settings(tiny_model_dir, prompts, output).model_copy(update={"generate": None})
    with pytest.raises((IdentityMismatch, RequestError), match="prompt"):
        run(plain, progress=False)
    assert contents(output) == before


SLOW_BUILD = """
import sys, time
import cache_builder.hf_engine as hf
from cache_builder.build import run
from cache_builder.config import BuildSettings
answer = hf.HFEngine._answer
def slowly(self, prompt, sampling):
    time.sleep(0.1)
    return answer(self, prompt, sampling)
hf.HFEngine._answer = slowly
run(BuildSettings.model_validate_json(sys.argv[1]), progress=False)
"""


def test_killed_between_batches_and_continued_ends_in_the_same_bytes(tmp_path, tiny_model_dir, prompts, monkeypatch):
    """Sampled, so that the seeds count; the batches that were there are not generated again."""
    random = {"temperature": 1.3, "top_p": 0.95}
    settings = make_settings(tiny_model_dir, prompts, tmp_path / "killed", **random)
    generated = tmp_path / "killed" / "generated"
    process = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, settings.model_dump_json()])
    while len(list(generated.glob("*.jsonl"))) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    batches = len(list(generated.glob("*.jsonl")))
    assert 2 <= batches < 4
    assert not (tmp_path / "killed" / "plan.json").exists()
    again = []
    answer = HFEngine._answer

    def note(self, prompt, sampling):
        again.append(sampling.seed)
        return answer(self, prompt, sampling)

    monkeypatch.setattr(HFEngine, "_answer", note)
    run(settings, progress=False)
    assert again == [derive_seed(0, row) for row in range(2 * batches, 7)]
    run(make_settings(tiny_model_dir, prompts, tmp_path / "whole", **random), progress=False)
    assert_same(tmp_path / "killed", tmp_path / "whole")
    other = make_settings(tiny_model_dir, prompts, tmp_path / "other", **random, seed=1)
    run(other, progress=False)
    ours, theirs = (CacheReader.open(str(tmp_path / name)) for name in ("whole", "other"))
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(ours, theirs, strict=True))


def test_an_answer_does_not_depend_on_its_batch(tmp_path, tiny_model_dir, prompts, built):
    random = {"temperature": 1.3}
    caches = []
    for size in (1, 3, 100):
        run(make_settings(tiny_model_dir, prompts, tmp_path / str(size), **random, batch_prompts=size), progress=False)
        caches.append(CacheReader.open(str(tmp_path / str(size))))
    for one, three, all_ in zip(*caches, strict=True):
        assert one.token_ids.tolist() == three.token_ids.tolist() == all_.token_ids.tolist()
    assert any(
        a.token_ids.tolist() != b.token_ids.tolist()
        for a, b in zip(caches[0], CacheReader.open(str(built)), strict=True)
    )


def test_prompts_without_room_are_refused_or_dropped_and_answers_are_cut(tmp_path, tiny_model_dir, tiny_tokenizer):
    texts = ["the " * 200, "", "once ", "reads " * 48]
    lengths = [len(tiny_tokenizer(text)["input_ids"]) for text in texts]
    assert lengths[0] >= MAX_LENGTH > lengths[3] > MAX_LENGTH - MAX_TOKENS
    path, output = tmp_path / "prompts.jsonl", tmp_path / "cache"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    with pytest.raises(RequestError, match=rf"document 0 .*{lengths[0]} tokens leaves no room .* max_length = 64"):
        run(make_settings(tiny_model_dir, path, output), progress=False)
    with pytest.raises(RequestError, match=r"document 1 .*is empty"):
        run(make_settings(tiny_model_dir, path, output, {"overflow": "drop"}), progress=False)
    assert not output.exists()
    corpus = {"overflow": "drop", "empty_documents": "skip"}
    result = run(make_settings(tiny_model_dir, path, output, corpus), progress=False)
    counts = {name: result.counts[name] for name in ("documents", "dropped", "skipped", "unfinished", "truncated")}
    assert counts == {"documents": 4, "dropped": 1, "skipped": 1, "unfinished": 2, "truncated": 0}
    cache = CacheReader.open(str(output))
    assert list(cache.sequence_ids) == ["0/2/0", "0/3/0"]
    assert cache.lengths.tolist() == [lengths[2] + MAX_TOKENS, MAX_LENGTH]
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps({"prompt": texts[0]}) + "\n")
    with pytest.raises(RequestError, match=r"no prompt .* can be answered: 0 are empty, 1 leave no room"):
        run(make_settings(tiny_model_dir, alone, tmp_path / "none", corpus), progress=False)
    assert not (tmp_path / "none").exists()


def test_what_is_no_prompt_is_refused(tmp_path, tiny_model_dir):
    answered = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
    rows = {"messages": {"messages": answered}, "text": {"text": "words"}, "number": {"prompt": 3}}
    expected = {
        "messages": r"document 0 .*end with a user's turn.* got a turn of 'assistant'",
        "text": "expected a column of prompts, prompt or messages.* has the columns text",
        "number": "neither text nor messages",
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(RequestError, match=expected[name]):
            run(make_settings(tiny_model_dir, tmp_path / f"{name}.jsonl", tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "both.jsonl").write_text(json.dumps({"prompt": "the ", "completion": "teacher"}) + "\n")
    with pytest.warns(UserWarning, match="the column 'completion' is not read"):
        run(make_settings(tiny_model_dir, tmp_path / "both.jsonl", tmp_path / "out"), progress=False)


def test_a_changed_prompt_or_a_damaged_file_is_noticed(tmp_path, tiny_model_dir, prompts, built, monkeypatch):
    import shutil

    output = tmp_path / "cache"
    shutil.copytree(built, output)
    for path in [*output.glob("*.json"), *(output / "shards").iterdir()]:
        path.unlink()
    file = output / "generated" / "00001.jsonl"
    whole = file.read_bytes()
    for damaged in (
        whole[:-40],
        whole.partition(b"\n")[2],
        whole.replace(b'"stop"', b'"step"').replace(b"length", b"l"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(CorruptShard, match=r"00001\.jsonl is damaged"):
            run(make_settings(tiny_model_dir, prompts, output), progress=False)
    file.unlink()
    changed = tmp_path / "prompts.jsonl"
    changed.write_text(prompts.read_text().replace("reads 2", "read 2"))
    with pytest.raises(IdentityMismatch, match="source_digest"):
        run(make_settings(tiny_model_dir, changed, output), progress=False)
    monkeypatch.setattr(
        "cache_builder.source.hash_files",
        lambda local: json.loads((output / "generated" / "plan.json").read_text())["segment"]["source_digest"],
    )
    with pytest.raises(RequestError, match=r"prompts 2 to 3 .* are not what they were"):
        run(make_settings(tiny_model_dir, changed, output), progress=False)
    monkeypatch.undo()
    (output / "provenance.json").unlink()  # of the build that was refused, from another path
    run(make_settings(tiny_model_dir, prompts, output), progress=False)
    assert_same(output, built)


def test_the_command_takes_a_flag_or_a_table(tmp_path, tiny_model_dir, prompts, built):
    arguments = ["build", "--engine", "hf", "--teacher", str(tiny_model_dir), "--dataset", str(prompts), "--generate"]
    arguments += ["--max-length", "64", "--top-k", "8", "--shard-tokens", "100", "--codec", "ld16"]
    table = [
        "--set",
        "generate.max_tokens=24",
        "--set",
        "generate.temperature=0.0",
        "--set",
        "generate.batch_prompts=2",
    ]
    done = CliRunner().invoke(main, [*arguments, *table, "--output", str(tmp_path / "cache")])
    assert done.exit_code == 0, done.output
    assert_same(tmp_path / "cache", built)
    done = CliRunner().invoke(main, [*arguments, "--output", str(built)])
    assert done.exit_code == 2
    assert "generate.max_tokens: the cache has 24, asked for 512" in done.stderr
    done = CliRunner().invoke(main, [*arguments, "--set", "generate.max_token=3", "--output", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert "did you mean 'max_tokens'" in done.stderr


def test_padded_ids_are_never_written(tmp_path):
    """A model whose padding is its most likely id everywhere; and the checkpoint's own suggestions are not followed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        model.lm_head.weight[30:] = -50 * model.lm_head.weight[:10]
        model.lm_head.weight[35:] *= -1
    model.generation_config = GenerationConfig(repetition_penalty=1.8, no_repeat_ngram_size=1, max_new_tokens=2)
    model.save_pretrained(tmp_path)
    engine = open_engine(EngineSettings(name="hf", model=str(tmp_path)), Capture(4, 30))
    prompt = np.array([3, 1, 4], dtype=np.int32)
    expected, wanted = list(prompt), Sampling(max_tokens=12, temperature=0)
    while len(expected) < 15:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([expected])).logits[0, -1]
        assert int(logits.argmax()) >= 30
        expected.append(int(logits[:30].argmax()))
    answers = engine.generate([prompt, prompt], [wanted, dataclasses.replace(wanted, temperature=2.0)])
    assert answers[0].token_ids.tolist() == expected[3:]
    assert (len(answers[1].token_ids), answers[1].finish_reason) == (12, "length")
    assert answers[1].token_ids.max() < 30
    engine.close()
