"""What a shard is, whatever file it lies in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storage_schemas.errors import RequestError
from storage_schemas.records import StoredSequence


@dataclass(frozen=True)
class Container:
    """A kind of file for payloads: its suffix, and how rows become a file with the offset of each payload in it."""

    suffix: str
    pack: Callable[[Sequence[StoredSequence]], tuple[bytes, list[int]]]


def get_container(name: str) -> Container:
    """Raises RequestError for an unknown name. Imports the library of the container asked for, and no other."""
    if name == "arrow":
        from storage_schemas.arrow_shard import pack_arrow

        return Container(".arrow", pack_arrow)
    if name == "zarr":
        from storage_schemas.zarr_shard import pack_zarr

        return Container(".zarr.zip", pack_zarr)
    raise RequestError(f"expected a container among arrow, zarr, got {name!r}; choose one of them")
