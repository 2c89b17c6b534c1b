"""Reads files of JSON and Parquet row by row, each row with its place.

JSON is parsed here rather than by `datasets`, for two reasons: an error can then name the line,
and Arrow's type inference would turn a column of answers such as "2024-01-31" into timestamps.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.data.keys import HARMLESS
from jlora.data.records import Malformed
from jlora.data.shapes import is_record
from jlora.errors import JloraError

SUFFIXES = (".jsonl", ".json", ".parquet")

_AROUND = HARMLESS | {"name", "description"}  # keys that may stand beside an array of records


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of which no key comes twice: JSON has the last stand, without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
_SPACE = re.compile(r"\s*")


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield each row of a .jsonl, .json or .parquet file after its place.

    JSON may be one value a line, one array, one object that is a row or holds one array of rows,
    or values of several lines each, one after another. A row that cannot be parsed is `Malformed`.

    Raises:
        JloraError: another ending; no UTF-8.
    """
    if path.suffix not in SUFFIXES:
        raise JloraError(
            f"{path}: cannot read a file that ends in {path.suffix!r}; the endings known are "
            f"{', '.join(SUFFIXES)}."
        )
    if path.suffix == ".parquet":
        return _read_parquet(path)
    text = read_text(path)
    start = _skip(text, 0)
    first_line = text[start:].partition("\n")[0].strip()
    if first_line == "[" or (path.suffix == ".json" and text[start : start + 1] == "["):
        return _read_array(text, start, path, last=True)
    if text[start : start + 1] == "{":
        value, end = _parse(text, start)
        alone = end is not None and not text[_skip(text, end) :]
        if alone and isinstance(value, dict) and not is_record(set(value)):
            return _read_object(text, start, path)
        if first_line == "{" or (alone and "\n" in text[start:end]):
            return _read_values(text, start, path)
    return _read_lines(text, path)


def read_text(path: Path) -> str:
    """Return the text of a file, whatever its line ends were.

    Raises:
        JloraError: it is not UTF-8; the line is named.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")  # the signature is what Windows editors put in front
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise JloraError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}). Save the file as UTF-8."
        ) from None
    return text.replace("\r\n", "\n")


def without_nulls(row: Any) -> Any:
    """Return a row of Arrow without the nulls in its objects, which have the keys of all rows."""
    if isinstance(row, dict):
        return {key: without_nulls(value) for key, value in row.items() if value is not None}
    if isinstance(row, list):
        return [without_nulls(value) for value in row]
    return row


def cause(error: BaseException) -> str:
    """Return the first line of the innermost error; `datasets` wraps the telling one."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


class Quiet:
    """Switches the progress bars of `datasets` off for a block, and back as they were."""

    def __enter__(self) -> None:
        import datasets

        self.were_on = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()

    def __exit__(self, *error: object) -> None:
        import datasets

        if self.were_on:
            datasets.enable_progress_bars()


def _skip(text: str, at: int) -> int:
    """Return where white space that begins at `at` ends."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches "" at least


def _parse(text: str, at: int) -> tuple[object, int | None]:
    """Return the JSON value that begins at `at` and its end, or `Malformed` and None."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        line = error.doc.count("\n", 0, error.pos) + 1
        return Malformed(f"not JSON: {error.msg} at column {error.colno}", line), None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deep nesting
        line = text.count("\n", 0, at) + 1
        return Malformed(f"JSON that cannot be read: {error}", line), None


class _Lines:
    """Counts the lines of a text up to positions that only grow."""

    def __init__(self, text: str) -> None:
        self.text, self.line, self.at = text, 1, 0

    def of(self, position: int) -> int:
        """Return the line of `position`, from 1."""
        self.line += self.text.count("\n", self.at, position)
        self.at = position
        return self.line


def _read_lines(text: str, path: Path) -> Iterator[tuple[str, object]]:
    # str.splitlines would also cut at U+2028 and the like, which may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row, end = _parse(line, _skip(line, 0))
        rest = len(line) if end is None else _skip(line, end)
        if rest < len(line):
            row = Malformed(f"not JSON: Extra data at column {rest + 1}")
        yield f"{path.name}:{number}", row


def _read_values(text: str, start: int, path: Path) -> Iterator[tuple[str, object]]:
    """Yield values of several lines each, which follow one another."""
    lines = _Lines(text)
    end: int | None = start
    while end is not None and (at := _skip(text, end)) < len(text):
        row, end = _parse(text, at)
        line = row.line if isinstance(row, Malformed) else lines.of(at)
        yield f"{path.name}:{line}", row


def _read_array(text: str, start: int, path: Path, *, last: bool) -> Iterator[tuple[str, object]]:
    """Yield the values of one array, each with the line it starts on.

    Args:
        text: the file.
        start: where the array begins.
        path: the file's path.
        last: whether nothing may follow the array.
    """
    lines, position = _Lines(text), _skip(text, start + 1)
    while text[position : position + 1] != "]":
        row, end = _parse(text, position)
        after = len(text) if end is None else _skip(text, end)
        if end is not None and text[after : after + 1] not in (",", "]"):
            column, line = after - text.rfind("\n", 0, after), text.count("\n", 0, after) + 1
            row = Malformed(f"not JSON: Expecting ',' or ']' at column {column}", line)
        if isinstance(row, Malformed):
            yield f"{path.name}:{row.line}", row
            return
        yield f"{path.name}:{lines.of(position)}", row
        position = _skip(text, after + 1) if text[after] == "," else after
    after = _skip(text, position + 1)
    if last and after < len(text):
        yield f"{path.name}:{lines.of(after)}", Malformed("more text after the end of the array")


def _read_object(text: str, start: int, path: Path) -> Iterator[tuple[str, object]]:
    """Yield the rows of an object that holds one array of them, or the object itself."""
    whole, _ = _parse(text, start)
    assert isinstance(whole, dict)
    arrays, beside = {}, []
    position = _skip(text, start + 1)
    while text[position] != "}":  # it has been parsed, so it is well-formed
        key, end = _parse(text, position)
        at = _skip(text, _skip(text, end or 0) + 1)
        value, end = _parse(text, at)
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            arrays[key] = at
        elif key not in _AROUND:
            beside.append(key)
        position = _skip(text, end or 0)
        position = _skip(text, position + 1) if text[position] == "," else position
    where = f"{path.name}:{text.count(chr(10), 0, start) + 1}"
    if not arrays:
        yield where, whole
    elif len(arrays) > 1:
        names = ", ".join(map(repr, arrays))
        yield where, Malformed(f"an object with {len(arrays)} arrays, {names}: give each its file")
    elif beside:
        names = ", ".join(map(repr, beside))
        yield (
            where,
            Malformed(
                f"an object with the array {next(iter(arrays))!r}, and beside it {names}, of which "
                "no record would know: put it into the records, or take it out"
            ),
        )
    else:
        yield from _read_array(text, next(iter(arrays.values())), path, last=False)


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    import datasets

    # A cache of its own, thrown away: the shared one would fill with copies of every file.
    with tempfile.TemporaryDirectory() as cache, Quiet():
        try:
            rows = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:
            raise JloraError(
                f"{path}: cannot be read as Parquet: {cause(error)}. Write it again, or convert "
                "it to .jsonl."
            ) from error
    for i, row in enumerate(rows):
        yield f"{path.name} row {i}", without_nulls(row)
