"""How near each tail comes to the full vocabulary: gradients to the student's logits on real rows.

The teacher is a checkpoint; its students are made on the spot: "healthy" lacks four layers in the middle, "noisy" has
noise on its weights, "broken" lacks the top third of its layers. None is trained, so that all are further from the
teacher than a student in training.

cosine, norm_ratio: of the gradient over all rows, against the gradient with all of the teacher's probabilities.
loss_ratio: of the loss. For "adakd_ranking" the three are Spearman's correlation of the rows' difficulty, the ratio of
its spread, and the ratio of its mean.

    python scripts/measure_tail.py CHECKPOINT --json tails.json
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distiller import divergences
from distiller.adakd import hellinger
from distiller.objectives import COMMON
from distiller.outcomes import Tail
from distiller.rows import StudentReduction, TeacherRows
from distiller.taid import interpolate
from distiller.tail import DroppedTail, RenormalisedTail, StudentTail, UniformTail

MODULES = [
    "statistics",
    "fractions",
    "argparse",
    "heapq",
    "textwrap",
    "difflib",
    "doctest",
    "csv",
    "pathlib",
    "calendar",
    "pickletools",
    "random",
]
"""The text: docstrings of Python's standard library."""

TAILS: dict[str, Callable[[], Tail]] = {
    "student": lambda: StudentTail(kappa=False, cap=0),
    "student+kappa": lambda: StudentTail(cap=0),
    "student+cap": lambda: StudentTail(kappa=False),
    "student+kappa+cap": StudentTail,
    "uniform": UniformTail,
    "renormalised": RenormalisedTail,
    "dropped": DroppedTail,
}
DEFAULT = "student+kappa+cap"
assert COMMON["tail"] == "student"
assert COMMON["tail_kappa"]
assert COMMON["tail_cap"]

PASSAGE = 257
STRIDE = 16


def taid(log_p: Tensor, log_q: Tensor, t: float) -> Tensor:
    target = interpolate(log_p, log_q, t)
    return (target.exp() * (target - log_q)).sum(1)


Loss = Callable[[Tensor, Tensor], Tensor]
OBJECTIVES: list[tuple[str, float | None, Loss]] = [
    *(("taid", t, lambda p, q, t=t: taid(p, q, t)) for t in (0.2, 0.5, 0.8, 1.0)),  # type: ignore[misc]
    ("reverse_kl", None, divergences.reverse_kl),
    ("jsd", None, divergences.jsd),
    ("tvd", None, divergences.tvd),
]


def passages() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for module in MODULES:
        nodes = ast.walk(ast.parse((library / f"{module}.py").read_text()))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        yield "\n\n".join(text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node)))


