"""The main flow of `distiller train`: cache → student."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from distiller.card import model_card
from distiller.config import TrainSettings
from distiller.lora import add_lora
from distiller.objectives import Objective, make_objective
from distiller.progress import HistoryFile, ProgressBar
from distiller.resume import PROVENANCE_NAME, SETTINGS_NAME, find_start, provenance
from distiller.stream import CacheDataset, split_held_out
from distiller.student import (
    check_compatible,
    check_length,
    freeze_embeddings,
    load_config,
    load_student,
    load_tokenizer,
)
from distiller.trainer import DistillationTrainer
from storage_schemas.errors import RequestError
from storage_schemas.reader import CacheReader
from storage_schemas.settings import write_settings

logger = logging.getLogger(__name__)

SUMMARY_NAME = "summary.json"
WORST_NAME = "worst_targets.json"
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_total_limit": 2,
    "report_to": "none",
    "restore_callback_states_from_checkpoint": True,
    "average_tokens_across_devices": True,
}
"""Where we differ from TrainingArguments: the authors' recipe for TAID, no tracker by surprise, exact resumption."""

OURS = ("output_dir", "remove_unused_columns", "resume_from_checkpoint", "do_train", "do_eval", "do_predict")
"""TrainingArguments that other settings decide."""


def train(settings: TrainSettings, *, resume: bool = False) -> dict[str, Any]:
    """Train the student that the settings name and write it to `settings.output`; returns the summary written there.

    Raises RequestError for settings that cannot be followed, before anything is written.
    """
    started = time.monotonic()
    cache = CacheReader.open(settings.data.cache)
    train_dataset, eval_dataset = open_datasets(settings, cache)
    config, tokenizer = load_config(settings.student.path), load_tokenizer(settings.student.path)
    check_compatible(cache.identity, tokenizer, config, settings.student.path)
    check_length(config, train_dataset.longest, settings.student.path)
    objective = make_objective(settings.objective.name, settings.objective.options)
    args = training_arguments(settings, has_eval=eval_dataset is not None)
    checkpoint = find_start(settings, cache, resume)
    args.eval_on_start = args.eval_on_start and checkpoint is None
    set_seed(args.seed)
    student = load_student(
        settings.student.path, dtype=settings.student.dtype, attn_implementation=settings.student.attn_implementation
    )
    frozen = freeze_embeddings(student) if settings.student.freeze_embeddings else 0
    describe(settings, cache, train_dataset, student, frozen)
    if settings.lora is not None:
        student = add_lora(student, settings.lora)
    trainer = make_trainer(settings, student, objective, args, train_dataset, eval_dataset, tokenizer)
    output = Path(settings.output)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        write_settings(settings, output / SETTINGS_NAME)
        (output / PROVENANCE_NAME).write_text(json.dumps(provenance(cache), indent=1) + "\n", encoding="utf-8")
    trainer.train(resume_from_checkpoint=checkpoint)
    final = trainer.evaluate() if eval_dataset is not None else {}
    worst = [target.described(tokenizer) for target in trainer.worst_targets]
    save_student(trainer, tokenizer)
    trainer.save_state()
    summary = summarise(settings, trainer, final, seconds=time.monotonic() - started)
    if trainer.is_world_process_zero():
        (output / SUMMARY_NAME).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (output / WORST_NAME).write_text(json.dumps(worst, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (output / "README.md").write_text(model_card(settings, summary, provenance(cache)), encoding="utf-8")
    return summary


def open_datasets(settings: TrainSettings, cache: CacheReader) -> tuple[CacheDataset, CacheDataset | None]:
    """The training rows, and the held-out ones: another cache of the same teacher, or a part of the same cache."""
    data = settings.data
    if data.eval_cache is not None and data.eval_fraction is not None:
        raise RequestError("expected one of data.eval_cache and data.eval_fraction, got both; leave one out")
    sequences, held_out, eval_cache = None, None, None
    if data.eval_fraction is not None:
        sequences, held_out = split_held_out(cache, data.eval_fraction)
        eval_cache = cache
    elif data.eval_cache is not None:
        eval_cache = CacheReader.open(data.eval_cache)
        if eval_cache.identity.tokenizer.digest != cache.identity.tokenizer.digest:
            raise RequestError(
                f"expected a held-out cache with the tokenizer of {data.cache}, got another one in {data.eval_cache}; "
                "build both with the same teacher"
            )
    train_dataset = CacheDataset(
        cache, max_length=data.max_length, targets=data.targets, sequences=sequences, packing=data.packing
    )
    if eval_cache is None:
        return train_dataset, None
    return train_dataset, CacheDataset(eval_cache, max_length=data.max_length, targets=data.targets, sequences=held_out)


def training_arguments(settings: TrainSettings, *, has_eval: bool) -> TrainingArguments:
    """TrainingArguments of the `training` table over our defaults; RequestError for names it does not know."""
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in settings.training:
        if name in OURS:
            raise RequestError(f"expected no training.{name}, for other settings decide it; leave it out")
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean training.{close[0]}?" if close else "see transformers.TrainingArguments"
            raise RequestError(f"unknown setting training.{name}; {hint}")
    defaults = {**DEFAULTS, "use_cpu": not torch.accelerator.is_available()}  # else bf16 is refused on a CPU
    if has_eval:
        defaults.update(eval_on_start=True, metric_for_best_model="eval_kl", greater_is_better=False)
    evaluates = has_eval and settings.training.get("eval_strategy", "no") != "no"
    if settings.early_stopping is not None:
        if not evaluates:
            raise RequestError(
                "expected evaluations for early_stopping to go by, got none; give --eval-cache or data.eval_fraction, "
                "and training.eval_strategy with training.eval_steps"
            )
        defaults["load_best_model_at_end"] = True
    if settings.training.get("eval_strategy", "no") != "no" and not has_eval:
        raise RequestError(
            "expected held-out sequences for training.eval_strategy, got none; give --eval-cache or data.eval_fraction"
        )
    try:
        args = TrainingArguments(output_dir=settings.output, **{**defaults, **settings.training})
    except (TypeError, ValueError, ImportError) as error:
        raise RequestError(f"the training settings do not go together: {str(error).strip()}") from error
    try:
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise RequestError(f"training.report_to={args.report_to} cannot be followed: {str(error).strip()}") from error
    return args


def make_trainer(
    settings: TrainSettings,
    student: Any,
    objective: Objective,
    args: TrainingArguments,
    train_dataset: CacheDataset,
    eval_dataset: CacheDataset | None,
    tokenizer: Any,
) -> DistillationTrainer:
    """The trainer with our progress on stderr in place of transformers' own, which prints to stdout."""
    callbacks: list[Any] = [HistoryFile(Path(settings.output)), ProgressBar(tuple(objective.metrics()))]
    if settings.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping.patience, settings.early_stopping.threshold))
    trainer = DistillationTrainer(
        student,
        objective,
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        shuffle_window=settings.data.shuffle_window,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def save_student(trainer: DistillationTrainer, tokenizer: Any) -> None:
    """Write an ordinary checkpoint into the output directory; adapters are merged into the weights they adapt."""
    if not hasattr(trainer.model, "merge_and_unload"):
        trainer.save_model()
    elif trainer.is_world_process_zero():
        trainer.model.merge_and_unload().save_pretrained(trainer.args.output_dir)
        tokenizer.save_pretrained(trainer.args.output_dir)


def describe(settings: TrainSettings, cache: CacheReader, dataset: CacheDataset, student: Any, frozen: int) -> None:
    """Say what will be trained on what, and what was cut."""
    total = sum(p.numel() for p in student.parameters())
    identity = cache.identity
    logger.info(
        "%s: %d sequences, %d tokens, top %d of %s; student of %.1f M parameters%s; objective %s",
        settings.data.cache, len(cache), cache.token_count, identity.capture.top_k, identity.teacher.model,
        total / 1e6, f", {frozen / 1e6:.1f} M of them frozen" if frozen else "", settings.objective.name,
    )  # fmt: skip
    if dataset.cut_sequences:
        logger.warning(
            "%d sequences are longer than max_length %d and lose %d of %d tokens",
            dataset.cut_sequences, dataset.max_length, dataset.cut_tokens, dataset.cut_tokens + dataset.token_count,
        )  # fmt: skip
    if dataset.short_sequences:
        logger.warning("%d sequences of a single token carry no loss and are left out", dataset.short_sequences)
    if dataset.packing:
        filled = dataset.token_count / (len(dataset) * (dataset.max_length or dataset.longest))
        logger.info("packed into %d rows, %.1f %% full", len(dataset), 100 * filled)


def summarise(
    settings: TrainSettings, trainer: DistillationTrainer, final: dict[str, float], *, seconds: float
) -> dict[str, Any]:
    """The figures of the run: first and last held-out ones, the objective's last state."""
    history = trainer.state.log_history
    losses = [entry for entry in history if "loss" in entry]
    first: dict[str, Any] = next((entry for entry in history if "eval_kl" in entry and entry["step"] == 0), {})
    summary: dict[str, Any] = {
        "output": settings.output,
        "objective": settings.objective.name,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "first_loss": losses[0]["loss"] if losses else None,
        "last_loss": losses[-1]["loss"] if losses else None,
        **{name: value for name, value in trainer.objective.metrics().items() if math.isfinite(value)},
        "seconds": seconds,
    }
    for name in ("kl", "perplexity", "teacher_perplexity", "top1_agreement"):
        if f"eval_{name}" in final:
            summary[f"start_{name}"], summary[f"held_out_{name}"] = first.get(f"eval_{name}"), final[f"eval_{name}"]
    if torch.cuda.is_available():
        summary["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return summary
