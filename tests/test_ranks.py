"""Two processes on one machine, over gloo, against one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from distiller.cli import main
from tests.students import make_student, make_tokenizer
from tests.teacher_cache import write_cache


def launch(arguments: list[str], ranks: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """`distiller` with these arguments in every rank, as torchrun starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "distiller.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


def arguments(root: Path, output: Path, batch_size: int) -> list[str]:
    flags = {
        "--cache": root / "cache",
        "--eval-cache": root / "heldout",
        "--student": root / "student",
        "--output": output,
        "--max-steps": 6,
        "--per-device-train-batch-size": batch_size,
        "--gradient-accumulation-steps": 2,
        "--learning-rate": 0.01,
    }
    overrides = ["training.save_strategy=no"]
    return [
        "train",
        *[str(part) for pair in flags.items() for part in pair],
        *[part for override in overrides for part in ("--set", override)],
        "--json",
    ]


def history(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    make_student("llama-tied").save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    return tmp_path


def compare(world: Path, *extra: str) -> None:
    """One process with batches of 2 against two with batches of 1."""
    alone = CliRunner().invoke(main, [*arguments(world, world / "one", 2), *extra])
    assert alone.exit_code == 0, alone.output
    first, second = launch([*arguments(world, world / "two", 1), *extra])
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert second.stdout == "", "one rank speaks for all"
    one, two = history(world / "one"), history(world / "two")
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    assert len([entry for entry in one if "loss" in entry]) == 6
    for left, right in zip(one, two, strict=True):
        assert left.keys() - TIMES == right.keys() - TIMES
        for name in left.keys() - TIMES:
            # float32 sums over other groups of rows
            assert right[name] == pytest.approx(left[name], rel=1e-4, abs=1e-7), name
    weights = load_file(world / "one" / "model.safetensors")
    for name, value in load_file(world / "two" / "model.safetensors").items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4, msg=name)


TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}


def test_two_ranks_train_what_one_does(world: Path) -> None:
    teacher = make_student(seed=1)
    write_cache(world / "cache", teacher, lengths=(12, 7, 16, 9, 5, 14, 10, 8), shards=2)
    write_cache(world / "heldout", teacher, seed=5, lengths=(9, 12, 6))  # 3 sequences: one rank measures one more
    compare(world)


@pytest.mark.long
def test_a_rank_without_targets_keeps_step_with_the_others(world: Path) -> None:
    """Statistics over all ranks (AdaKD), while every other sequence has no target."""
    teacher = make_student(seed=1)
    write_cache(world / "cache", teacher, lengths=(5, 12, 6, 14), shards=1, prompt=6)
    write_cache(world / "heldout", teacher, seed=5, lengths=(9, 12, 6))
    compare(world, "--objective", "adakd")
