"""One or more training runs on one self-contained HTML page, for people who would rather look than read."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from storage_schemas.errors import RequestError
from storage_schemas.manifest import flatten

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 280, 56, 34, 12, 12

CURVES = (
    ("loss", "training loss (nats per target)"),
    ("eval_kl", "held-out KL to the teacher (nats per target)"),
    ("t", "t: how far the target has moved from the student to the teacher"),
    ("eval_perplexity", "held-out perplexity"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
)
"""What is drawn, where a run has it."""

SUMMARY = ("objective", "steps", "start_kl", "held_out_kl", "held_out_perplexity", "held_out_teacher_perplexity",
           "held_out_top1_agreement", "seconds")  # fmt: skip

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #1e293b }
h2 { margin-top: 2.2rem } figure { display: inline-block; margin: 0 1rem 1.2rem 0 } figcaption { font-size: 14px }
table { border-collapse: collapse; font-size: 14px } td, th { padding: .25rem .7rem; border-bottom: 1px solid #e2e8f0;
text-align: left; vertical-align: top } td.n { text-align: right; font-variant-numeric: tabular-nums }
code { white-space: pre-wrap; word-break: break-word } mark { background: #fde68a }
svg text { font-size: 11px; fill: #475569 }
"""


@dataclass(frozen=True)
class Run:
    """What a training run left in its output directory."""

    name: str
    history: list[dict[str, Any]]
    settings: dict[str, Any]
    summary: dict[str, Any]
    worst: list[dict[str, Any]]


def write_report(directories: Sequence[str], output: str) -> None:
    """Curves, settings that differ and the worst held-out targets of the runs: one HTML file that needs no other."""
    runs = [load_run(Path(directory)) for directory in directories]
    Path(output).write_text(render(runs), encoding="utf-8")


def load_run(directory: Path) -> Run:
    """RequestError where the directory is no run's; a run still under way has no summary yet."""
    history = directory / "history.jsonl"
    if not history.is_file():
        raise RequestError(f"expected the output directory of `distiller train`, found no history.jsonl in {directory}")
    lines = history.read_text(encoding="utf-8").splitlines()
    return Run(
        name=str(directory),
        history=[json.loads(line) for line in lines],
        settings=tomllib.loads((directory / "train.toml").read_text(encoding="utf-8")),
        summary=_optional_json(directory / "summary.json", {}),
        worst=_optional_json(directory / "worst_targets.json", []),
    )


def render(runs: Sequence[Run]) -> str:
    """The page."""
    names = short_names([run.name for run in runs])
    parts = ["<h1>Training runs</h1>", _summary(runs, names), "<h2>Curves</h2>"]
    for key, caption in CURVES:
        series = {
            name: [(float(entry["step"]), float(entry[key])) for entry in run.history if _is_number(entry.get(key))]
            for name, run in zip(names, runs, strict=True)
        }
        if any(series.values()):
            parts.append(f"<figure>{curve(series)}<figcaption>{escape(caption)}</figcaption></figure>")
    parts += ["<h2>Settings</h2>", _settings(runs, names), "<h2>Worst held-out targets</h2>"]
    parts += [_worst(run, name) for run, name in zip(runs, names, strict=True)]
    head = f'<meta charset="utf-8"><title>Training runs</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def short_names(paths: Sequence[str]) -> list[str]:
    """Paths without the directories that all of them share."""
    split = [Path(path).parts for path in paths]
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    return ["/".join(parts[shared:]) for parts in split]


def curve(series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines over steps as SVG; the y axis starts where the values do."""
    points = [point for values in series.values() for point in values]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    x_high, y_high = max(x_high, x_low + 1), y_high if y_high > y_low else y_low + max(abs(y_low), 1e-12) * 0.1

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - BOTTOM - TOP)

    parts = [f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">']
    for i in range(5):
        y = y_low + (y_high - y_low) * i / 4
        x = x_low + (x_high - x_low) * i / 4
        _, down = place(x_low, y)
        across, _ = place(x, y_low)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{y:.3g}</text>')
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{x:.4g}</text>')
    for i, (name, values) in enumerate(series.items()):
        if values:
            placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in values))
            colour = COLOURS[i % len(COLOURS)]
            parts.append(
                f'<polyline points="{placed}" fill="none" stroke="{colour}" stroke-width="1.6">'
                f"<title>{escape(name)}</title></polyline>"
            )
            if len(values) <= 30:
                dots = (place(*point) for point in values)
                parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colour}"/>' for x, y in dots]
    return "".join([*parts, "</svg>"])


def _summary(runs: Sequence[Run], names: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(key.replace('_', ' '))}</th>" for key in SUMMARY)
    rows = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        cells = "".join(f'<td class="n">{escape(_text(run.summary.get(key)))}</td>' for key in SUMMARY)
        swatch = f'<span style="color:{COLOURS[i % len(COLOURS)]}">&#9632;</span>'
        state = "" if run.summary else " (not finished)"
        rows.append(f"<tr><td>{swatch} {escape(name)}{state}</td>{cells}</tr>")
    return f"<table><tr><th>run</th>{head}</tr>{''.join(rows)}</table>"


def _settings(runs: Sequence[Run], names: Sequence[str]) -> str:
    tables = [dict(flatten(run.settings)) for run in runs]
    keys = sorted({key for table in tables for key in table})
    if len(runs) > 1:
        keys = [key for key in keys if key != "output" and len({str(table.get(key)) for table in tables}) > 1]
        if not keys:
            return "<p>The runs have the same settings.</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = [
        f"<tr><td>{escape(key)}</td>{''.join(f'<td>{escape(_text(table.get(key)))}</td>' for table in tables)}</tr>"
        for key in keys
    ]
    title = "<p>Those that differ:</p>" if len(runs) > 1 else ""
    return f"{title}<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _worst(run: Run, name: str) -> str:
    if not run.worst:
        return f"<h3>{escape(name)}</h3><p>None recorded: the run was not evaluated on held-out sequences.</p>"
    rows = []
    for target in run.worst:
        choices = "<br>".join(
            f"<code>{escape(json.dumps(text, ensure_ascii=False))}</code> {_share(teacher)} / {_share(student)}"
            for text, teacher, student in zip(
                target["top"], target["teacher_logprobs"], target["student_logprobs"], strict=True
            )
        )
        text = f"<code>{escape(target['context'])}<mark>{escape(target['label'])}</mark></code>"
        where = f"{escape(target['sequence_id'])}, token {target['position'] + 1}"
        rows.append(f'<tr><td class="n">{target["kl"]:.2f}</td><td>{text}</td><td>{choices}</td><td>{where}</td></tr>')
    head = "<tr><th>KL</th><th>text, and what followed</th><th>teacher / student</th><th>where</th></tr>"
    return f"<h3>{escape(name)}</h3><table>{head}{''.join(rows)}</table>"


def _share(logprob: float) -> str:
    return f"{math.exp(logprob):.2%}"


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")


def _optional_json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default
