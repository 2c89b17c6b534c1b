"""What `jlora generate` is asked: prompts, and which of several adapters answers each."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jlora import adapters, conversion
from jlora.bank import Bank
from jlora.config import Strict
from jlora.data.records import Malformed, Message
from jlora.data.rows import read_rows
from jlora.errors import JloraError, nearest
from jlora.paths import SHOWN

UNNAMED = "default"
"""Name of an adapter that was given none, as in PEFT."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt(Strict):
    """A row of the prompts file."""

    prompt: str
    """The user's turn."""
    adapter: str | None = None
    """Name of the one that answers; null for the base alone. Left out, the only one there is."""
    system: str | None = None
    """System message, in place of --system's."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise JloraError("'prompt' is empty: give the user's text")

    def messages(self, system: str | None) -> list[Message]:
        """The conversation to be answered."""
        system = system if self.system is None else self.system
        before = [Message(role="system", content=system)] if system else []
        return [*before, Message(role="user", content=self.prompt)]

    def answered(self, text: str) -> dict[str, str | None]:
        """The row as it is printed."""
        system = {} if self.system is None else {"system": self.system}
        return {"prompt": self.prompt, "adapter": self.adapter, **system, "answer": text}


def named(given: Iterable[str]) -> dict[str, Path]:
    """Name -> path of each adapter, of --adapter's NAME=DIR; one alone may be DIR.

    Raises:
        JloraError: several of which some have no name; a name twice.
    """
    pairs = []
    for value in given:
        match = None if Path(value).exists() else re.fullmatch("([^/=]+)=(.+)", value)
        pairs.append(match.groups() if match else (None, value))
    problems = []
    if len(pairs) > 1:
        problems = [f"{path} has no name" for name, path in pairs if name is None]
    names = [name for name, _ in pairs]
    twice = dict.fromkeys(name for name in names if name and names.count(name) > 1)
    problems += [f"{name!r} is given {names.count(name)} times" for name in twice]
    if problems:
        raise JloraError(
            f"--adapter: {'; '.join(problems)}; several adapters are told apart by names, "
            "--adapter NAME=DIR NAME=DIR"
        )
    return {name or UNNAMED: Path(path) for name, path in pairs}


def ask(texts: Iterable[str], names: Sequence[str]) -> list[Prompt]:
    """The prompts of --prompt, all for the only adapter, if there is one.

    Raises:
        JloraError: there are several.
    """
    if len(names) > 1:
        raise JloraError(
            f"--prompt does not say which of the adapters {', '.join(names)} answers: give a file, "
            '--prompts FILE.jsonl, of rows {"prompt": "...", "adapter": "..."}'
        )
    return [Prompt(prompt=text, adapter=_only(names)) for text in texts]


def read(file: Path, names: Sequence[str]) -> list[Prompt]:
    """The rows of a JSONL, JSON or Parquet file.

    Args:
        file: its rows are as `Prompt` says.
        names: of the adapters.

    Raises:
        JloraError: rows that are none, or name no adapter or an unknown one: the first ten, each
            with its place.
    """
    prompts, problems = [], []
    for where, row in read_rows(file):
        try:
            prompts.append(_prompt(row, where, names))
        except JloraError as error:
            problems.append(f"  {error}")
    if problems:
        more = len(problems) - SHOWN
        raise JloraError(
            f"{len(problems)} of the {len(problems) + len(prompts)} rows of {file} cannot be "
            "asked:\n"
            + "\n".join(problems[:SHOWN])
            + (f"\n  … and {more} more" if more > 0 else "")
        )
    if not prompts:
        raise JloraError(f'{file} has no row; a row is {{"prompt": "...", "adapter": "NAME"}}')
    return prompts


def _prompt(row: object, where: str, names: Sequence[str]) -> Prompt:
    if not isinstance(row, dict):
        problem = row.problem if isinstance(row, Malformed) else "not a JSON object"
        raise JloraError(f"{where}: {problem}")
    if "adapter" not in row and len(names) > 1:
        raise JloraError(
            f"{where}: names no adapter; give one of {', '.join(names)}, or null for the base"
        )
    asked = conversion.from_dict(Prompt, {"adapter": _only(names)} | row, where=where)
    if asked.adapter is not None and asked.adapter not in names:
        known = nearest(asked.adapter, names) or f"; there are: {', '.join(names) or 'none'}"
        raise JloraError(f"{where}: no adapter {asked.adapter!r}{known} (--adapter NAME=DIR)")
    return asked


def _only(names: Sequence[str]) -> str | None:
    return names[0] if names else None


def adapt(
    model: Any, paths: dict[str, Path], prompts: Sequence[Prompt], *, force: bool = False
) -> tuple[Any, list[str | None] | None]:
    """What `generate` takes: the model, or a bank over it and the name of each prompt's adapter.

    `force` uses adapters of other bases, and such as change nothing.
    """
    if not paths:
        return model, None
    names = [prompt.adapter for prompt in prompts]
    if len(paths) == 1 and None not in names:  # on the model itself, where it may be of any kind
        (path,) = paths.values()
        return adapters.load_adapter(path, model, force=force, allow_zero=force), None
    return Bank.of(model, paths, force=force), names
