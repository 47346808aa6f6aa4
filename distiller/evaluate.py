"""How close a student is to its teacher on sequences it was not trained on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from distiller.collate import Collator
from distiller.head import StudentRows, TeacherRows, student_rows
from distiller.stream import CacheDataset, Targets, TrainingRow
from distiller.student import check_compatible, hidden_states, load_config, load_student, load_tokenizer, output_head
from distiller.worst import WorstTargets
from storage_schemas.errors import RequestError
from storage_schemas.reader import CacheReader

Float64 = NDArray[np.float64]
COLUMNS = ("targets", "kl", "nll", "teacher_nll", "agreed")
"""What is summed over the target tokens of each row: their number, forward KL, the student's and the teacher's negative
log-likelihood of the labels (nats), and how often both rank the same token first."""

Measure = Callable[[Mapping[str, Any]], StudentRows]


def evaluate(
    model: Any,
    cache: CacheReader,
    *,
    max_length: int | None = None,
    targets: Targets = "completion",
    batch_size: int = 8,
    bf16: bool = False,
    bootstrap_samples: int = 0,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Held-out figures of a student, per target token: see `metrics` for their names. Only the cache is read.

    bootstrap_samples: with more than 0, also 95 % intervals over documents. progress: told rows as they are done.
    """
    dataset = CacheDataset(cache, max_length=max_length, targets=targets)
    device = next(model.parameters()).device

    def measure(batch: Mapping[str, Any]) -> StudentRows:
        return measure_batch(model, batch, dataset.vocab_size)

    training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext():
            table = measure_rows(measure, dataset, Collator(), batch_size=batch_size, device=device, progress=progress)
    finally:
        model.train(training)
    figures = metrics(table)
    if bootstrap_samples > 0:
        clusters = [cache.document_ids[int(row[0])] for row in dataset.members]
        figures.update(bootstrap_intervals(table, clusters, samples=bootstrap_samples))
    return figures


@torch.no_grad()
def measure_batch(model: Any, batch: Mapping[str, Any], vocab_size: int) -> StudentRows:
    """The student's side of every row of a batch that carries loss, without gradient."""
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    hidden = hidden_states(model, tokens)
    head = output_head(model)
    rows = hidden.reshape(-1, hidden.shape[-1])[batch["row_index"]]
    return student_rows(rows, head.weight, TeacherRows(**batch["teacher"]), vocab_size=vocab_size, **head.arguments())


def measure_rows(
    measure: Measure,
    dataset: CacheDataset,
    collator: Collator,
    *,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], object] | None = None,
    worst: WorstTargets | None = None,
) -> Float64:
    """Sums over the target tokens of each dataset row, [rows, len(COLUMNS)] float64; rows of other ranks stay 0.

    worst: is shown every target of an unpacked dataset.
    """
    table = np.zeros((len(dataset), len(COLUMNS)))
    mine = range(rank, len(dataset), world_size)
    for start in range(0, len(mine), batch_size):
        chosen = mine[start : start + batch_size]
        rows = [dataset[i] for i in chosen]
        if any(len(row.positions) for row in rows):
            student = measure(_to_device(collator(rows), device))
            values = _per_target(student, rows)
            if worst is not None:
                _show(worst, dataset, chosen, rows, values, student)
            owner = np.repeat(np.array(chosen), [len(row.positions) for row in rows])
            np.add.at(table, owner, values)
        if progress is not None:
            progress(len(chosen))
    return table


