"""Reads chat records from files, directories and the Hugging Face hub, and checks every one.

JSON is parsed here rather than by `datasets`, for two reasons: an error can then name the line,
and Arrow's type inference would turn a column of answers such as "2024-01-31" into timestamps.
Parquet and hub data already carry their types, so `datasets` reads those.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from jlora.errors import JloraError, nearest

SUFFIXES = (".jsonl", ".json", ".parquet")
ROLES = ("system", "user", "assistant")
SHAPES = """\
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
  {"prompt": "...", "completion": "..."}
  {"instruction": "...", "input": "..." (optional), "output": "..."}"""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_SPLIT_NAMES = {"valid": ("valid", "validation", "dev")}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_ERRORS_SHOWN = 10


class Message(TypedDict):
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation, checked.

    It has at least one assistant turn, and a user or system turn comes first. `where` says which
    line of which file it is ("train.jsonl:17", lines counted from 1), or which row of a Parquet
    file or hub data set ("train.parquet row 16", rows counted from 0 as `datasets` does).
    """

    messages: list[Message]
    where: str


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
        return _check(_read_file(files[0]), str(files[0]))
    if path.is_file():
        if split != "train":
            raise JloraError(
                f"{path} is a single file, which has no {split!r} split. Put {split}.jsonl beside "
                "train.jsonl in a directory and give the directory, or name that file itself."
            )
        return _check(_read_file(path), str(path))
    return _check(_read_hub(str(source), split), str(source))


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


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands in for a record that could not be parsed, so that all are reported together."""

    problem: str


def _check(rows: Iterable[tuple[str, object]], source: str) -> list[Record]:
    """Turn (where, parsed row) pairs into records, or report all the bad ones at once."""
    records = []
    problems = []
    for where, row in rows:
        try:
            records.append(Record(_messages(row), where))
        except JloraError as error:
            problems.append(f"  {where}: {error}")
    if problems:
        total = len(records) + len(problems)
        more = len(problems) - _ERRORS_SHOWN
        raise JloraError(
            f"{len(problems)} of the {total} records in {source} cannot be used:\n"
            + "\n".join(problems[:_ERRORS_SHOWN])
            + (f"\n  ... and {more} more" if more > 0 else "")
            + f"\nMend or remove them. A record is an object in one of these shapes:\n{SHAPES}"
        )
    if not records:
        raise JloraError(f"{source} has no record. A record is one of:\n{SHAPES}")
    return records


def _messages(row: object) -> list[Message]:
    """Bring one parsed row into the `messages` shape; a JloraError says what is wrong with it."""
    if isinstance(row, _Malformed):
        raise JloraError(row.problem)
    if not isinstance(row, dict):
        raise JloraError(f"a record must be a JSON object, not {_kind(row)}")
    row = {key: value for key, value in row.items() if value is not None}
    if "messages" in row:
        messages = _turns(row["messages"], "messages", "role", "content")
    elif "conversations" in row:
        messages = _turns(row["conversations"], "conversations", "from", "value")
    elif "prompt" in row and "completion" in row:
        messages = _pair(row, _string(row, "prompt"), "completion")
    elif "instruction" in row and "output" in row:
        question = _string(row, "instruction")
        if row.get("input", "") != "":
            question += "\n\n" + _string(row, "input")
        messages = _pair(row, question, "output")
    else:
        raise JloraError(f"unknown shape of record, with the keys {sorted(map(str, row))}")
    _check_order(messages)
    return messages


def _turns(value: object, name: str, role_key: str, content_key: str) -> list[Message]:
    if not isinstance(value, list):
        raise JloraError(f"{name!r} must be a list, not {_kind(value)}")
    messages: list[Message] = []
    for i, turn in enumerate(value):
        at = f"{name}[{i}]"
        if not isinstance(turn, dict):
            raise JloraError(f"{at} must be an object, not {_kind(turn)}")
        # To pass over these would train on turns that the author meant to leave out, or on
        # answers without the calls that they rest on.
        for key in ("tool_calls", "function_call"):
            if turn.get(key):
                raise JloraError(f"{at} has {key!r}, and jlora cannot train on tool calls")
        if turn.get("weight", 1) not in (None, 1):
            raise JloraError(f"{at} has weight {turn['weight']!r}; only whole turns are supported")
        given = turn.get(role_key)
        role = _SHAREGPT_ROLES.get(str(given), given) if role_key == "from" else given
        if role not in ROLES:
            known = [*_SHAREGPT_ROLES, *ROLES] if role_key == "from" else list(ROLES)
            hint = nearest(str(given), known)
            raise JloraError(f"{at} has {role_key} {given!r}; known: {', '.join(known)}{hint}")
        content = turn.get(content_key)
        if not isinstance(content, str):
            raise JloraError(f"{at} has a {content_key} that is {_kind(content)}, not a string")
        messages.append({"role": role, "content": content})
    return messages


def _pair(row: dict[str, Any], question: str, answer_key: str) -> list[Message]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _string(row, answer_key)},
    ]


def _string(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise JloraError(f"{key!r} must be a string, not {_kind(row[key])}")
    return row[key]


def _check_order(messages: Sequence[Message]) -> None:
    if not messages:
        raise JloraError("the conversation has no turn")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise JloraError(f"no assistant turn to learn from, only {', '.join(roles)}")
    if roles[0] == "assistant":
        raise JloraError("the first turn is the assistant's, with nothing before it to answer")
    try:
        "".join(message["content"] for message in messages).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise JloraError(f"half a surrogate pair, {half!r}, which is not a character") from None


def _kind(value: object) -> str:
    """Name a value by its JSON type, shortened: the reader looks at a file, not at Python."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "missing or null"
    text = repr(value)
    return f"{names.get(type(value), 'the value')} {text if len(text) <= 40 else text[:37] + '...'}"


def _read_file(path: Path) -> Iterator[tuple[str, object]]:
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
                row = _Malformed(f"not JSON: {error.msg} at column {error.colno}")
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
            yield f"{path.name}:{error.lineno}", _Malformed(problem)
            return
        yield f"{path.name}:{line}", row
        position = skip(end + 1) if text[end] == "," else end
    if text[position + 1 :].strip():
        line += text.count("\n", counted, skip(position + 1))
        yield f"{path.name}:{line}", _Malformed("more text after the end of the array")


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
