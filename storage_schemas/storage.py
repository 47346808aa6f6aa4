"""Where a cache lives: named, immutable byte strings under one root.

Every file is written once, whole, and only if its name is free: of two writers exactly one wins, and a reader never
sees half a file.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from storage_schemas.errors import CorruptShard, RequestError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


class Storage(Protocol):
    """Names are relative, at most one folder deep. A missing name raises FileNotFoundError."""

    url: str

    def put_new(self, name: str, content: bytes) -> bool:
        """Create a file atomically and durably; False, and nothing written, where the name is taken."""

    def get(self, name: str) -> bytes: ...

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes, or fewer where the file ends."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every file directly in a folder, by name; empty where there is no such folder."""

    def remove(self, name: str) -> None: ...


def check_name(name: str) -> str:
    """The name, if it cannot lead out of the cache; a manifest may come from a stranger. Raises CorruptShard."""
    if not _NAME.fullmatch(name):
        raise CorruptShard(f"{name!r} is not the name of a file in a cache; do not trust this manifest")
    return name


def open_storage(url: str) -> Storage:
    """The storage behind a local path. Raises RequestError for a scheme that is not supported."""
    scheme, separator, path = url.partition("://")
    if separator and scheme != "file":
        raise RequestError(
            f"expected a local path, got {url!r}; object stores are not supported yet: copy the cache here"
        )
    return LocalStorage(path if separator else url)


class LocalStorage:
    """A directory. Its own instances hold no open file, so they can be sent to another process."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.url = str(root)

    def put_new(self, name: str, content: bytes) -> bool:
        target = self.root / check_name(name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            return _create_file(target, content)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RequestError(
                    f"no space left for {target} ({len(content):,} bytes); what was committed before is safe: "
                    "make room and run the same command again"
                ) from error
            raise RequestError(
                f"cannot write {target}: {error.strerror}; choose an output that can be written"
            ) from error

    def get(self, name: str) -> bytes:
        return (self.root / check_name(name)).read_bytes()

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        with (self.root / check_name(name)).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)

    def sizes(self, folder: str = "") -> dict[str, int]:
        try:
            with os.scandir(self.root / folder) as entries:
                return {
                    f"{folder}/{entry.name}" if folder else entry.name: entry.stat().st_size
                    for entry in entries
                    if entry.is_file() and not entry.name.startswith(".")
                }
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            (self.root / check_name(name)).unlink()


def _create_file(target: Path, content: bytes) -> bool:
    """Write to a file without a name, make it durable, then link it to its name if that is free.

    Killed at any moment, this leaves the whole file or nothing; a file system without nameless files gets a hidden
    temporary one.
    """
    if target.exists():
        return False
    temporary: Path | None = None
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        try:
            descriptor = os.open(target.parent, os.O_TMPFILE | os.O_WRONLY, 0o644)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
            temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            # A directory descriptor makes Python call linkat(), which follows the link in /proc; link() does not.
            os.link(temporary or f"/proc/self/fd/{descriptor}", target, src_dir_fd=directory)
        except FileExistsError:
            return False
        finally:
            os.close(descriptor)
        os.fsync(directory)
    finally:
        os.close(directory)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return True
