"""The whole way once, as a person goes it: real vLLM, a cache, and a student that never sees its teacher."""

import json
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from storage_schemas.reader import CacheReader
from tests.planted import assert_planted, make_planted_teacher

BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vllm", "cache_builder"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Absent())
from distiller.cli import main
main(sys.argv[1:])
"""


def run(*command, check=True):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.vllm
def test_a_student_learns_from_what_vllm_left(tmp_path, tiny_tokenizer):
    teacher, cache, student = tmp_path / "teacher", tmp_path / "cache", tmp_path / "student"
    table = make_planted_teacher(teacher, tiny_tokenizer, padding=20)
    questions = [
        "what is a cache?",
        "who reads the text?",
        "what is left?",
        "why?",
        "how many tokens?",
        "and the rest?",
    ]
    with (tmp_path / "chats.jsonl").open("w") as file:
        for number, question in enumerate(questions * 4):
            answer = f"the teacher reads it {number} times. " * (1 + number % 3)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    build = ["-m", "cache_builder.cli", "build", "--teacher", teacher, "--dataset", tmp_path / "chats.jsonl"]
    build += ["--output", cache, "--max-length", 96, "--top-k", 16, "--codec", "ld16", "--shard-tokens", 600]
    build += ["--set", "engine.enforce_eager=true"]
    result = json.loads(run(*build, "--json").stdout)
    assert result["sealed"]
    assert result["shards_built"] >= 3

    # Every row is the row of its own token, renormalised over the tokenizer's ids; 1e-3 is float32 over 64 dimensions.
    records = list(CacheReader.open(str(cache)))
    assert len(records) == 24
    for record in records:
        assert_planted(record, table, atol=1e-3)
        targets = tiny_tokenizer.decode(record.token_ids[record.completion_mask])
        assert targets.startswith("the teacher reads it")
        assert targets.endswith("<|im_end|>")

    run("-m", "distiller.cli", "init-student", "--model", teacher, "--output", student, "--layers", 0)
    with (student / "config.json").open() as file:
        assert json.load(file)["num_hidden_layers"] == 1
    _damage(student)
    teacher.rename(tmp_path / "gone")  # from here on there is no teacher, and nothing that could run one
    measured = {}
    trained = tmp_path / "trained"
    run("-c", BLOCKED, "evaluate", "--student", student, "--cache", cache, "--json", tmp_path / "before.json")
    train = ["train", "--cache", cache, "--student", student, "--output", trained, "--max-steps", 12]
    train += ["--per-device-train-batch-size", 8, "--learning-rate", 3e-2]
    summary = json.loads(run("-c", BLOCKED, *train, "--objective", "taid", "--json").stdout)
    assert summary["steps"] == 12
    run("-c", BLOCKED, "evaluate", "--student", trained, "--cache", cache, "--json", tmp_path / "after.json")
    for moment in ("before", "after"):
        measured[moment] = json.loads((tmp_path / f"{moment}.json").read_text())
    assert measured["after"]["kl"] < 0.8 * measured["before"]["kl"]
    labels = np.concatenate([record.label_logprob[:-1][record.completion_mask[1:]] for record in records])
    assert measured["after"]["teacher_perplexity"] == pytest.approx(float(np.exp(-labels.mean())), rel=1e-3)


def _damage(path):
    """The planted teacher has one layer that adds nothing: a student of it has to be made worse to learn anything."""
    import torch

    model = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.2)
    model.save_pretrained(path)
