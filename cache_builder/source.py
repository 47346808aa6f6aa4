"""Where documents come from: anything `datasets` opens, as a memory-mapped table with random access."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_builder.corpus_settings import CorpusSettings
from storage_schemas.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class LocalSource:
    """Local files in the order their rows are read, and how to load them: `loader` names one of datasets' own, or is
    None for a `directory` that datasets interprets itself."""

    files: tuple[Path, ...]
    loader: str | None = None
    directory: Path | None = None

    @property
    def saved(self) -> bool:
        """Whether `save_to_disk` wrote the directory."""
        markers = ("state.json", "dataset_dict.json")
        return self.directory is not None and any((self.directory / name).is_file() for name in markers)


def source_digest(settings: CorpusSettings) -> str | None:
    """What the source holds, before any of it is tokenised.

    `sha256:…` of the contents of local files, in order of their names; `commit:…` of a hub dataset; None where the
    hub cannot be asked and its cache on this machine does not know.
    """
    local = find_local(settings)
    if local is None:
        commit = _resolve_commit(settings)
        return None if commit is None else f"commit:{commit}"
    return hash_files(local)


def hash_files(local: LocalSource) -> str:
    """`sha256:…` over the contents of the files; their names only order them, so a moved corpus keeps its digest."""
    total = hashlib.sha256()
    for path in local.files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{total.hexdigest()}"


def open_dataset(settings: CorpusSettings, digest: str | None) -> Dataset:
    """The rows, memory-mapped; `digest` is the source's own.

    Raises RequestError for an unknown dataset, file, subset or split, and for an empty one.
    """
    local = find_local(settings)
    with _quiet_datasets():
        dataset = _load_hub(settings, digest) if local is None else _load_local(settings, local, digest)
    if settings.max_documents is not None and len(dataset) > settings.max_documents:
        dataset = dataset.select(range(settings.max_documents))
    if len(dataset) == 0:
        raise _empty(settings)
    return dataset.with_format(None)


def find_local(settings: CorpusSettings) -> LocalSource | None:
    """The local files a dataset name stands for, or None when it is a hub name."""
    name = settings.dataset
    path = Path(name).expanduser()
    if name in set(LOADERS.values()) and settings.data_files is not None:
        patterns = [settings.data_files] if isinstance(settings.data_files, str) else settings.data_files
        return LocalSource(tuple(file for pattern in patterns for file in _expand(pattern)), loader=name)
    if path.is_dir():
        return LocalSource(tuple(_files_under(path)), directory=path)
    loader = _loader_of(path)
    if not (path.is_file() or glob.has_magic(name) or loader or path.is_absolute() or name.startswith(".")):
        return None
    if settings.data_files is not None:
        raise RequestError(
            f"data_files goes with a directory or a hub name, and {name!r} is files already; leave it out"
        )
    files = _expand(name)
    loaders = {_loader_of(file) for file in files}
    if len(loaders) > 1 or None in loaders:
        raise RequestError(
            f"{name!r} stands for files of the kinds {sorted({file.suffix for file in files})}; expected one kind of "
            f"{', '.join(LOADERS)}"
        )
    return LocalSource(files, loader=loaders.pop())


def _expand(pattern: str) -> tuple[Path, ...]:
    expanded = os.path.expanduser(pattern)
    if Path(expanded).is_file():
        return (Path(expanded),)
    files = sorted(Path(name) for name in glob.glob(expanded, recursive=True) if Path(name).is_file())
    if not files:
        what = "no file matches" if glob.has_magic(pattern) else "there is no file"
        raise RequestError(f"{what} {pattern!r} (seen from {os.getcwd()}); give a path or a glob of existing files")
    return tuple(files)


def _files_under(directory: Path) -> list[Path]:
    """Every file that may hold rows: not hidden ones, and not the `cache-*` files that datasets leaves beside them."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file()
        and not path.name.startswith("cache-")
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )


def _loader_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return LOADERS.get(suffixes[-1]) if suffixes else None


