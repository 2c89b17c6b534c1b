"""Reads chat records from files, directories and the Hugging Face hub, and checks every one.

JSON is parsed here rather than by `datasets`, for two reasons: an error can then name the line,
and Arrow's type inference would turn a column of answers such as "2024-01-31" into timestamps.
Parquet and hub data already carry their types, so `datasets` reads those.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jlora.data.records import Malformed, Record, check_records
from jlora.errors import JloraError, nearest

SUFFIXES = (".jsonl", ".json", ".parquet")
_SPLIT_NAMES = {"valid": ("valid", "validation", "dev")}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def load_records(source: str | Path, split: str | None = None) -> list[Record]:
    """Read every record of one split, in the order of the source.

    Args:
        source: a .jsonl, .json or .parquet file; a directory that holds one such file for each
            split (train, valid, test); or a hub data set, "org/name" or "org/name:config".
            A .json file holds either an array of records or one record a line.
        split: the split to read, "train" where None. "valid", "validation" and "dev" mean the
            same split. A single file is a training set and has no other split.

    A record is in one of four shapes: OpenAI and Hugging Face `messages`, ShareGPT
    `conversations`, TRL `prompt` and `completion`, Alpaca `instruction`, `input`, `output`. Keys
    that hold null count as absent, and keys beside these are ignored.

    Raises:
        JloraError: nothing to read; malformed JSON; or records that cannot be trained on, the
            first ten of them listed with their places.
    """
    split = split or "train"
    path = Path(source)
    if path.is_dir():
        files = _split_files(path, split)
        if not files:
            raise JloraError(_missing_split(path, split))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise JloraError(
                f"{path} holds more than one {split!r} split: {names}. Keep or rename one of them."
            )
        return check_records(read_rows(files[0]), str(files[0]))
    if path.is_file():
        if split != "train":
            raise JloraError(
                f"{path} is a single file, which has no {split!r} split. Put {split}.jsonl beside "
                "train.jsonl in a directory and give the directory, or name that file itself."
            )
        return check_records(read_rows(path), str(path))
    return check_records(_read_hub(str(source), split), str(source))


def has_split(source: str | Path, split: str) -> bool:
    """Say whether `load_records(source, split)` would find that split.

    Raises:
        JloraError: `source` is neither a file nor a directory, nor a hub data set within reach.
    """
    path = Path(source)
    if path.is_dir():
        return bool(_split_files(path, split))
    if path.is_file():
        return split == "train"
    return bool(set(_split_names(split)) & set(_hub_splits(str(source))))


def read_labels(source: str | Path) -> tuple[str, ...] | None:
    """Return the lines of `labels.txt` in the directory of `source`, or None where there is none.

    Raises:
        JloraError: the file has no label, or the same label twice.
    """
    folder = Path(source)
    path = (folder.parent if folder.is_file() else folder) / "labels.txt"
    if not path.is_file():
        return None
    lines = [line.strip() for line in _read_text(path).split("\n")]
    first_line: dict[str, int] = {}
    for number, label in enumerate(lines, start=1):
        if label in first_line:
            raise JloraError(
                f"{path}:{number}: label {label!r} is already on line {first_line[label]}. "
                "Write each label once."
            )
        if label:
            first_line[label] = number
    if not first_line:
        raise JloraError(f"{path} has no label. Write one a line, or delete the file.")
    return tuple(first_line)


def _split_names(split: str) -> tuple[str, ...]:
    for names in _SPLIT_NAMES.values():
        if split in names:
            return names
    return (split,)


def _split_files(directory: Path, split: str) -> list[Path]:
    candidates = (directory / (name + end) for name in _split_names(split) for end in SUFFIXES)
    return [path for path in candidates if path.is_file()]


def _missing_split(directory: Path, split: str) -> str:
    wanted = " or ".join(_split_names(split))
    present = sorted(path.name for path in directory.iterdir()) or ["nothing"]
    shown = ", ".join(present[:10]) + (", ..." if len(present) > 10 else "")
    return (
        f"{directory} has no {split!r} split: expected {wanted} with one of the endings "
        f"{', '.join(SUFFIXES)}. The directory holds: {shown}."
    )


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Each row of a .jsonl, .json or .parquet file, after its place; `Malformed` where it is none.

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
    text = _read_text(path)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _read_array(text, path)
    return _read_lines(text, path)


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")  # the signature is what Windows editors put in front
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise JloraError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}). Save the file as UTF-8."
        ) from None
    return text.replace("\r\n", "\n")


def _read_lines(text: str, path: Path) -> Iterator[tuple[str, object]]:
    # str.splitlines would also cut at U+2028 and the like, which may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row: object = json.loads(line)
            except json.JSONDecodeError as error:
                row = Malformed(f"not JSON: {error.msg} at column {error.colno}")
            yield f"{path.name}:{number}", row


def _read_array(text: str, path: Path) -> Iterator[tuple[str, object]]:
    """Read the records of one JSON array one after another, each with the line it starts on."""
    decoder = json.JSONDecoder()
    space = re.compile(r"\s*")

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]  # matches "" at least

    position, line, counted = skip(skip(0) + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, end = decoder.raw_decode(text, position)
            end = skip(end)
            if text[end : end + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']' after a record", text, end)
        except json.JSONDecodeError as error:
            problem = f"not JSON: {error.msg} at column {error.colno}"
            yield f"{path.name}:{error.lineno}", Malformed(problem)
            return
        yield f"{path.name}:{line}", row
        position = skip(end + 1) if text[end] == "," else end
    if text[position + 1 :].strip():
        line += text.count("\n", counted, skip(position + 1))
        yield f"{path.name}:{line}", Malformed("more text after the end of the array")


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    import datasets

    # A cache of its own, thrown away: the shared one would fill with copies of every file.
    with tempfile.TemporaryDirectory() as cache, _Quiet():
        try:
            rows = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:
            raise JloraError(
                f"{path}: cannot be read as Parquet: {_cause(error)}. Write it again, or convert "
                "it to .jsonl."
            ) from error
    for i, row in enumerate(rows):
        yield f"{path.name} row {i}", row


def _read_hub(source: str, split: str) -> Iterator[tuple[str, object]]:
    import datasets

    present = _hub_splits(source)
    found = [name for name in _split_names(split) if name in present]
    if not found:
        raise JloraError(f"hub data set {source} has no {split!r} split; it has {present}.")
    name, _, config = source.partition(":")
    with _Quiet():
        try:
            rows = datasets.load_dataset(name, config or None, split=found[0])
        except Exception as error:
            raise JloraError(_unreachable(source, error)) from error
    for i, row in enumerate(rows):
        yield f"{source}[{found[0]}] row {i}", row


def _hub_splits(source: str) -> list[str]:
    path = Path(source)
    if path.parent != Path() and path.parent.is_dir():  # so no hub is asked about a slip of the pen
        present = [entry.name for entry in path.parent.iterdir()]
        hint = nearest(path.name, present)
        raise JloraError(f"{source}: no such file or directory{hint or '. Check the path.'}")
    if not _HUB_NAME.fullmatch(source) or path.suffix in SUFFIXES:
        raise JloraError(
            f"{source}: no such file or directory, and not the name of a hub data set "
            '("org/name" or "org/name:config") either. Check the path.'
        )
    import datasets

    name, _, config = source.partition(":")
    with _Quiet():
        try:
            return [str(split) for split in datasets.get_dataset_split_names(name, config or None)]
        except Exception as error:
            raise JloraError(_unreachable(source, error)) from error


def _unreachable(source: str, error: Exception) -> str:
    return (
        f"{source}: no such file or directory here, and as a hub data set it could not be loaded: "
        f"{_cause(error)}. Check the name and the network; where the data set has several "
        'configurations, write "org/name:config".'
    )


def _cause(error: BaseException) -> str:
    """Return the first line of the innermost error; `datasets` wraps the telling one."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


class _Quiet:
    """Switches the progress bars of `datasets` off for a block, and back as they were."""

    def __enter__(self) -> None:
        import datasets

        self.were_on = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()

    def __exit__(self, *error: object) -> None:
        import datasets

        if self.were_on:
            datasets.enable_progress_bars()
