"""Reads chat records from files, directories and the Hugging Face hub, and checks every one."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from jlora.data.keys import Keys
from jlora.data.records import Record
from jlora.data.rows import SUFFIXES, Quiet, cause, read_rows, read_text, without_nulls
from jlora.data.shapes import SHAPES, read_record
from jlora.errors import JloraError, nearest
from jlora.paths import SHOWN

_SPLIT_NAMES = {"valid": ("valid", "validation", "dev")}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def load_records(
    source: str | Path, split: str | None = None, *, ignore: Iterable[str] = ()
) -> list[Record]:
    """Read every record of one split, in the order of the source.

    A record is in one of four shapes: OpenAI's and Hugging Face's `messages`, ShareGPT's
    `conversations`, TRL's `prompt` and `completion`, Alpaca's `instruction`, `input`, `output`.
    Every key has its meaning, or is known to change nothing (ids, sources, scores …: see
    `jlora.data.keys`), or is an error. Keys that hold null count as absent.

    Args:
        source: a .jsonl, .json or .parquet file; a directory that holds one such file for each
            split (train, valid, test); or a hub data set, "org/name" or "org/name:config".
        split: the split to read, "train" where None. "valid", "validation" and "dev" mean the
            same split. A single file is a training set and has no other split.
        ignore: keys that are left out, of records and of turns.

    Raises:
        JloraError: nothing to read; malformed JSON; records that cannot be trained on, the first
            ten of them listed with their places; or keys that are unknown.
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
        return _check(read_rows(files[0]), str(files[0]), ignore)
    if path.is_file():
        if split != "train":
            raise JloraError(
                f"{path} is a single file, which has no {split!r} split. Put {split}.jsonl beside "
                "train.jsonl in a directory and give the directory, or name that file itself."
            )
        return _check(read_rows(path), str(path), ignore)
    return _check(_read_hub(str(source), split), str(source), ignore)


def _check(rows: Iterable[tuple[str, object]], source: str, ignore: Iterable[str]) -> list[Record]:
    """Turn (where, parsed row) pairs into records, or report all that is wrong at once."""
    keys = Keys(ignore)
    records, problems = [], []
    for where, row in rows:
        try:
            records.append(read_record(row, where, keys))
        except JloraError as error:
            problems.append(f"  {where}: {error}")
    if problems:
        total = len(records) + len(problems)
        more = len(problems) - SHOWN
        raise JloraError(
            "\n".join(
                [
                    f"{len(problems)} of the {total} records in {source} cannot be used:",
                    *problems[:SHOWN],
                    *([f"  ... and {more} more"] if more > 0 else []),
                    *keys.unknown(),
                    f"Mend or remove them. A record is an object in one of these shapes:\n{SHAPES}",
                ]
            )
        )
    if unknown := keys.unknown():
        raise JloraError(f"{source} has " + "\n".join(unknown))
    if not records:
        raise JloraError(f"{source} has no record. A record is one of:\n{SHAPES}")
    return records


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
    lines = [line.strip() for line in read_text(path).split("\n")]
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


def _read_hub(source: str, split: str) -> Iterator[tuple[str, object]]:
    import datasets

    present = _hub_splits(source)
    found = [name for name in _split_names(split) if name in present]
    if not found:
        raise JloraError(f"hub data set {source} has no {split!r} split; it has {present}.")
    name, _, config = source.partition(":")
    with Quiet():
        try:
            rows = datasets.load_dataset(name, config or None, split=found[0])
        except Exception as error:
            raise JloraError(_unreachable(source, error)) from error
    for i, row in enumerate(rows):
        yield f"{source}[{found[0]}] row {i}", without_nulls(row)


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
    with Quiet():
        try:
            return [str(split) for split in datasets.get_dataset_split_names(name, config or None)]
        except Exception as error:
            raise JloraError(_unreachable(source, error)) from error


def _unreachable(source: str, error: Exception) -> str:
    return (
        f"{source}: no such file or directory here, and as a hub data set it could not be loaded: "
        f"{cause(error)}. Check the name and the network; where the data set has several "
        'configurations, write "org/name:config".'
    )
