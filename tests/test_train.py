from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distiller.config import TrainSettings
from distiller.evaluate import evaluate
from distiller.train import train
from storage_schemas.errors import RequestError
from storage_schemas.reader import CacheReader
from storage_schemas.settings import validate_settings
from tests.students import make_student, make_tokenizer
from tests.teacher_cache import write_cache


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_cache(root / "cache", make_student(seed=1))
    write_cache(root / "heldout", make_student(seed=1), seed=5)
    make_student().save_pretrained(root / "student")
    make_tokenizer().save_pretrained(root / "student")
    return root


def settings_of(world: Path, output: Path, training: dict[str, Any], **tables: Any) -> TrainSettings:
    table = {
        "output": str(output),
        "student": {"path": str(world / "student")},
        "data": {"cache": str(world / "cache"), "eval_cache": str(world / "heldout")},
        "training": {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no", **training},
        **tables,
    }
    return validate_settings(TrainSettings, table)


def test_the_best_checkpoint_by_held_out_kl_is_the_one_kept_and_patience_ends_the_run(
    world: Path, tmp_path: Path
) -> None:
    """A learning rate that wrecks the student after its first steps."""
    summary = train(
        settings_of(
            world,
            tmp_path / "run",
            {"max_steps": 40, "learning_rate": 0.3, "lr_scheduler_type": "constant", "eval_strategy": "steps",
             "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
            early_stopping={"patience": 3},
        )
    )  # fmt: skip
    entries = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    found = [entry["eval_kl"] for entry in entries if "eval_kl" in entry]
    assert summary["steps"] < 40
    best = min(found[1:-1])  # before the first step, and after the best was loaded again
    assert summary["held_out_kl"] == pytest.approx(best, rel=1e-6)
    assert summary["steps"] == found[1:-1].index(best) + 1 + 3


def test_a_run_that_was_not_measured_at_first_claims_no_start(world: Path, tmp_path: Path) -> None:
    summary = train(settings_of(world, tmp_path / "run", {"max_steps": 1, "eval_on_start": False}))
    assert summary["start_kl"] is None
    assert summary["held_out_kl"] > 0
    assert "| – |" in (tmp_path / "run" / "README.md").read_text()


def test_the_model_card_names_the_cache(world: Path, tmp_path: Path) -> None:
    summary = train(settings_of(world, tmp_path / "run", {"max_steps": 2}))
    card = (tmp_path / "run" / "README.md").read_text()
    cache = CacheReader.open(str(world / "cache"))
    assert card.startswith("---\n")
    for words in (
        cache.manifest.digest or "?",
        cache.identity.tokenizer.digest,
        cache.identity.teacher.model,
        "`taid`",
        f"{summary['held_out_kl']:.4g}",
        f"{summary['start_kl']:.4g}",
    ):
        assert words in card


def test_adapters_train_and_end_up_in_an_ordinary_student(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = settings_of(world, tmp_path / "run", {"max_steps": 12, "learning_rate": 0.03}, lora={"rank": 2})
    summary = train(settings)
    assert summary["held_out_kl"] < summary["start_kl"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    before = make_student()
    assert student.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(student.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert not torch.equal(student.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    figures = evaluate(student, CacheReader.open(str(world / "heldout")))
    assert figures["kl"] == pytest.approx(summary["held_out_kl"], rel=1e-4)  # merged weights round once more


def test_adapters_resume(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = train(settings_of(world, tmp_path / "a", training, lora={"rank": 2}))
    train(settings_of(world, tmp_path / "b", training, lora={"rank": 2}))
    import shutil

    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    resumed = train(settings_of(world, tmp_path / "b", training, lora={"rank": 2}), resume=True)
    assert resumed["last_loss"] == straight["last_loss"]


def test_adapters_without_peft_are_one_sentence(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RequestError, match="pip install peft"):
        train(settings_of(world, tmp_path / "run", {"max_steps": 1}, lora={}))


@pytest.mark.parametrize(
    ("training", "tables", "words"),
    [
        ({}, {"early_stopping": {"patience": 1}}, "eval_strategy"),
        ({}, {"early_stopping": {"patience": 0}}, "patience"),
        ({}, {"lora": {"target_modules": ["nonsense"]}}, "target_modules"),
        ({"fp16": True}, {}, "fp16"),
    ],
)
def test_settings_that_cannot_be_followed(
    world: Path, tmp_path: Path, training: dict[str, Any], tables: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        train(settings_of(world, tmp_path / "run", {"max_steps": 1, **training}, **tables))
    assert not (tmp_path / "run" / "train.toml").exists()