def bootstrap_intervals(table: Float64, clusters: Sequence[str], *, samples: int, seed: int = 0) -> dict[str, float]:
    """95 % intervals of the figures in `metrics`, as `kl_low`, `kl_high` and so on: the percentile bootstrap.

    Drawn are whole clusters (documents): the targets of one document are no independent samples.
    """
    names, owner = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((len(names), table.shape[1]))
    np.add.at(sums, owner, table)
    generator = np.random.default_rng(seed)
    draws = [metrics(sums[generator.integers(0, len(names), len(names))]) for _ in range(samples)]
    found: dict[str, float] = {}
    for name in ("kl", "perplexity", "top1_agreement"):
        values = np.array([draw[name] for draw in draws])
        if np.isfinite(values).any():
            low, high = np.nanpercentile(values, [2.5, 97.5])
            found[f"{name}_low"], found[f"{name}_high"] = float(low), float(high)
    return found


def metrics(table: Float64) -> dict[str, float]:
    """Figures over all target tokens.

    kl: forward KL to the teacher over the stored ids and the rest as one outcome, nats. perplexity, teacher_perplexity:
    of the labels. top1_agreement: share of targets where both rank the same token first. targets: how many.
    """
    targets, kl, nll, teacher_nll, agreed = table.sum(axis=0)
    if targets == 0:
        return {
            "kl": math.nan,
            "perplexity": math.nan,
            "teacher_perplexity": math.nan,
            "top1_agreement": math.nan,
            "targets": 0.0,
        }
    return {
        "kl": float(kl / targets),
        "perplexity": _exp(nll / targets),
        "teacher_perplexity": _exp(teacher_nll / targets),
        "top1_agreement": float(agreed / targets),
        "targets": float(targets),
    }


def _per_target(student: StudentRows, rows: list[TrainingRow]) -> Float64:
    """[N, len(COLUMNS)] figures of each target."""
    log_p = torch.from_numpy(np.concatenate([row.top_logprobs for row in rows])).double()
    log_m = torch.from_numpy(np.concatenate([row.log_tail_mass for row in rows])).double()
    teacher_nll = -torch.from_numpy(np.concatenate([row.label_logprob for row in rows])).double()
    top_ids = torch.from_numpy(np.concatenate([row.top_ids for row in rows])).long()
    kl = _weighted(log_p, student.log_q.double().cpu()).sum(dim=1) + _weighted(log_m, student.log_rest.double().cpu())
    agreed = (student.top1_ids.cpu() == top_ids[:, 0]).double()
    columns = [torch.ones_like(kl), kl, -student.label_log_q.double().cpu(), teacher_nll, agreed]
    return torch.stack(columns, dim=1).numpy()


def _show(
    worst: WorstTargets,
    dataset: CacheDataset,
    chosen: Sequence[int],
    rows: list[TrainingRow],
    values: Float64,
    student: StudentRows,
) -> None:
    log_q = student.log_q.float().cpu().numpy()
    start = 0
    for i, row in zip(chosen, rows, strict=True):
        stop = start + len(row.positions)
        name = dataset.cache.sequence_ids[int(dataset.members[i][0])]
        worst.add(name, row, values[start:stop, COLUMNS.index("kl")], log_q[start:stop])
        start = stop


def _weighted(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p (log p − log q), 0 where p is 0."""
    return torch.where(log_p == -math.inf, torch.zeros_like(log_p), log_p.exp() * (log_p - log_q))


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    return {name: _to_device(value, device) for name, value in batch.items()}


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def evaluate_path(
    student: str, cache: str, *, batch_size: int = 8, bf16: bool = False, **options: Any
) -> dict[str, float]:
    """`evaluate` for the student of a directory, refused where its tokenizer is not the cache's."""
    reader = CacheReader.open(cache)
    check_compatible(reader.identity, load_tokenizer(student), load_config(student), student)
    model = load_student(student)
    if torch.cuda.is_available():
        model = model.cuda()
    with tqdm(total=len(reader), desc="evaluate", unit="seq", file=sys.stderr, mininterval=0.5) as bar:
        figures = evaluate(model, reader, batch_size=batch_size, bf16=bf16, progress=bar.update, **options)
    if figures["targets"] == 0:
        raise RequestError(
            f"expected target tokens to measure, got none in {cache}; give --targets all or another cache"
        )
    return figures
