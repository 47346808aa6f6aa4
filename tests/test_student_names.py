"""Students by hub name: the hub is asked, and its answer is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import distiller.student as student
from storage_schemas.errors import RequestError


def test_a_relative_name_that_is_no_directory_is_a_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def from_pretrained(name: str, **options: Any) -> str:
        asked.append(name)
        return "loaded"

    for kind in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(student, kind), "from_pretrained", from_pretrained)
    assert student.load_config("org/student") == student.load_tokenizer("org/student") == "loaded"
    assert student.load_student("org/student") == "loaded"
    assert asked == ["org/student"] * 3


@pytest.mark.parametrize("load", [student.load_config, student.load_tokenizer, student.load_student])
def test_what_is_nowhere_is_one_sentence(tmp_path: Path, load: Any) -> None:
    with pytest.raises(RequestError, match="expected a hub name or a directory with a model"):
        load(str(tmp_path / "none"))
    with pytest.raises(RequestError, match=r"expected config.json in"):
        load(str(tmp_path))
    with pytest.raises(RequestError, match="no-such/student"):  # the hub is out of reach in tests
        load("no-such/student")