def students(teacher: Any, noise: float) -> Iterator[tuple[str, Any]]:
    count = teacher.config.num_hidden_layers
    middle = range(count // 2 - 2, count // 2 + 2)
    for name, cut in (("healthy", middle), ("broken", range(count - count // 3, count))):
        model = copy.deepcopy(teacher)
        model.model.layers = torch.nn.ModuleList([x for i, x in enumerate(teacher.model.layers) if i not in cut])
        yield name, model
    model = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights += noise * weights.std() * torch.randn(weights.shape, generator=generator)
    yield "noisy", model


@torch.no_grad()
def logits(model: Any, texts: list[Tensor]) -> Tensor:
    """[rows, V] every STRIDE-th position's logits."""
    parts = [model(ids[None], use_cache=False).logits[0, STRIDE // 2 : -1 : STRIDE] for ids in texts]
    return torch.cat(parts).float()


def store(log_p: Tensor, labels: Tensor, top_k: int) -> TeacherRows:
    values, ids = log_p.topk(top_k)
    mass = log_p.exp().scatter(1, ids, 0.0).sum(1, dtype=torch.float64)
    return TeacherRows(ids, values, mass.log().float(), labels, log_p.gather(1, labels[:, None])[:, 0])


def reduce(z: Tensor, teacher: TeacherRows, tail: Tail) -> StudentReduction:
    return StudentReduction(
        z.clone(), teacher.top_ids, teacher.label_ids, candidates=tail.candidates, differentiable=True
    )


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def compare(z: Tensor, log_p: Tensor, labels: Tensor, top_ks: list[int]) -> Iterator[dict[str, Any]]:
    """One student against every tail."""
    stored = {top_k: store(log_p, labels, top_k) for top_k in top_ks}
    for objective, t, measure in OBJECTIVES:
        whole = z.clone().requires_grad_()
        exact = measure(log_p, whole.log_softmax(1)).sum()
        (expected,) = torch.autograd.grad(exact, whole)
        for top_k, teacher in stored.items():
            for name, make in TAILS.items():
                tail = make()
                student = reduce(z, teacher, tail)
                outcomes = tail.outcomes(student, teacher)
                loss = measure(outcomes.log_p, outcomes.log_q).sum()
                found = student.logit_gradient(loss)
                yield {
                    "objective": objective,
                    "tail": name,
                    "k": top_k,
                    "t": t,
                    "cosine": functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0).item(),
                    "norm_ratio": (found.norm() / expected.norm()).item(),
                    "loss_ratio": (loss / exact).item(),
                }
    exact = hellinger(log_p, z.log_softmax(1))
    for top_k, teacher in stored.items():
        for name, make in TAILS.items():
            if name in ("dropped", "renormalised"):
                continue  # not a distance between distributions of the same support
            tail = make()
            outcomes = tail.outcomes(reduce(z, teacher, tail), teacher)
            found = hellinger(outcomes.log_p, outcomes.log_q).detach()
            spearman = torch.corrcoef(torch.stack([ranks(found), ranks(exact)]))[0, 1]
            yield {
                "objective": "adakd_ranking",
                "tail": name,
                "k": top_k,
                "t": None,
                "cosine": spearman.item(),
                "norm_ratio": (found.std() / exact.std()).item(),
                "loss_ratio": (found.mean() / exact.mean()).item(),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a Llama-like checkpoint's directory")
    parser.add_argument("--top-k", nargs="+", type=int, default=[8, 16, 32, 64, 128])
    parser.add_argument("--noise", type=float, default=0.15, help="of each matrix's standard deviation")
    parser.add_argument("--json", type=Path, help="write every row there")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.float32).eval()
    texts = [torch.tensor(tokenizer(text[:2000]).input_ids[:PASSAGE]) for text in passages()]
    labels = torch.cat([ids[1:][STRIDE // 2 :: STRIDE] for ids in texts])
    log_p = logits(teacher, texts).log_softmax(1)
    labels = labels[: len(log_p)]
    print(f"{len(log_p)} rows, V = {log_p.shape[1]}, teacher entropy {-(log_p.exp() * log_p).sum(1).mean():.2f} nats")
    rows = []
    for name, student in students(teacher, arguments.noise):
        z = logits(student, texts)
        print(f"\n{name}: KL to the teacher {divergences.forward_kl(log_p, z.log_softmax(1)).mean():.2f} nats a row")
        print(f"{'cosine / norm / loss':<24}" + "".join(f"{tail:>20}" for tail in TAILS))
        found = [{"student": name, **row} for row in compare(z, log_p, labels, arguments.top_k)]
        rows += found
        for objective, t, top_k in dict.fromkeys((row["objective"], row["t"], row["k"]) for row in found):
            line = {r["tail"]: r for r in found if (r["objective"], r["t"], r["k"]) == (objective, t, top_k)}
            cells = [
                f"{r['cosine']:.3f} {r['norm_ratio']:.2f} {r['loss_ratio']:.2f}" if (r := line.get(tail)) else "-"
                for tail in TAILS
            ]
            label = f"{objective}{'' if t is None else f' t={t:g}'} k={top_k}"
            print(f"{label:<24}" + "".join(f"{cell:>20}" for cell in cells))
    if arguments.json:
        arguments.json.write_text(json.dumps({"default_tail": DEFAULT, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
