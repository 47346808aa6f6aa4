"""What a run would be, without training: every check that needs no weights, and the counts."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from distiller.config import TrainSettings
from distiller.objectives import make_objective
from distiller.student import check_compatible, check_length, freeze_embeddings, load_config, load_tokenizer
from distiller.train import open_datasets, training_arguments
from storage_schemas.reader import CacheReader

BYTES_PER_TRAINED_PARAMETER = 16
"""float32 weight, gradient and AdamW's two moments."""


def dry_run(settings: TrainSettings) -> dict[str, Any]:
    """Rows, steps, parameters and the memory of weights and optimiser; RequestError as the run itself would raise it.

    Activations and the head's chunks come on top of `state_bytes`. Nothing is written and no weight is loaded.
    """
    cache = CacheReader.open(settings.data.cache)
    rows, held_out = open_datasets(settings, cache)
    config, tokenizer = load_config(settings.student.path), load_tokenizer(settings.student.path)
    check_compatible(cache.identity, tokenizer, config, settings.student.path)
    check_length(config, rows.longest, settings.student.path)
    make_objective(settings.objective.name, settings.objective.options)
    args = training_arguments(settings, has_eval=held_out is not None)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batches = math.ceil(len(rows) / (args.per_device_train_batch_size * ranks))
    steps_per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(config)
    if settings.student.freeze_embeddings:
        freeze_embeddings(student)
    parameters = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    found: dict[str, Any] = {
        "cache_tokens": cache.token_count,
        "teacher": cache.identity.teacher.model,
        "top_k": cache.identity.capture.top_k,
        "rows": len(rows),
        "row_tokens": rows.token_count,
        "cut_sequences": rows.cut_sequences,
        "cut_tokens": rows.cut_tokens,
        "held_out_rows": 0 if held_out is None else len(held_out),
        "steps": steps,
        "steps_per_epoch": steps_per_epoch,
        "mean_tokens_per_step": rows.token_count / steps_per_epoch,
        "parameters": parameters,
    }
    if settings.lora is None:
        found["trained_parameters"] = trained
        found["state_bytes"] = 4 * (parameters - trained) + BYTES_PER_TRAINED_PARAMETER * trained
    return found
