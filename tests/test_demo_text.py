"""The demo's text: what it promises of its documents, and that it is the same text every time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.demo import make_text

SCRIPT = Path(make_text.__file__)

MODULE = b'''"""The module's own docstring, which is longer than eighty characters, for shorter ones say nothing new."""
class Public:
    """A public class's docstring, which is longer than eighty characters, and has a second line

    that is indented in the source.
    """
    def short(self):
        """Too short."""
    def method(self):
        """A method's docstring, which is longer than eighty characters, for shorter ones say nothing at all."""
    def _private(self):
        """A private method's docstring, which is longer than eighty characters and is left out all the same."""
class _Private:
    """A private class's docstring, which is longer than eighty characters and is left out all the same."""
    def method(self):
        """A method of a private class, longer than eighty characters, left out together with its class..."""
'''


def test_docstrings_are_the_public_ones_in_source_order_and_cleaned():
    texts = list(make_text.docstrings(MODULE))
    assert [text.split("'")[0] for text in texts] == ["The module", "A public class", "A method"]
    assert texts[1].endswith("\n\nthat is indented in the source.")


def test_a_docstring_occurs_once_and_documents_end_at_a_border(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "json").mkdir()
    (tmp_path / "json/__init__.py").write_bytes(MODULE)
    (tmp_path / "queue.py").write_bytes(MODULE + b'def f():\n    """' + b"Only this module says so. " * 4 + b'"""\n')
    (tmp_path / "_json.py").write_bytes(MODULE)
    (tmp_path / "not_the_library.py").write_bytes(MODULE)
    found = dict(make_text.documents(tmp_path, len))
    assert list(found) == ["json", "queue"]
    assert found["json"] == "\n\n".join(make_text.docstrings(MODULE))
    assert found["queue"] == "Only this module says so. " * 4
    monkeypatch.setattr(make_text, "DOCUMENT_TOKENS", 150)
    assert dict(make_text.documents(tmp_path, len))["json"] == next(make_text.docstrings(MODULE))


def test_split_is_by_name_alone_and_keeps_to_its_room():
    items = [(f"module{i}", "x" * (50 + i)) for i in range(1200)]
    sides = make_text.split(items, len)
    assert sides == make_text.split(items[::-1], len)
    names = {side: {name for name, _, _ in rows} for side, rows in sides.items()}
    assert not names["train"] & names["held_out"]
    for side, room in (("train", make_text.TRAIN_TOKENS), ("held_out", make_text.HELD_OUT_TOKENS)):
        total = sum(size for _, _, size in sides[side])
        assert room - 50 <= total <= room  # the smallest document has 50 tokens, and there are more than fit
    changed = [(name, "y" * len(text)) for name, text in items]
    assert names["train"] == {name for name, _, _ in make_text.split(changed, len)["train"]}


def test_command_writes_the_same_bytes_again(tiny_model_dir: Path, tmp_path: Path):
    def run(output: Path) -> dict[str, bytes]:
        command = [sys.executable, str(SCRIPT), "--output", str(output), "--tokenizer", str(tiny_model_dir)]
        subprocess.run(command, check=True, capture_output=True)
        return {path.name: path.read_bytes() for path in output.iterdir()}

    first = run(tmp_path / "a")
    assert sorted(first) == ["held_out.jsonl", "train.jsonl"]
    assert run(tmp_path / "b") == first
    rows = {name: [json.loads(line) for line in content.splitlines()] for name, content in first.items()}
    assert all(set(row) == {"id", "text"} for side in rows.values() for row in side)
    ids = [row["id"] for side in rows.values() for row in side]
    assert len(ids) == len(set(ids))


def test_command_names_what_is_missing(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "out"), "--tokenizer", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "tokenizer.json" in done.stderr
    assert "make_teacher.py" in done.stderr
