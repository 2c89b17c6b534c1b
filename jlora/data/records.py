"""What a training record is: its type, the four shapes that it may come in, and their checks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from jlora.errors import JloraError, nearest

ROLES = ("system", "user", "assistant")
SHAPES = """\
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
  {"prompt": "...", "completion": "..."}
  {"instruction": "...", "input": "..." (optional), "output": "..."}"""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
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


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands in for a record that could not be parsed, so that all are reported together."""

    problem: str


def check_records(rows: Iterable[tuple[str, object]], source: str) -> list[Record]:
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
    if isinstance(row, Malformed):
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
