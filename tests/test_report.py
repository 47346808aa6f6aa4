from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distiller.report import curve, short_names, write_report
from storage_schemas.errors import RequestError


class Page(HTMLParser):
    """Collects text and what a browser would fetch; fails where a tag is not closed."""

    VOID = ("meta", "br", "line", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.lines: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href")]
        self.lines += [str(value) for name, value in attrs if name == "points"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def make_run(
    path: Path, *, learning_rate: float, worst: list[dict[str, Any]] | None = None, finished: bool = True
) -> str:
    path.mkdir(parents=True)
    history = [
        {"step": step, "loss": 3.0 / step, "t": 0.4 + 0.1 * step, "grad_norm": float("nan")} for step in (1, 2, 3)
    ]
    history.append({"step": 3, "eval_kl": 1.25, "eval_perplexity": 7.5})
    (path / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    (path / "train.toml").write_text(
        f'output = "{path}"\n[training]\nlearning_rate = {learning_rate}\nmax_steps = 3\n[data]\ncache = "c"\n'
    )
    if finished:
        (path / "summary.json").write_text(json.dumps({"objective": "taid", "steps": 3, "held_out_kl": 1.25}))
        (path / "worst_targets.json").write_text(json.dumps(worst or []))
    return str(path)


TARGET = {
    "kl": 9.5,
    "sequence_id": "<doc>",
    "position": 4,
    "context": "a <script>alert(1)</script> & b",
    "label": "</code>",
    "top": ["x", "y"],
    "teacher_logprobs": [-0.1, -3.0],
    "student_logprobs": [-9.0, -1.0],
}


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def test_the_page_needs_nothing_else_and_shows_every_run(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "runs" / "one", learning_rate=0.25, worst=[TARGET]),
        make_run(tmp_path / "runs" / "two", learning_rate=0.125, finished=False),
    ]
    write_report(runs, str(tmp_path / "page.html"))
    page = read(tmp_path / "page.html")
    assert page.fetched == []
    for words in ("one", "two", "(not finished)", "0.25", "0.125", "learning_rate", "9.50", "90.48%"):
        assert words in page.text
    assert "max_steps" not in page.text, "only settings that differ are shown"
    assert "<script>alert(1)</script>" in page.text, "text from the cache is shown, not run"
    # two runs in each of loss, t, held-out KL and perplexity; no line for a gradient norm that is no number
    assert len(page.lines) == 8
    assert all("nan" not in line for line in page.lines)


def test_one_run_shows_all_its_settings(tmp_path: Path) -> None:
    write_report([make_run(tmp_path / "run", learning_rate=0.25)], str(tmp_path / "page.html"))
    assert "max_steps" in read(tmp_path / "page.html").text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"history\.jsonl"):
        write_report([str(tmp_path)], str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()


def test_names_lose_what_all_share() -> None:
    assert short_names(["/a/b/x", "/a/b/y"]) == ["x", "y"]
    assert short_names(["/a/b/x/run", "/a/c/x/run"]) == ["b/x/run", "c/x/run"]
    assert short_names(["runs/only"]) == ["only"]


@pytest.mark.parametrize("values", [[(1.0, 2.0)], [(0.0, 0.0), (5.0, 0.0)], [(1.0, -3.0), (2.0, 1e9)]])
def test_curves_of_few_or_equal_values_are_drawn_inside_their_frame(values: list[tuple[float, float]]) -> None:
    page = Page()
    page.feed(curve({"run": values}))
    (line,) = page.lines
    for point in line.split():
        x, y = map(float, point.split(","))
        assert 0 <= x <= 560
        assert 0 <= y <= 280
