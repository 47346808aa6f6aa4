from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from distiller.collate import Collator
from distiller.objectives import make_objective
from distiller.stream import CacheDataset
from distiller.student import freeze_embeddings, install_loss
from distiller.trainer import DistillationTrainer
from storage_schemas.errors import RequestError
from storage_schemas.reader import CacheReader
from tests.students import VOCAB_SIZE, make_student
from tests.teacher_cache import write_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return write_cache(tmp_path_factory.mktemp("trainer") / "cache", make_student(seed=1))


def arguments(output: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "restore_callback_states_from_checkpoint": True,
    }
    return TrainingArguments(output_dir=str(output), **{**settings, **changes})


def make_trainer(
    cache: CacheReader, output: Path, *, student: Any = None, objective: Any = None, dataset: Any = None, **changes: Any
) -> DistillationTrainer:
    return DistillationTrainer(
        student if student is not None else make_student(),
        objective if objective is not None else make_objective("taid", {}),
        arguments(output, **changes),
        train_dataset=CacheDataset(cache) if dataset is None else dataset,
    )


def losses(trainer: DistillationTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def reference_cross_entropy(model: Any, dataset: CacheDataset, indices: list[int]) -> torch.Tensor:
    """Mean of -log q over the targets, from full logits, one sequence at a time."""
    total, count = torch.zeros(()), 0
    for i in indices:
        row = dataset[i]
        logits = model(input_ids=torch.from_numpy(row.token_ids.astype(np.int64))[None]).logits[0]
        log_q = logits[:, : dataset.vocab_size].float().log_softmax(-1)
        total = total - log_q[torch.from_numpy(row.positions.astype(np.int64)), row.label_ids.astype(np.int64)].sum()
        count += len(row.positions)
    return total / count


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "gemma2", "granite", "gpt2"])
def test_the_loss_and_its_gradients_are_those_of_the_models_own_logits(
    cache: CacheReader, tmp_path: Path, architecture: str
) -> None:
    student = make_student(architecture)
    reference_model = make_student(architecture)
    dataset = CacheDataset(cache)
    trainer = make_trainer(cache, tmp_path, student=student, objective=make_objective("cross_entropy", {}))
    batch = Collator()([dataset[i] for i in (0, 1, 2)])
    loss = trainer.compute_loss(student.train(), batch)
    loss.backward()
    expected = reference_cross_entropy(reference_model.train(), dataset, [0, 1, 2])
    expected.backward()
    # float32 in another order of summation
    torch.testing.assert_close(loss.detach().float(), expected.detach(), rtol=1e-5, atol=1e-6)
    gradients = dict(student.named_parameters())
    for name, parameter in reference_model.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-3, atol=2e-6, msg=name)


def test_accumulation_does_not_change_the_run(cache: CacheReader, tmp_path: Path) -> None:
    """4 micro-batches of 1 equal 1 of 4, although their sequences carry different numbers of targets."""
    whole = make_trainer(cache, tmp_path / "a", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    parts = make_trainer(cache, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    whole.train()
    parts.train()
    assert len(losses(whole)) == 4
    # sums of a few dozen float32 losses in another order; Adam divides gradients near 0 by themselves
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-4)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-3, atol=2e-4, msg=name)
    for left, right in zip(_flat(parts.objective.state_dict()), _flat(whole.objective.state_dict()), strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-7)


def _flat(state: Any) -> list[float]:
    if isinstance(state, dict):
        return [value for name in sorted(state) for value in _flat(state[name])]
    if isinstance(state, list):
        return [value for item in state for value in _flat(item)]
    return [float(state)] if isinstance(state, (int, float)) and not isinstance(state, bool) else []


