from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from distiller.cli import main
from tests.students import make_student, make_tokenizer
from tests.teacher_cache import VOCABULARY, write_cache


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's cache, a held-out one, and a student."""
    root = tmp_path_factory.mktemp("world")
    teacher = make_student(seed=1)
    write_cache(root / "cache", teacher)
    write_cache(root / "heldout", teacher, seed=5)
    teacher.save_pretrained(root / "teacher")
    make_tokenizer().save_pretrained(root / "teacher")
    assert make_tokenizer().get_vocab() == VOCABULARY
    result = run("init-student", "--model", root / "teacher", "--output", root / "student", "--keep-layers", 2)
    assert result.exit_code == 0, result.output
    assert "kept layers 0, 3 of 4" in result.stdout
    return root


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def train_arguments(root: Path, output: Path) -> list[Any]:
    flags = {"--cache": root / "cache", "--student": root / "student", "--output": output}
    return [
        "train",
        *[part for pair in flags.items() for part in pair],
        *("--max-steps", 3, "--per-device-train-batch-size", 2, "--learning-rate", 0.01, "--no-bf16"),
    ]


def test_training_end_to_end(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = run(*train_arguments(world, output), "--eval-cache", world / "heldout", "--objective", "taid", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["steps"] == 3
    assert summary["held_out_kl"] < summary["start_kl"]
    assert 0.4 <= summary["t"] <= 1
    assert json.loads((output / "summary.json").read_text())["held_out_kl"] == summary["held_out_kl"]
    history = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]
    assert 'name = "taid"' in (output / "train.toml").read_text()

    measured = run("evaluate", "--student", output, "--cache", world / "heldout", "--json", tmp_path / "figures.json")
    assert measured.exit_code == 0, measured.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["kl"] == pytest.approx(summary["held_out_kl"], rel=1e-5)
    assert "top1 agreement" in measured.stdout


def test_the_resolved_configuration_repeats_the_run(world: Path, tmp_path: Path) -> None:
    first = run(*train_arguments(world, tmp_path / "a"), "--json")
    again = run("train", "--config", tmp_path / "a" / "train.toml", "--output", tmp_path / "b", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["last_loss"] == json.loads(first.stdout)["last_loss"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--set", "training.learning_rat=1"], "did you mean training.learning_rate"),
        (["--set", "data.nonsense=1"], "unknown setting 'data.nonsense'"),
        (["--set", "objective.nonsense=1"], "nonsense"),
        (["--set", "training.output_dir=x"], "leave it out"),
        (["--objective", "tiad"], "taid"),
        (["--cache", "nowhere"], "nowhere"),
        (["--student", "nowhere"], "nowhere"),
        (["--eval-cache", "x", "--set", "data.eval_fraction=0.5"], "one of"),
        (["--set", "training.lr_scheduler_type=nonsense"], "nonsense"),
        (["--set", "training.report_to=nonsense"], "nonsense"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(world: Path, tmp_path: Path, extra: list[str], words: str) -> None:
    result = run(*train_arguments(world, tmp_path / "run"), *extra)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_student_with_other_ids_is_refused(world: Path, tmp_path: Path) -> None:
    other = {f"token-{60 - i}": i for i in range(61)}
    write_cache(tmp_path / "cache", make_student(seed=1), vocabulary=other)
    result = run(*train_arguments(world, tmp_path / "run"), "--cache", tmp_path / "cache")
    assert result.exit_code == 2
    assert "tokenizer" in result.stderr
    result = run("evaluate", "--student", world / "student", "--cache", tmp_path / "cache")
    assert result.exit_code == 2
    assert "tokenizer" in result.stderr


def test_sequences_beyond_the_students_positions_are_refused_or_cut(world: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", make_student(seed=1), lengths=(70, 8), shards=1)
    result = run(*train_arguments(world, tmp_path / "run"), "--cache", tmp_path / "cache")
    assert result.exit_code == 2
    assert "at most 64 tokens" in result.stderr
    result = run(*train_arguments(world, tmp_path / "run"), "--cache", tmp_path / "cache", "--max-length", 64)
    assert result.exit_code == 0, result.output


def test_a_used_output_directory_is_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    result = run(*train_arguments(world, tmp_path))
    assert result.exit_code == 2
    assert "--resume" in result.stderr


def test_a_dry_run_counts_and_writes_nothing(world: Path, tmp_path: Path) -> None:
    extra = ["--eval-cache", world / "heldout", "--freeze-embeddings", "--set", "data.max_length=10"]
    planned = run(*train_arguments(world, tmp_path / "run"), *extra, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    assert not (tmp_path / "run").exists()
    found = json.loads(planned.stdout)
    assert found["steps"] == 3
    assert found["rows"] == 8
    assert found["steps_per_epoch"] == 4
    assert found["cut_sequences"] > 0
    assert found["trained_parameters"] < found["parameters"]
    epochs = run(
        *train_arguments(world, tmp_path / "run"), "--max-steps", -1, "--num-train-epochs", 2.5, "--dry-run", "--json"
    )
    assert json.loads(epochs.stdout)["steps"] == 10
    refused = run(*train_arguments(world, tmp_path / "run"), "--objective", "nonsense", "--dry-run")
    assert refused.exit_code == 2


RECIPES = sorted((Path(__file__).parent.parent / "scripts" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_configuration(recipe: Path, world: Path, tmp_path: Path) -> None:
    flags = {"--cache": world / "cache", "--student": world / "student", "--output": tmp_path / "run"}
    given = [part for pair in flags.items() for part in pair]
    extra = ["--set", "data.eval_fraction=0.4"] if "eval_fraction" in recipe.read_text() else []  # the cache is tiny
    result = run("train", "--config", recipe, *given, *extra, "--dry-run")
    assert result.exit_code == 0, result.output


def test_there_are_recipes() -> None:
    assert RECIPES


HEAVY = ("torch", "transformers", "vllm", "datasets", "numpy")


@pytest.mark.parametrize("command", [[], ["init-student"], ["train"], ["evaluate"], ["report"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom distiller.cli import main\n"
        f"try:\n    main({[*command, '--help']!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage:" in done.stdout
    assert "heavy: []" in done.stderr


def test_training_touches_neither_vllm_nor_the_builder_nor_the_teacher(world: Path, tmp_path: Path) -> None:
    """In a process where importing them fails, and where the teacher's directory is gone."""
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('vllm', 'cache_builder'):\n"
        "            raise AssertionError(f'{name} was imported')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from distiller.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    (world / "teacher").rename(world / "hidden")
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, train_arguments(world, tmp_path / "run"))],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    finally:
        (world / "hidden").rename(world / "teacher")
    assert done.returncode == 0, done.stderr
    assert "last loss" in done.stdout
