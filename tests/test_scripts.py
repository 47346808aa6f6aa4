"""The scripts that a newcomer runs first: they parse, and they refuse in one sentence without leaving anything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci/run"]


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "scripts/setup.sh")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_can_be_run(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LOGITCASK_DEVICE": "tpu"}, "LOGITCASK_DEVICE is 'tpu', expected cpu or gpu"),
        ({"LOGITCASK_PYTHON": "false"}, "LOGITCASK_PYTHON=false is not a Python 3.11 or 3.12"),
    ],
)
def test_setup_refuses_in_one_sentence(tmp_path: Path, environment: dict[str, str], expected: str):
    done = setup(LOGITCASK_VENV=str(tmp_path / "venv"), **environment)
    assert done.returncode == 1
    assert done.stderr == f"setup: {expected}\n"
    assert not (tmp_path / "venv").exists()


def test_setup_leaves_a_directory_alone_that_is_no_environment(tmp_path: Path):
    (tmp_path / "precious").write_text("mine")
    done = setup(LOGITCASK_VENV=str(tmp_path), LOGITCASK_DEVICE="cpu")
    assert done.returncode == 1
    assert f"{tmp_path} exists and is not a virtual environment" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
