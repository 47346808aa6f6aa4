"""English to train on and to hold out, without a download: what Python's standard library says about itself.

A document is one module: its own docstring and those of its public classes and functions, in the order of the source,
which is parsed and never imported. A docstring that an earlier document has is left out. A hash of the module's name
decides the document's side and its place in line, so that the text depends on nothing but the Python version and the
tokenizer that counts it.

Writes train.jsonl and held_out.jsonl, with the columns id and text.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

TRAIN_TOKENS = 40_000
HELD_OUT_TOKENS = 8_000
DOCUMENT_TOKENS = 2_000
"""Where a document ends, at a docstring's border: a dozen large modules would fill the corpus otherwise."""
SHORTEST = 80
"""Characters; below it are one-liners that say what the name says."""
ONE_IN = 6
"""Modules held out."""

NOT_PUBLIC = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "ensurepip"}
ALIKE = {"encodings", "distutils"}
"""Packages whose modules repeat one another's docstrings but for a name: a held-out module would be no news."""


def public_modules(library: Path) -> Iterator[tuple[str, Path]]:
    """Name and source of each public module of the standard library, by name."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not parts or parts[0] not in sys.stdlib_module_names:
            continue
        if not any(part.startswith("_") or part in NOT_PUBLIC | ALIKE for part in parts):
            yield ".".join(parts), path


def docstrings(source: bytes) -> Iterator[str]:
    """The module's docstring and those of its public classes and functions, in source order."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not isinstance(node, ast.Module) and node.name.startswith("_"):
                return
            text = ast.get_docstring(node, clean=True)  # cleaned as inspect.cleandoc does
            if text and len(text) >= SHORTEST:
                yield text
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return walk(ast.parse(source))


def documents(library: Path, count: Callable[[str], int]) -> Iterator[tuple[str, str]]:
    """(module, text) of at most about `DOCUMENT_TOKENS`, by name; no docstring occurs twice."""
    seen: set[str] = set()
    for name, path in public_modules(library):
        kept: list[str] = []
        total = 0
        for text in docstrings(path.read_bytes()):
            if text not in seen:
                seen.add(text)
                total += count(text)
                if kept and total > DOCUMENT_TOKENS:
                    break
                kept.append(text)
        if kept:
            yield name, "\n\n".join(kept)


def split(items: list[tuple[str, str]], count: Callable[[str], int]) -> dict[str, list[tuple[str, str, int]]]:
    """The documents of each side, in the order of their hashes, as many as fit into its tokens."""
    sides: dict[str, list[tuple[str, str, int]]] = {"train": [], "held_out": []}
    room = {"train": TRAIN_TOKENS, "held_out": HELD_OUT_TOKENS}
    hashed = sorted((int(hashlib.sha256(name.encode()).hexdigest(), 16), name, text) for name, text in items)
    for number, name, text in hashed:
        side = "held_out" if number % ONE_IN == 0 else "train"
        size = count(text)
        if size <= room[side]:
            room[side] -= size
            sides[side].append((name, text, size))
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for train.jsonl and held_out.jsonl")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of the tokenizer that counts")
    arguments = parser.parse_args()
    if not (arguments.tokenizer / "tokenizer.json").is_file():
        sys.exit(f"make_text: expected a tokenizer.json in {arguments.tokenizer}: run make_teacher.py first")

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    library = Path(sysconfig.get_path("stdlib"))
    sides = split(list(documents(library, count)), count)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for side, rows in sides.items():
        path = arguments.output / f"{side}.jsonl"
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            for name, text, _ in rows:
                file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
        os.replace(partial, path)
        tokens = sum(size for _, _, size in rows)
        source = f"Python {platform.python_version()}'s library"
        print(f"make_text: {path}: {len(rows)} documents, {tokens:,} tokens of {source}")


if __name__ == "__main__":
    main()
