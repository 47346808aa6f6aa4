"""Memory and time of the head, forward + backward, against the same objective on full logits written well.

Ratios are measured in one process per case, interleaved, best of several: peak memory over what the inputs take, and
time. Both sides get gradients to the hidden states and to lm_head. Fixed seed, random inputs.

    python scripts/bench_head.py --vocab 49152 --dtype float32 --objectives taid reverse_kl
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distiller import divergences
from distiller.adakd import hellinger
from distiller.head import distillation_loss
from distiller.objectives import OBJECTIVES, make_objective
from distiller.rows import TeacherRows
from distiller.taid import interpolate

ROWS, WIDTH, TOP_K = 2048, 576, 64
CASES = [name for name in OBJECTIVES if name != "mix"]


def dense_loss(name: str, log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    """The objective on full rows; log_q is the one log_softmax."""
    if name == "cross_entropy":
        return functional.nll_loss(log_q, labels, reduction="sum")
    if name == "forward_kl":
        return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if name == "taid":
        return functional.kl_div(log_q, interpolate(log_p, log_q, 0.4), reduction="sum", log_target=True)
    if name == "adaptive_kl":
        return divergences.adaptive_kl(log_p, log_q, rest_columns=0).sum()
    if name == "dkd":
        return divergences.dkd(log_p, log_q, labels).sum()
    if name == "abkd":
        return divergences.ab_divergence(0.9 * log_p, 0.9 * log_q).sum()
    if name == "ctkd":
        temperature = torch.tensor(15.6, requires_grad=True, device=log_q.device)
        at = (log_p / temperature).log_softmax(1), (log_q / temperature).log_softmax(1)
        return functional.kl_div(at[1], at[0], reduction="sum", log_target=True) * temperature**2
    if name == "adakd":
        with torch.no_grad():
            difficulty = hellinger(log_p, log_q)
            temperature = (-0.5 * (difficulty / difficulty.median()).log().tanh()).exp()[:, None]
            target = (log_p / temperature).log_softmax(1)
        part = functional.kl_div((log_q / temperature).log_softmax(1), target, reduction="none", log_target=True)
        return (part.sum(1) * temperature[:, 0] ** 2).sum()
    return getattr(divergences, name)(log_p, log_q).sum()


class Case:
    """One objective on one set of inputs."""

    def __init__(self, name: str, vocab: int, dtype: torch.dtype, device: str, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.name = name
        hidden = torch.randn(rows, WIDTH, generator=generator)
        weight = torch.randn(vocab, WIDTH, generator=generator) * 3 / WIDTH**0.5
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.weight = weight.to(device, dtype).requires_grad_()
        self.labels = torch.randint(vocab, (rows,), generator=generator).to(device)
        self.log_p = torch.empty(rows, vocab, device=device)
        for part in self.log_p.split(64):
            part.copy_((torch.randn(part.shape, generator=generator) * 3).log_softmax(1))
        values, ids = (torch.cat(x) for x in zip(*(part.topk(TOP_K) for part in self.log_p.split(64)), strict=True))
        label_logprob = self.log_p.gather(1, self.labels[:, None])[:, 0]
        mass = torch.log1p(-values.exp().sum(1))
        self.teacher = TeacherRows(ids, values, mass, self.labels, label_logprob)
        self.objective = make_objective(name)

    def ours(self) -> None:
        distillation_loss(self.hidden, self.weight, self.teacher, self.objective).loss_sum.backward()

    def dense(self) -> None:
        logits = (self.hidden @ self.weight.T).float()
        log_q = logits.log_softmax(1)
        del logits
        dense_loss(self.name, self.log_p, log_q, self.labels).backward()

    def peak(self, run: Callable[[], None]) -> int:
        """Bytes above what was there before."""
        self.hidden.grad = self.weight.grad = None
        if self.hidden.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        run()
        return resident("VmHWM") - before

    def seconds(self, run: Callable[[], None]) -> float:
        self.hidden.grad = self.weight.grad = None
        self.synchronise()
        started = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - started

    def synchronise(self) -> None:
        if self.hidden.is_cuda:
            torch.cuda.synchronize()


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(name: str, vocab: int, dtype: str, device: str, rows: int, repeats: int) -> dict[str, object]:
    case = Case(name, vocab, getattr(torch, dtype), device, rows)
    if device == "cuda":
        case.ours(), case.dense()
    peaks = [case.peak(run) for run in (case.ours, case.dense)]
    times = [[case.seconds(run) for run in (case.ours, case.dense)] for _ in range(repeats)]
    ours, dense = (min(column) for column in zip(*times, strict=True))
    return {
        "objective": name,
        "vocab": vocab,
        "dtype": dtype,
        "device": device,
        "peak_ratio": round(peaks[0] / peaks[1], 4),
        "time_ratio": round(ours / dense, 3),
        "peak_mib": round(peaks[0] / 2**20),
        "seconds": round(ours, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--vocab", nargs="+", type=int, default=[49152, 151936])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(**json.loads(arguments.case))))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {torch.get_num_threads()} threads, N = {arguments.rows}, d = {WIDTH}, k = {TOP_K}")
    print(
        f"{'objective':<16}{'vocab':>8}{'dtype':>10}{'peak ratio':>12}{'time ratio':>12}{'peak MiB':>10}{'seconds':>9}"
    )
    rows = []
    # Large blocks go back to the system at once, or the peak would be the allocator's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    for vocab in arguments.vocab:
        for dtype in arguments.dtype:
            for name in arguments.objectives:
                case = {"name": name, "vocab": vocab, "dtype": dtype, "device": device}
                case |= {"rows": arguments.rows, "repeats": arguments.repeats}
                command = [sys.executable, __file__, "--case", json.dumps(case)]
                answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if answer.returncode:
                    sys.exit(f"bench_head: {name} at {vocab} failed:\n{answer.stderr}")
                row = json.loads(answer.stdout.splitlines()[-1])
                rows.append(row)
                print(
                    f"{name:<16}{vocab:>8}{dtype:>10}{row['peak_ratio']:>12.3f}{row['time_ratio']:>12.2f}"
                    f"{row['peak_mib']:>10}{row['seconds']:>9.2f}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
