"""Every kind of source that `datasets` opens, and what is said of one that it does not."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from cache_builder.corpus_settings import CorpusSettings
from cache_builder.source import open_dataset, source_digest
from storage_schemas.errors import RequestError

ROWS = [{"text": "one line", "id": "a"}, {"text": "another", "id": "b"}, {"text": "a third", "id": "c"}]
TEXTS = [row["text"] for row in ROWS]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of datasets of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    return tmp_path / "datasets-cache"


def make_settings(dataset: object, **fields: Any) -> CorpusSettings:
    return CorpusSettings(dataset=str(dataset), **{"max_length": 8, **fields})


def read(dataset: object, **fields: Any) -> datasets.Dataset:
    settings = make_settings(dataset, **fields)
    return open_dataset(settings, source_digest(settings))


def write_lines(path: Path, rows: Sequence[Any] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_as(kind: str, folder: Path) -> Path:
    """ROWS as one file of a kind."""
    path = folder / f"rows.{kind}"
    table = datasets.Dataset.from_list(ROWS)
    if kind == "jsonl":
        write_lines(path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(write_lines(folder / "plain").read_bytes()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "csv":
        table.to_csv(path)
    elif kind == "arrow":
        table.save_to_disk(folder / "saved")
        (folder / "saved" / "data-00000-of-00001.arrow").rename(path)
    else:
        path.write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv", "arrow", "txt"])
def test_a_local_file_of_each_kind(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_as(kind, tmp_path)
    capfd.readouterr()  # what writing it printed
    rows = read(path)
    assert rows["text"][:] == TEXTS
    assert rows.cache_files, "expected a memory-mapped table"
    assert (
        source_digest(make_settings(path))
        == "sha256:" + hashlib.sha256(hashlib.sha256(path.read_bytes()).digest()).hexdigest()
    )
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "examples/s" not in printed.err


def test_progress_bars_of_the_caller_come_back(tmp_path: Path) -> None:
    before = datasets.are_progress_bars_disabled()
    try:
        for disabled in (False, True):
            (datasets.disable_progress_bars if disabled else datasets.enable_progress_bars)()
            read(write_lines(tmp_path / f"{disabled}.jsonl"))
            assert datasets.are_progress_bars_disabled() == disabled
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


def test_a_glob_reads_its_files_in_order_of_their_names(tmp_path: Path) -> None:
    for name, row in zip(("2", "0", "1"), ROWS, strict=True):
        write_lines(tmp_path / f"part-{name}.jsonl", [row])
    expected = [TEXTS[1], TEXTS[2], TEXTS[0]]
    assert read(tmp_path / "part-*.jsonl")["text"][:] == expected
    assert read("json", data_files=str(tmp_path / "part-*.jsonl"))["text"][:] == expected
    files = tuple(str(tmp_path / f"part-{number}.jsonl") for number in (2, 1))
    assert read("json", data_files=files)["text"][:] == [TEXTS[0], TEXTS[2]]


def test_a_directory_has_the_splits_that_its_files_name(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    write_lines(folder / "train.jsonl", ROWS[:2])
    write_lines(folder / "test.jsonl", ROWS[2:])
    assert read(folder)["text"][:] == TEXTS[:2]
    assert read(folder, split="test")["text"][:] == TEXTS[2:]
    assert read(folder, split="train[1:]")["text"][:] == TEXTS[1:2]
    assert read(folder, data_files="test.jsonl")["text"][:] == TEXTS[2:]
    with pytest.raises(
        RequestError, match=r"no split 'dev', it has .*'test'.*'train'|no split 'dev', it has .*'train'.*'test'"
    ):
        read(folder, split="dev")


def test_saved_datasets_with_and_without_splits(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "dev": whole.select([2])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one")["text"][:] == TEXTS
    assert read(tmp_path / "two", split="dev")["text"][:] == TEXTS[2:]
    with pytest.raises(RequestError, match=r"no split 'test', it has \['dev', 'train'\]"):
        read(tmp_path / "two", split="test")
    with pytest.raises(RequestError, match="saved without splits and has no 'dev'"):
        read(tmp_path / "one", split="dev")


def test_what_datasets_leaves_beside_a_saved_one_does_not_change_its_digest(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    before = source_digest(make_settings(tmp_path / "saved"))
    (tmp_path / "saved" / "cache-0123.arrow").write_text("a map's result")
    (tmp_path / "saved" / ".hidden").write_text("an editor's")
    assert source_digest(make_settings(tmp_path / "saved")) == before
    (tmp_path / "saved" / "data.arrow").write_text("more rows")
    assert source_digest(make_settings(tmp_path / "saved")) != before


@pytest.mark.parametrize("by", ["line", "paragraph", "document"])
def test_what_is_a_document_of_a_text_file(by: str, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\ntwo\n\nthree")
    expected = {"line": ["one", "two", "", "three"], "paragraph": ["one\ntwo", "three"], "document": [path.read_text()]}
    assert read(path, sample_by=by)["text"][:] == expected[by]
    with pytest.raises(RequestError, match="sample_by is for text files"):
        read(write_lines(tmp_path / "rows.jsonl"), sample_by=by)


def test_max_documents_takes_the_first(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl")
    assert read(path, max_documents=2)["text"][:] == TEXTS[:2]
    assert read(path, max_documents=9)["text"][:] == TEXTS


def test_an_edited_file_is_never_read_from_the_cache_of_what_it_was(tmp_path: Path, datasets_cache: Path) -> None:
    """Same name, size and time of modification, by which datasets would take it for the same."""
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "before"}])
    stat = path.stat()
    digest = source_digest(make_settings(path))
    assert read(path)["text"][:] == ["before"]
    write_lines(path, [{"text": "behind"}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert source_digest(make_settings(path)) != digest
    assert read(path)["text"][:] == ["behind"]
    assert datasets_cache.is_dir()


def test_a_moved_file_keeps_its_digest(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "rows.jsonl")
    digest = source_digest(make_settings(first))
    assert source_digest(make_settings(first.rename(tmp_path / "other.jsonl"))) == digest


def test_files_that_run_into_one_another_have_another_digest(tmp_path: Path) -> None:
    for folder, cut in (("a", 1), ("b", 2)):
        write_lines(tmp_path / folder / "0.jsonl", ROWS[:cut])
        write_lines(tmp_path / folder / "1.jsonl", ROWS[cut:])
    digests = {source_digest(make_settings(tmp_path / folder / "*.jsonl")) for folder in "ab"}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("none.jsonl", {}, "there is no file"),
        ("none-*.jsonl", {}, "no file matches"),
        ("json", {"data_files": "none-*.jsonl"}, "no file matches"),
        ("rows.jsonl", {"split": "test"}, r"no split 'test', it has \['train'\]"),
        ("rows.jsonl", {"data_files": "x"}, "data_files goes with a directory or a hub name"),
        ("rows.jsonl", {"subset": "en"}, "subset and revision are for hub datasets"),
        ("rows.jsonl", {"revision": "main"}, "subset and revision are for hub datasets"),
        ("folder", {"revision": "main"}, "revision is for hub datasets"),
        ("folder", {"subset": "en"}, "cannot load the dataset"),
        ("rows.*", {}, "stands for files of the kinds"),
        ("./notes.doc", {}, "expected one kind of"),
        ("empty.jsonl", {}, "has no documents in split 'train'"),
        ("empty.txt", {}, "has no documents in split 'train'"),
        ("broken.jsonl", {}, "cannot read the rows of .*mend the file"),
        ("no-one/nothing", {}, "cannot load the dataset 'no-one/nothing'.*a local path or a hub name"),
        ("not a name", {}, "cannot load the dataset 'not a name'"),
    ],
)
def test_what_is_asked_wrongly_is_said_in_a_sentence(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "rows.jsonl")
    write_lines(tmp_path / "folder" / "train.jsonl")
    (tmp_path / "rows.txt").write_text("a line")
    (tmp_path / "notes.doc").write_text("a line")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(RequestError, match=message) as caught:
        read(name, **fields)
    assert "\n" not in str(caught.value)


def test_a_hub_dataset_is_loaded_at_the_commit_that_was_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def dataset_info(self: object, repo_id: str, *, revision: str | None = None, **_: Any) -> Any:
        asked.append({"repo_id": repo_id, "revision": revision})
        return type("Info", (), {"sha": COMMIT})()

    def load_dataset(path: str, name: str | None = None, **options: Any) -> datasets.Dataset:
        asked.append({"path": path, "name": name} | options)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("org/name", subset="en", revision="v1", split="train[:9]", data_files=("a*.parquet",))
    assert rows["text"][:] == TEXTS
    assert asked == [
        {"repo_id": "org/name", "revision": "v1"},
        {
            "path": "org/name",
            "name": "en",
            "split": "train[:9]",
            "revision": COMMIT,
            "data_files": ["a*.parquet"],
            "keep_in_memory": False,
        },
    ]
    asked.clear()
    assert source_digest(make_settings("org/name", revision=COMMIT)) == f"commit:{COMMIT}"
    assert asked == [], "a commit needs no asking"


def test_without_the_hub_the_commit_comes_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", out_of_reach)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert source_digest(make_settings("org/name")) is None
    references = tmp_path / "datasets--org--name" / "refs"
    references.mkdir(parents=True)
    (references / "main").write_text(COMMIT)
    assert source_digest(make_settings("org/name")) == f"commit:{COMMIT}"
    assert source_digest(make_settings("org/name", revision="v2")) is None