class RecordingObjective:
    """Delegates to a real objective and keeps what it was told."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.updates: list[tuple[dict[str, float], int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def update(self, sums: dict[str, float], step: int, total_steps: int) -> None:
        self.updates.append((dict(sums), step, total_steps))
        self.inner.update(sums, step, total_steps)


def test_the_objective_is_updated_once_per_optimiser_step_with_sums_over_micro_batches(
    cache: CacheReader, tmp_path: Path
) -> None:
    objective = RecordingObjective(make_objective("taid", {}))
    trainer = make_trainer(
        cache, tmp_path, objective=objective, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4
    )
    trainer.eval_dataset = CacheDataset(cache)
    trainer.train()
    before = objective.state_dict()
    updates = len(objective.updates)
    figures = trainer.evaluate()
    assert [(step, total) for _, step, total in objective.updates] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    dataset = CacheDataset(cache)
    targets = sum(len(dataset[i].positions) for i in range(len(dataset)))
    rows = [sums["rows"] for sums, _, _ in objective.updates]
    assert rows[0] + rows[1] == rows[2] + rows[3] == targets  # two steps of 4 sequences are one epoch of 8
    for (sums, _, _), loss in zip(objective.updates, losses(trainer), strict=True):
        assert sums["loss"] / sums["rows"] == pytest.approx(loss, rel=1e-5)
    assert len(objective.updates) == updates, "evaluation moved the objective"
    assert objective.state_dict() == before
    assert figures["eval_targets"] == targets


def test_logs_carry_the_objectives_state(cache: CacheReader, tmp_path: Path) -> None:
    trainer = make_trainer(cache, tmp_path)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    times = [entry["t"] for entry in entries]
    assert times == sorted(times)
    assert times[0] < times[-1] <= 1


def test_training_moves_the_student_towards_its_teacher(cache: CacheReader, tmp_path: Path) -> None:
    trainer = make_trainer(cache, tmp_path, max_steps=60)
    trainer.eval_dataset = CacheDataset(cache)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.5 * before


def test_a_run_resumed_from_a_checkpoint_equals_an_uninterrupted_one(cache: CacheReader, tmp_path: Path) -> None:
    """Losses, t, learning rates and weights bit for bit, over an epoch boundary."""
    changes: dict[str, Any] = {
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 2,
    }
    straight = make_trainer(cache, tmp_path / "a", **changes)
    straight.train()
    keys = ("loss", "t", "learning_rate", "grad_norm", "step")

    def history(trainer: DistillationTrainer) -> list[list[Any]]:
        return [[entry.get(key) for key in keys] for entry in trainer.state.log_history if "loss" in entry]

    for step in (3, 6):
        resumed = make_trainer(cache, tmp_path / f"b{step}", student=make_student(seed=9), **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert history(resumed) == history(straight)
        for name, value in weights(straight).items():
            assert torch.equal(weights(resumed)[name], value), name
        assert resumed.objective.state_dict() == straight.objective.state_dict()


def test_checkpoints_hold_the_objectives_state(cache: CacheReader, tmp_path: Path) -> None:
    trainer = make_trainer(cache, tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["ObjectiveCallback"]["attributes"]["objective"] == trainer.objective.state_dict()


def test_a_trained_student_saves_and_loads_as_an_ordinary_model(cache: CacheReader, tmp_path: Path) -> None:
    student = make_student("llama-tied")
    trainer = make_trainer(cache, tmp_path / "run", student=student)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    tokens = torch.arange(10)[None]
    student.eval()
    torch.testing.assert_close(loaded(tokens).logits, student(tokens).logits)
    assert loaded.state_dict().keys() == make_student("llama-tied").state_dict().keys()


def test_frozen_embeddings_stay(cache: CacheReader, tmp_path: Path) -> None:
    student = make_student("llama-tied")
    before = student.get_input_embeddings().weight.detach().clone()
    assert freeze_embeddings(student) == before.numel()
    trainer = make_trainer(cache, tmp_path, student=student)
    trainer.train()
    assert torch.equal(student.get_output_embeddings().weight, before)
    assert not torch.equal(student.model.norm.weight, make_student("llama-tied").model.norm.weight)


def test_rows_beyond_the_teachers_vocabulary_take_no_part(cache: CacheReader, tmp_path: Path) -> None:
    student = make_student(vocab_size=VOCAB_SIZE + 3)
    padding = student.lm_head.weight.detach()[VOCAB_SIZE:].clone()
    twin = make_student(vocab_size=VOCAB_SIZE + 3)
    twin.lm_head.weight.data[VOCAB_SIZE:] += 5.0  # whatever the padding says, the loss is the same
    dataset = CacheDataset(cache)
    batch = Collator()([dataset[0], dataset[1]])
    trainer = make_trainer(cache, tmp_path / "a", student=student, weight_decay=0.0)
    other = make_trainer(cache, tmp_path / "b", student=twin)
    torch.testing.assert_close(trainer.compute_loss(student, batch), other.compute_loss(twin, batch))
    trainer.train()
    assert torch.equal(student.lm_head.weight[VOCAB_SIZE:], padding)


def test_bf16_autocast_runs_on_the_cpu_and_keeps_float32_weights(cache: CacheReader, tmp_path: Path) -> None:
    exact = make_trainer(cache, tmp_path / "a", max_steps=2)
    half = make_trainer(cache, tmp_path / "b", max_steps=2, bf16=True)
    exact.train()
    half.train()
    assert all(value.dtype == torch.float32 for value in weights(half).values())
    # bfloat16 keeps 8 bits: logits of a few nats move by a percent
    np.testing.assert_allclose(losses(half), losses(exact), rtol=3e-2)
    assert losses(half) != losses(exact)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_changes_nothing(cache: CacheReader, tmp_path: Path, frozen: bool) -> None:
    """Also where nothing before the first layer needs a gradient, which one way of checkpointing cannot take."""
    runs = []
    for checkpointing in (False, True):
        student = make_student("llama-tied")
        if frozen:
            freeze_embeddings(student)
        trainer = make_trainer(
            cache, tmp_path / str(checkpointing), student=student, max_steps=3, gradient_checkpointing=checkpointing
        )
        trainer.train()
        runs.append(trainer)
    np.testing.assert_allclose(losses(runs[1]), losses(runs[0]), rtol=1e-6)
    for name, value in weights(runs[0]).items():
        torch.testing.assert_close(weights(runs[1])[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_workers_are_spawned_and_change_nothing(cache: CacheReader, tmp_path: Path) -> None:
    alone = make_trainer(cache, tmp_path / "a", max_steps=3)
    helped = make_trainer(cache, tmp_path / "b", max_steps=3, dataloader_num_workers=1)
    assert helped.args.dataloader_multiprocessing_context == "spawn"
    alone.train()
    helped.train()
    assert losses(helped) == losses(alone)


def test_a_step_without_targets_is_no_loss_and_no_crash(cache: CacheReader, tmp_path: Path) -> None:
    dataset = CacheDataset(cache, max_length=1)
    trainer = make_trainer(cache, tmp_path, dataset=dataset, max_steps=2, weight_decay=0.0)
    before = weights(trainer)
    trainer.train()
    assert losses(trainer) == [0.0, 0.0]
    for name, value in weights(trainer).items():
        assert torch.equal(value, before[name]), name


def test_evaluation_does_not_depend_on_the_batch(cache: CacheReader, tmp_path: Path) -> None:
    figures = []
    for size in (1, 3, 8):
        trainer = make_trainer(cache, tmp_path, per_device_eval_batch_size=size)
        trainer.eval_dataset = CacheDataset(cache)
        figures.append(trainer.evaluate())
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("label_smoothing_factor", 0.1), ("train_sampling_strategy", "sequential")]
)
def test_arguments_that_would_bypass_the_objective_are_refused(
    cache: CacheReader, tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.raises(RequestError, match=name):
        make_trainer(cache, tmp_path, **{name: value})


def test_a_model_whose_logits_are_not_its_output_layers_is_refused(cache: CacheReader) -> None:
    student = make_student()
    original = student.lm_head.forward
    student.lm_head.forward = lambda hidden: original(hidden) * 1.5
    with pytest.raises(RequestError, match="not supported"):
        install_loss(student, make_objective("taid", {}), VOCAB_SIZE)


def test_a_loss_is_per_target_whatever_the_processes(cache: CacheReader, tmp_path: Path) -> None:
    dataset = CacheDataset(cache)
    trainer = make_trainer(cache, tmp_path, objective=make_objective("cross_entropy", {}))
    batch = Collator()([dataset[0], dataset[1]])
    alone = float(trainer.compute_loss(trainer.model, batch).detach())
    halved = float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=2 * len(batch["row_index"])).detach())
    assert math.isfinite(alone)
    assert halved == pytest.approx(alone / 2, rel=1e-6)
