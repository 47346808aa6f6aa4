"""The arrows of the house: cache_builder → storage_schemas ← distiller, and nothing heavy before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "vllm", "datasets"}
FORBIDDEN = {
    "storage_schemas": HEAVY | {"cache_builder", "distiller"},
    "distiller": {"vllm", "cache_builder"},
    "cache_builder": {"distiller"},
}


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield str(node.module).partition(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_go_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    for path in files:
        assert not FORBIDDEN[package] & set(imported_packages(path)), path.name


def test_only_the_engine_imports_vllm_in_the_parent():
    using = {path.name for path in (ROOT / "cache_builder").rglob("*.py") if "vllm" in set(imported_packages(path))}
    assert using <= {"vllm_engine.py", "vllm_capture.py"}


@pytest.mark.parametrize("program", ["cache_builder", "distiller"])
def test_help_imports_nothing_heavy(program):
    code = (
        "import sys\n"
        f"from {program}.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('loaded:', *sys.modules, file=sys.stderr)\n"
    )
    commands = {"cache_builder": ["build", "estimate", "inspect"], "distiller": ["train", "evaluate", "init-student"]}[
        program
    ]
    for arguments in (["--help"], *([command, "--help"] for command in commands)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert "Usage:" in done.stdout
        loaded = done.stderr.rpartition("loaded:")[2].split()
        assert len(loaded) > 50
        assert not HEAVY & set(loaded)


def test_no_file_has_outgrown_its_room():
    for package in FORBIDDEN:
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 350, f"{path.name}: split it by what it does"
