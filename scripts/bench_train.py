"""What a training step costs: plain fine-tuning, TAID from a cache, TAID with the teacher at hand.

    python scripts/bench_train.py --teacher DIR --student DIR --cache DIR [--steps 8] [--bf16] [--json FILE]

The three kinds of step take the same tokens in turn (interleaved, so that a busy machine slows all alike); the table
gives medians. Peak memory is measured in a process of its own for each kind, from before its models are loaded: host
memory on a CPU, device memory on a GPU. Ratios inside one run mean something, seconds elsewhere do not.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from distiller.collate import Collator
from distiller.objectives import make_objective
from distiller.stream import CacheDataset, WindowShuffleSampler
from distiller.student import freeze_embeddings, install_loss, load_student
from distiller.trainer import DistillationTrainer
from storage_schemas.reader import CacheReader

KINDS = ("plain", "cached_taid", "online_taid")
TAID_T = 0.5
"""Where on its way from student to teacher the target stands: the cost does not depend on it."""


class Steps:
    """One kind of training step, with its models and its optimiser."""

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        self.kind, self.options = kind, options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.student = load_student(options.student).to(self.device).train()
        if options.freeze_embeddings:
            freeze_embeddings(self.student)
        self.teacher = None
        self.teacher_seconds: list[float] = []
        if kind == "online_taid":
            self.teacher = load_student(options.teacher, dtype=options.teacher_dtype).to(self.device).eval()
        if kind == "cached_taid":
            vocab_size = CacheReader.open(options.cache).identity.tokenizer.vocab_size
            install_loss(self.student, make_objective("taid", {"t_start": TAID_T}), vocab_size)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(self, batch: dict[str, Any]) -> float:
        """Forward, backward and optimiser step; seconds."""
        started = self._now()
        with self._autocast():
            loss = {"plain": self._plain, "cached_taid": self._cached, "online_taid": self._online}[self.kind](batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._now() - started

    def _plain(self, batch: dict[str, Any]) -> torch.Tensor:
        log_q = self._logits(self.student, batch).log_softmax(-1)
        return -log_q.gather(1, batch["teacher"]["label_ids"][:, None]).mean()

    def _cached(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.student(**batch)["loss_sum"] / len(batch["row_index"])  # type: ignore[no-any-return]

    def _online(self, batch: dict[str, Any]) -> torch.Tensor:
        started = self._now()
        with torch.no_grad():
            log_p = self._logits(self.teacher, batch).log_softmax(-1)
        self.teacher_seconds.append(self._now() - started)
        log_q = self._logits(self.student, batch).log_softmax(-1)
        with torch.no_grad():
            target = ((1 - TAID_T) * log_q + TAID_T * log_p).softmax(-1)
        return -(target * log_q).sum(-1).mean()

    def _logits(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        logits = model(**tokens, use_cache=False).logits
        return logits.flatten(0, 1)[batch["row_index"]].float()  # type: ignore[no-any-return]

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.options.bf16 else nullcontext()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def first_batch(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The longest rows of the cache: the batch that decides the memory."""
    dataset = CacheDataset(CacheReader.open(options.cache), max_length=options.max_length)
    longest = sorted(range(len(dataset)), key=lambda i: -len(dataset[i]))[: options.batch_size]
    batch: dict[str, Any] = _move(Collator()([dataset[i] for i in longest]), device)
    return batch


def measure_memory(kind: str, options: argparse.Namespace) -> int:
    """Peak bytes of two steps of one kind over what the process holds before its models are loaded."""
    gc.collect()
    on_gpu = torch.cuda.is_available()
    before = 0 if on_gpu else _status("VmRSS")
    steps = Steps(kind, options)
    batch = first_batch(options, steps.device)
    for _ in range(2):  # the second has the optimiser's state
        steps.step(batch)
    return torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM") - before


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each kind, interleaved."""
    kinds = {kind: Steps(kind, options) for kind in KINDS}
    batch = first_batch(options, kinds["plain"].device)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(options.steps + 1):
        for kind, steps in kinds.items():
            taken = steps.step(batch)
            if turn > 0:  # the first turn warms up
                seconds[kind].append(taken)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    tokens = int(batch["attention_mask"].sum())
    return {
        **{kind: {"seconds": value} for kind, value in medians.items()},
        "teacher_forward_seconds": statistics.median(kinds["online_taid"].teacher_seconds[1:]),
        "train_tokens_per_second": tokens / medians["cached_taid"],
        "tokens": tokens,
        "targets": len(batch["row_index"]),
    }


def measure_loader(options: argparse.Namespace) -> float:
    """Tokens per second of dataset and collator alone, in training order, over the whole cache."""
    dataset = CacheDataset(CacheReader.open(options.cache), max_length=options.max_length)
    sampler = WindowShuffleSampler(dataset.shard_of, seed=0, window=4)
    loader: Any = DataLoader(dataset, batch_size=options.batch_size, sampler=sampler, collate_fn=Collator())
    tokens, started = 0, time.perf_counter()
    for batch in loader:
        tokens += int(batch["attention_mask"].sum())
    return tokens / (time.perf_counter() - started)


def measure_data_wait(options: argparse.Namespace) -> float:
    """Share of a real run's time that it waits for its next batch."""
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(
            output_dir=output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        student = load_student(options.student)
        if options.freeze_embeddings:
            freeze_embeddings(student)
        dataset = CacheDataset(CacheReader.open(options.cache), max_length=options.max_length)
        trainer = DistillationTrainer(student, make_objective("taid", {}), args, train_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        return trainer.data_wait_seconds / (time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--teacher-dtype", default="float32")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--freeze-embeddings", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peak-of", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    if options.peak_of:
        print(measure_memory(options.peak_of, options))
        return
    found = measure_steps(options)
    found["loader_tokens_per_second"] = measure_loader(options)
    found["data_wait_share"] = measure_data_wait(options)
    given = list(sys.argv[1:] if argv is None else argv)
    for kind in KINDS:
        command = [sys.executable, str(Path(__file__).resolve()), *given, "--peak-of", kind]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[kind]["peak_bytes"] = int(done.stdout.split()[-1])
    print(render(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def render(found: dict[str, Any]) -> str:
    base = found["plain"]
    lines = [f"{'step':<14}{'seconds':>10}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}"]
    for kind in KINDS:
        seconds, peak = found[kind]["seconds"], found[kind]["peak_bytes"]
        ratios = seconds / base["seconds"], peak / base["peak_bytes"]
        lines.append(
            f"{kind.replace('_', ' '):<14}{seconds:>10.3f}{ratios[0]:>8.2f}{peak / 2**20:>10.0f}{ratios[1]:>8.2f}"
        )
    lines += [
        f"teacher's forward in an online step: {found['teacher_forward_seconds']:.3f} s",
        f"cached TAID: {found['train_tokens_per_second']:,.0f} tokens/s; loader alone: "
        f"{found['loader_tokens_per_second']:,.0f} tokens/s; waiting for data: {found['data_wait_share']:.1%} of a run",
    ]
    return "\n".join(lines)


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}: host memory can be measured on Linux only")


def _move(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    return {name: _move(value, device) for name, value in batch.items()}


if __name__ == "__main__":
    main()