def _load_local(settings: CorpusSettings, local: LocalSource, digest: str | None) -> Dataset:
    import datasets

    assert digest is not None
    if local.directory is not None and local.saved:
        return _load_saved(settings, local.directory)
    options: dict[str, Any] = {"split": settings.split, "keep_in_memory": False}
    if settings.sample_by is not None:
        if local.loader not in (None, "text"):
            raise RequestError(f"sample_by is for text files, and {settings.dataset!r} is {local.loader}; leave it out")
        options["sample_by"] = settings.sample_by
    # datasets knows an edited file by its time of modification alone; a cache directory named by the contents
    # cannot hold the rows of what the file was before.
    options["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / digest.replace(":", "-")[:23])
    if local.directory is None:
        if settings.subset is not None or settings.revision is not None:
            raise RequestError(
                f"subset and revision are for hub datasets, and {settings.dataset!r} is files; leave them out"
            )
        assert local.loader is not None
        files = {"train": [str(file.resolve()) for file in local.files]}
        return _load(settings, local.loader, data_files=files, **options)
    if settings.revision is not None:
        raise RequestError(f"revision is for hub datasets, and {settings.dataset!r} is a directory; leave it out")
    return _load(settings, str(local.directory), settings.subset, data_files=_data_files(settings), **options)


def _load_saved(settings: CorpusSettings, directory: Path) -> Dataset:
    import datasets

    try:
        saved = datasets.load_from_disk(str(directory), keep_in_memory=False)
    except (FileNotFoundError, ValueError) as error:
        raise RequestError(f"cannot load the saved dataset {settings.dataset!r}: {_first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if settings.split not in saved:
            raise RequestError(
                f"the dataset {settings.dataset!r} has no split {settings.split!r}, it has {sorted(saved)}; set split"
            )
        return saved[settings.split]
    if settings.split not in ("train", str(saved.split)):
        raise RequestError(
            f"the dataset {settings.dataset!r} was saved without splits and has no {settings.split!r}; leave split out"
        )
    return saved


def _load_hub(settings: CorpusSettings, digest: str | None) -> Dataset:
    options: dict[str, Any] = {} if settings.sample_by is None else {"sample_by": settings.sample_by}
    revision = settings.revision if digest is None else digest.removeprefix("commit:")
    return _load(
        settings,
        settings.dataset,
        settings.subset,
        data_files=_data_files(settings),
        split=settings.split,
        revision=revision,
        keep_in_memory=False,
        **options,
    )


def _load(settings: CorpusSettings, *arguments: Any, **options: Any) -> Dataset:
    import datasets
    from datasets.arrow_writer import SchemaInferenceError
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        return datasets.load_dataset(*arguments, **options)
    except StopIteration as error:  # what datasets makes of JSON files without a row
        raise _empty(settings) from error
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, SchemaInferenceError):
            raise _empty(settings) from error
        if isinstance(cause, OSError):
            raise cause from error
        raise RequestError(
            f"cannot read the rows of {settings.dataset!r}: {_first_line(cause)}; mend the file, or convert it to "
            "JSON lines or Parquet"
        ) from error
    except (FileNotFoundError, ConnectionError, ValueError, DatasetsError) as error:
        known = re.search(r"Should be one of (\[.*\])", str(error))
        if known:
            raise RequestError(
                f"the dataset {settings.dataset!r} has no split {settings.split!r}, it has {known[1]}; set split"
            ) from error
        raise RequestError(
            f"cannot load the dataset {settings.dataset!r}: {_first_line(error)}; expected a local path or a hub name "
            "that exists, with its subset, split, revision and data_files"
        ) from error


def _empty(settings: CorpusSettings) -> RequestError:
    return RequestError(
        f"the dataset {settings.dataset!r} has no documents in split {settings.split!r}; give one that has some"
    )


def _data_files(settings: CorpusSettings) -> str | list[str] | None:
    return list(settings.data_files) if isinstance(settings.data_files, tuple) else settings.data_files


def _resolve_commit(settings: CorpusSettings) -> str | None:
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError

    if settings.revision is not None and COMMIT.fullmatch(settings.revision):
        return settings.revision
    try:
        commit = huggingface_hub.HfApi().dataset_info(settings.dataset, revision=settings.revision, timeout=30).sha
        return None if commit is None else str(commit)
    except HfHubHTTPError:  # no such name or revision, or no access: loading it says so in a sentence
        return None
    except Exception:  # out of reach, or no valid hub name: what the client's HTTP library raises has no common kind
        folder = "datasets--" + settings.dataset.replace("/", "--")
        reference = Path(HF_HUB_CACHE, folder, "refs", settings.revision or "main")
        return reference.read_text().strip() if reference.is_file() else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars of datasets meanwhile; what the caller had set comes back."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
