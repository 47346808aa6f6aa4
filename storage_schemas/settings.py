"""How a table of settings is read: a TOML file, then `section.key=value` overrides, into frozen pydantic models."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from storage_schemas.errors import RequestError


class Settings(BaseModel):
    """Base of every table of settings: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


S = TypeVar("S", bound=Settings)


def load_settings(model: type[S], *, path: str | None = None, overrides: Sequence[str] = ()) -> S:
    """The settings of a TOML file with overrides applied, in their order.

    An override is `key=value` or `section.key=value`; the value is read as TOML and, where it is none, as a plain
    string, so that `teacher.model=org/name` needs no quotes. Raises RequestError naming the key.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(
                f"cannot read the configuration {path}: {error.strerror}; give --config a file"
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"the configuration {path} is not valid TOML: {error}; mend it there") from error
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not all(name.split(".")):
            raise RequestError(
                f"expected section.key=value, got {override!r}; for example --set corpus.max_length=1024"
            )
        _assign(table, name.split("."), _parse_value(text), override)
    return validate_settings(model, table)


def validate_settings(model: type[S], table: Mapping[str, Any]) -> S:
    """The model of a table; raises RequestError that names each bad key in one sentence."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise RequestError("; ".join(_explain(model, item) for item in error.errors())) from error


def write_settings(settings: Settings, path: Path) -> None:
    """Write the resolved settings as TOML that `load_settings` reads back; keys without a value are left out."""
    path.write_text(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)), encoding="utf-8")


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(table: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise RequestError(
                f"{override!r} goes into {key!r}, which is a value and not a table; name a key beside it"
            )
    table[keys[-1]] = value


def _explain(model: type[BaseModel], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    name = ".".join(location)
    if item["type"] != "extra_forbidden":
        got = "" if item["type"] == "missing" else f", got {item.get('input')!r}"
        return f"setting {name}: {item['msg'].lower()}{got}"
    known = sorted(_fields_at(model, location[:-1]))
    close = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
    return f"unknown setting {name!r}; {hint}"


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    for key in location:
        field = model.model_fields.get(key)
        if field is None:
            return []
        candidates = [field.annotation, *get_args(field.annotation)]
        tables = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not tables:
            return []
        model = tables[0]
    return list(model.model_fields)
