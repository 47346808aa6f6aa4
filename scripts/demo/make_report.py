"""The demo's figures as a table on stdout and as report.json, from what each step left in the demo's directory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STUDENTS = {"initial": "initial student", "cross_entropy": "trained on the tokens", "taid": "trained with TAID"}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def gather(demo: Path) -> dict[str, Any]:
    """KL in nats per token to the teacher, perplexities, agreement as a share, times in seconds."""
    build, cache = read(demo / "caches/train.json"), read(demo / "caches/train.inspect.json")
    slice_ = read(demo / "students/initial.slice.json")
    evaluations = {name: read(demo / f"students/{name}.json") for name in STUDENTS}
    provenance, identity = cache["provenance"], cache["identity"]
    held_out: dict[str, dict[str, float]] = {
        name: {"kl": found["kl"], "perplexity": found["perplexity"], "agreement": found["top1_agreement"]}
        for name, found in evaluations.items()
    }
    held_out["teacher"] = {"perplexity": evaluations["initial"]["teacher_perplexity"]}
    return {
        "teacher": {
            "model": "SmolLM2-135M-Instruct",
            "dtype": identity["teacher"]["dtype"],
            "weights_digest": identity["teacher"]["weights_digest"],
            "parameters": slice_["model_parameters"],
        },
        "student": {"parameters": slice_["parameters"], "layers": slice_["layers"]},
        "cache": {
            "tokens": cache["tokens"],
            "bytes_per_token": cache["bytes_per_token"],
            "top_k": cache["top_k"],
            "mean_tail_mass": cache["mean_tail_mass"],
            "engine": f"{provenance['engine']} {provenance[provenance['engine']]}",
            "build_seconds": build["seconds"],
        },
        "held_out": held_out,
        "held_out_targets": int(evaluations["initial"]["targets"]),
        "train_seconds": {
            name: read(demo / f"students/{name}/summary.json")["seconds"] for name in STUDENTS if name != "initial"
        },
    }


def render(report: dict[str, Any]) -> str:
    cache, held_out = report["cache"], report["held_out"]
    lines = [
        f"teacher   {report['teacher']['model']}, {report['teacher']['parameters'] / 1e6:.1f} M parameters; "
        f"students {report['student']['parameters'] / 1e6:.1f} M, {len(report['student']['layers'])} of its layers",
        f"cache     {cache['tokens']:,} tokens, top {cache['top_k']}, {cache['bytes_per_token']:.1f} bytes/token, "
        f"mean tail mass {cache['mean_tail_mass']:.3f}, {cache['engine']} in {cache['build_seconds']:.0f} s",
        "",
        f"{'held out, ' + format(report['held_out_targets'], ',') + ' tokens':<24}{'KL (nats)':>10}{'perplexity':>12}"
        f"{'agreement':>11}{'trained (s)':>13}",
    ]
    for name, label in STUDENTS.items():
        found, seconds = held_out[name], report["train_seconds"].get(name)
        trained = "" if seconds is None else f"{seconds:.0f}"
        lines.append(
            f"{label:<24}{found['kl']:>10.3f}{found['perplexity']:>12.1f}{found['agreement']:>11.1%}{trained:>13}"
        )
    lines.append(f"{'teacher':<24}{0:>10.3f}{held_out['teacher']['perplexity']:>12.1f}{1:>11.1%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the demo's directory")
    demo: Path = parser.parse_args().demo
    report = gather(demo)
    partial = demo / "report.json.partial"
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(demo / "report.json")
    print(render(report))


if __name__ == "__main__":
    main()
