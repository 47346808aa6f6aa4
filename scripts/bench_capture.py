"""What capturing costs: CPU time of prefill alone, with the lm_head, with our capture, and by vLLM's own ways.

    scripts/bench_capture.py [TEACHER] [--json FILE]

CPU time of this process and all its children, with the engine up and warm (`build`: 2 N tokens less N, so that its
start-up cancels); the ways take turns, and the median of the rounds counts. Every figure is a ratio to pure prefill
within one run, for other work on the machine slows all alike. Two teachers: TEACHER (default demo-out/teacher),
16 sequences of 512 tokens, in its own dtype; and a random Llama of 11 M parameters with a vocabulary of 32,000, made on
the spot, 64 sequences of 512 tokens, where the lm_head is nearly all there is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

LENGTH, TOP_K = 512, 64
WAYS = ("prefill", "lm_head", "capture", "prompt_logprobs", "flat_logprobs")

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def cpu_seconds() -> float:
    """User and system time of this process and every process below it."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return (
        sum(time.user + time.system for time in times) + me.cpu_times().children_user + me.cpu_times().children_system
    )


def peak_bytes() -> int:
    """The largest resident size this process has had since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def make_random_teacher(path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{at}": at for at in range(32000)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(path)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


class Bench:
    """One engine, and the ways to send sequences through it."""

    def __init__(self, teacher: Path, dtype: str) -> None:
        from transformers import AutoConfig

        from cache_builder.engine import Capture
        from cache_builder.engine_settings import EngineSettings
        from cache_builder.vllm_engine import VLLMEngine

        self.vocab_size = int(AutoConfig.from_pretrained(teacher).vocab_size)
        settings = EngineSettings(
            model=str(teacher), dtype=dtype, max_model_len=LENGTH, enforce_eager=True, capture_path="worker"
        )
        self.engine: Any = VLLMEngine(settings, Capture(TOP_K, self.vocab_size))

    def sequences(self, count: int, seed: int) -> list[Any]:
        from storage_schemas.records import TokenSequence

        rng = np.random.default_rng(seed)
        mask = np.arange(LENGTH) > 0
        return [
            TokenSequence(str(at), str(at), rng.integers(0, self.vocab_size, LENGTH).astype(np.int32), mask)
            for at in range(count)
        ]

    def ways(self) -> dict[str, Callable[[Sequence[Any]], None]]:
        from cache_builder.vllm_capture import EXTRA_ARG

        engine, asked = self.engine, {"logprobs": TOP_K, "prompt_logprobs": TOP_K}

        def lm_head(sequences: Sequence[Any]) -> None:
            """The floor: the same calls of compute_logits, and nothing done with the logits."""
            run = engine._llm.collective_rpc
            run(set_writing, args=(False,))
            run("begin_capture", args=("", 0, self.vocab_size, TOP_K, ()))
            engine._generate(sequences, [{"extra_args": {EXTRA_ARG: 0}}] * len(sequences))
            run("end_capture")
            run(set_writing, args=(True,))

        return {
            "prefill": lambda sequences: engine._generate(sequences, [{}] * len(sequences)),
            "lm_head": lm_head,
            "capture": lambda sequences: [None for _ in engine.score(sequences)],
            "prompt_logprobs": lambda sequences: engine._generate(sequences, [asked] * len(sequences)),
            "flat_logprobs": lambda sequences: engine._generate(
                sequences, [{**asked, "flat_logprobs": True}] * len(sequences)
            ),
        }


def set_writing(worker: Any, writes: bool) -> None:
    getattr(worker, "worker", worker).logitcask_writes = writes  # vLLM hands over the wrapper of the worker


def measure(bench: Bench, count: int, rounds: int) -> dict[str, float]:
    """CPU seconds of `count` sequences by each way, the median over the rounds; the engine is up and warm before."""
    ways = bench.ways()
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        sequences = bench.sequences(count if turn else 2, seed=turn)  # first calls allocate: not counted
        for name, run in ways.items():
            before = cpu_seconds()
            run(sequences)
            if turn:
                spent[name].append(cpu_seconds() - before)
                print(f"round {turn} {name}: {spent[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in spent.items()}


def measure_growth(bench: Bench, count: int) -> dict[str, float]:
    """Peak memory of a capture, and of one ten times as long, with the CPU time of a token of each."""
    capture = bench.ways()["capture"]
    growth = {}
    for name, size in (("once", count), ("tenfold", 10 * count)):
        sequences = bench.sequences(size, seed=0)
        forget_peak()
        before = cpu_seconds()
        capture(sequences)
        growth[f"{name}_cpu_us_per_token"] = (cpu_seconds() - before) / (size * LENGTH) * 1e6
        growth[f"{name}_peak_mib"] = peak_bytes() / 2**20
        growth[f"{name}_rows_mib"] = size * LENGTH * (8 * TOP_K + 13) / 2**20  # the sink, mapped and so counted
    return growth


def measure_build(teacher: Path, dtype: str, vocab_size: int, count: int) -> float:
    """CPU seconds of `count` more sequences through the whole of `cache-builder build`."""
    spent = []
    for size in (count, 2 * count):
        with tempfile.TemporaryDirectory() as scratch:
            data = Path(scratch, "data.jsonl")
            rng = np.random.default_rng(0)
            rows = (json.dumps({"input_ids": rng.integers(0, vocab_size, LENGTH).tolist()}) for _ in range(size))
            data.write_text("\n".join(rows) + "\n")
            command = [sys.executable, "-m", "cache_builder.cli", "build", "--teacher", str(teacher)]
            command += ["--dataset", str(data), "--output", f"{scratch}/cache", "--top-k", str(TOP_K)]
            command += ["--max-length", str(LENGTH), "--set", "engine.enforce_eager=true"]
            command += ["--set", f"engine.dtype={dtype}"]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return spent[1] - spent[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?", type=Path, default=Path("demo-out/teacher"))
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["smollm2", "random_11m"])
    parser.add_argument("--build", action="store_true", help="measure the whole of cache-builder build as well")
    parser.add_argument("--tenfold", action="store_true", help="measure memory and time at ten times the tokens")
    arguments = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, count, dtype in (("random_11m", 64, "bfloat16"), ("smollm2", 16, "bfloat16")):
            if arguments.only not in (None, name):
                continue
            teacher = arguments.teacher if name == "smollm2" else Path(scratch, name)
            if name == "smollm2" and not teacher.is_dir():
                parser.error(f"no teacher in {teacher}; scripts/demo/make_teacher.py makes one")
            if name == "random_11m":
                make_random_teacher(teacher)
            bench = Bench(teacher, dtype)
            seconds = measure(bench, count, arguments.rounds)
            extra = measure_growth(bench, count) if arguments.tenfold else {}
            bench.engine.close()
            if arguments.build:
                seconds["build"] = measure_build(teacher, dtype, bench.vocab_size, count)
            result[name] = {way: round(spent / seconds["prefill"], 3) for way, spent in seconds.items()}
            result[name]["prefill_cpu_us_per_token"] = round(seconds["prefill"] / (count * LENGTH) * 1e6, 1)
            result[name] |= {key: round(value, 1) for key, value in extra.items()}
            for key, value in result[name].items():
                print(f"{name:12s} {key:28s} {value:10.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
