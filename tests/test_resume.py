from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distiller.config import TrainSettings
from distiller.resume import last_complete_checkpoint
from distiller.train import train
from storage_schemas.errors import RequestError
from storage_schemas.settings import load_settings, validate_settings
from tests.students import make_student, make_tokenizer
from tests.teacher_cache import write_cache

KEYS = ("step", "loss", "t", "learning_rate", "grad_norm", "eval_kl")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    teacher = make_student(seed=1)
    write_cache(root / "cache", teacher, shards=3)
    make_student().save_pretrained(root / "student")
    make_tokenizer().save_pretrained(root / "student")
    return root


def settings_of(world: Path, output: Path, **training: Any) -> TrainSettings:
    table = {
        "output": str(output),
        "student": {"path": str(world / "student")},
        "data": {"cache": str(world / "cache"), "eval_fraction": 0.3},
        "objective": {"name": "taid"},
        "training": {
            "max_steps": 8,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 4,
            **training,
        },
    }
    return validate_settings(TrainSettings, table)


def history(output: Path) -> list[dict[str, Any]]:
    lines = (output / "history.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [
        {key: entry[key] for key in KEYS if key in entry} for entry in entries if "loss" in entry or "eval_kl" in entry
    ]


KILLED_RUN = """
import os, signal, sys
from transformers import Trainer
from distiller.config import TrainSettings
from distiller.train import train
from storage_schemas.settings import load_settings

def die(self, output_dir):
    if output_dir.endswith("checkpoint-6"):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, output_dir)

original, Trainer._save_rng_state = Trainer._save_rng_state, die
train(load_settings(TrainSettings, path=sys.argv[1]))
"""


def test_a_run_killed_while_it_saves_resumes_bit_for_bit(world: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of writing a checkpoint, after an epoch's end: the torn one is skipped."""
    straight = settings_of(world, tmp_path / "straight")
    train(straight)

    killed = settings_of(world, tmp_path / "killed")
    from storage_schemas.settings import write_settings

    write_settings(killed, tmp_path / "killed.toml")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(tmp_path / "killed.toml")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=dict(os.environ),
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "killed" / "checkpoint-6").is_dir()
    assert last_complete_checkpoint(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-4"
    assert history(tmp_path / "killed")[-1]["step"] == 6

    train(load_settings(TrainSettings, path=str(tmp_path / "killed.toml")), resume=True)
    assert history(tmp_path / "killed") == history(tmp_path / "straight")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    states = [
        json.loads((tmp_path / run / "checkpoint-8" / "trainer_state.json").read_text())["stateful_callbacks"]
        for run in ("killed", "straight")
    ]
    assert states[0]["ObjectiveCallback"] == states[1]["ObjectiveCallback"]


def test_a_finished_run_resumes_to_itself(world: Path, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path / "run")
    first = train(settings)
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    again = train(settings, resume=True)
    assert again["held_out_kl"] == first["held_out_kl"]
    assert again["steps"] == 8
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights


def test_resuming_nothing_begins(world: Path, tmp_path: Path) -> None:
    summary = train(settings_of(world, tmp_path / "new", max_steps=1), resume=True)
    assert summary["steps"] == 1


def test_a_run_is_not_resumed_as_another(world: Path, tmp_path: Path) -> None:
    train(settings_of(world, tmp_path / "run", max_steps=2))
    train(settings_of(world, tmp_path / "run", max_steps=2, logging_steps=5), resume=True)  # harmless
    with pytest.raises(RequestError, match=r"training\.learning_rate: the run has 0\.01, asked for 0\.02"):
        train(settings_of(world, tmp_path / "run", max_steps=2, learning_rate=0.02), resume=True)
    write_cache(tmp_path / "other", make_student(seed=1), seed=3)
    moved = settings_of(world, tmp_path / "run", max_steps=2).model_dump()
    moved["data"]["cache"] = str(tmp_path / "other")
    with pytest.raises(RequestError, match="manifest"):
        train(validate_settings(TrainSettings, moved), resume=True)


def test_torn_checkpoints_are_passed_over(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    for step, content in ((4, "{}"), (30, '{"global_st'), (12, "{}"), (100, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if content is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-final").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
