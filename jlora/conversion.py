"""Configurations from TOML, JSON and mappings, and back; unknown keys are errors."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from jlora.errors import JloraError, nearest

C = TypeVar("C")


def read_toml(file: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        JloraError: no such file, or no TOML, with the line.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JloraError(f"{file} does not exist; give a TOML file of settings") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise JloraError(f"{file} cannot be read as TOML: {error}") from None


def required(cls: Any) -> list[str]:
    """Names of the fields without a default."""
    missing = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is missing and field.default_factory is missing
    ]


def from_dict(cls: type[C], values: Mapping[str, Any], *, where: str) -> C:
    """Build the dataclass `cls` from nested mappings, as TOML and JSON give them.

    Raises:
        JloraError: unknown keys (each with the nearest known name), values of a wrong type and
            absent required keys, all at once, after `where`.
    """
    try:
        return pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        problems = [_problem(cls, dict(e)) for e in error.errors()]
        raise JloraError("\n".join([f"{where}:", *problems])) from None


def _problem(cls: Any, error: dict[str, Any]) -> str:
    """One line about one of pydantic's findings."""
    *parents, last = error["loc"] or ("",)
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "unexpected_keyword_argument":
        for parent in parents:
            cls = next(f.type for f in dataclasses.fields(cls) if f.name == parent)
        return f"  unknown key {key!r}{nearest(last, [f.name for f in dataclasses.fields(cls)])}"
    if error["type"] == "missing":
        return f"  missing key {key!r}"
    if isinstance(cause := error.get("ctx", {}).get("error"), JloraError):
        return f"  {cause}"
    return f"  {key!r}: {error['msg']}, got {error['input']!r}"


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict for TOML and JSON: paths as text, tuples as lists, None left out."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            result[field.name] = to_dict(value)
        elif isinstance(value, Path):
            result[field.name] = str(value)
        elif isinstance(value, tuple):
            result[field.name] = list(value)
        elif value is not None:
            result[field.name] = value
    return result
