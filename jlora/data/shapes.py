"""The shapes that a record may come in, each brought into the messages that a template renders."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jlora.data.keys import Keys, Taken
from jlora.data.records import Malformed, Message, Record
from jlora.errors import JloraError, nearest

# OpenAI's and Hugging Face's roles as they are; then those of ShareGPT and of others.
ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "developer": "system",  # OpenAI's newer word; the templates of most families do not know it
    "function": "tool",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",  # LLaMA-Factory's: its value is the call
    "observation": "tool",
}
FLAGS = ("train", "trainable", "training", "loss_mask", "weight")
REASONING = ("reasoning_content", "reasoning", "thinking")
SHAPES = """\
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
  {"prompt": "...", "completion": "..."}, or both as lists of messages
  {"instruction": "...", "input": "..." (optional), "output": "...", "history": [["...", "..."]]}"""

_SHOWN = 40  # characters of a value that an error shows
_COMMON = ("system", "tools", "functions", "chat_template_kwargs")
_TURN = (
    "role", "content", "from", "value", "name", "tool_calls", "tool_call_id", "function_call",
    *REASONING, *FLAGS,
)  # fmt: skip


def read_record(row: object, where: str, keys: Keys) -> Record:
    """Bring one parsed row into messages.

    Args:
        row: what was parsed, in one of `SHAPES`, or `Malformed`.
        where: its place.
        keys: looks at every key that is not of the shape.

    Raises:
        JloraError: what is wrong with it, without its place.
    """
    if isinstance(row, Malformed):
        raise JloraError(row.problem)
    if not isinstance(row, dict):
        raise JloraError(f"a record must be a JSON object, not {_kind(row)}")
    return _Reader(where, keys).record(row)


class _Reader:
    """Reads one record; its attributes are those of `Record`, as far as it has got."""

    def __init__(self, where: str, keys: Keys) -> None:
        self.where, self.keys = where, keys
        self.messages: list[Message] = []
        self.context: set[int] = set()
        self.harmless: list[str] = []
        self.left_out: list[str] = []

    def record(self, given: dict[str, Any]) -> Record:
        known, read = _shape_of(
            {key for key in given if given[key] is not None and key not in self.keys.ignore}
        )
        row = self._take(given, (*known, *_COMMON))
        read(self, row)
        if system := self._text(row.get("system", ""), "'system' is"):
            self._put_first(system)
        options = row.get("chat_template_kwargs", {})
        if not isinstance(options, dict):
            raise JloraError(f"'chat_template_kwargs' must be an object, not {_kind(options)}")
        record = Record(
            self.messages, self.where, frozenset(self.context), _tools(row), options,
            tuple(self.harmless), tuple(self.left_out),
        )  # fmt: skip
        _check_order(record)
        _check_text([record.messages, record.tools, record.options])
        return record

    def _take(self, row: dict[str, Any], known: Iterable[str], level: str = "") -> Taken:
        taken = self.keys.take(row, tuple(known), self.where, level)
        self.harmless += taken.harmless
        self.left_out += taken.left_out
        return taken

    def _put_first(self, system: str) -> None:
        """Put the record's own system message before the conversation."""
        first = self.messages[0] if self.messages else {}
        if first.get("role") != "system":
            self.messages.insert(0, {"role": "system", "content": system})
            self.context = {i + 1 for i in self.context}
        elif first["content"] != system:
            raise JloraError(
                f"'system' is {_kind(system)}, and the first turn is another system message, "
                f"{_kind(first['content'])}"
            )

    def _conversation(self, row: Mapping[str, Any]) -> None:
        name = "messages" if "messages" in row else "conversations"
        self._turns(row[name], name)

    def _completion(self, row: Mapping[str, Any]) -> None:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            self._turns(prompt, "prompt", context=True)
            self._turns(completion, "completion")
        else:
            self._pair(_string(row, "prompt"), _string(row, "completion"))

    def _instruction(self, row: Mapping[str, Any]) -> None:
        history = row.get("history", [])
        if not isinstance(history, list):
            raise JloraError(f"'history' must be a list, not {_kind(history)}")
        for i, pair in enumerate(history):
            if not (isinstance(pair, list) and len(pair) == 2 and all(_is_text(x) for x in pair)):
                raise JloraError(
                    f"history[{i}] must be [question, answer], both strings, not {_kind(pair)}"
                )
            self._pair(*pair)
        question = _string(row, "instruction")
        if row.get("input", "") != "":
            question += "\n\n" + _string(row, "input")
        self._pair(question, _string(row, "output"))

    def _pair(self, question: str, answer: str) -> None:
        self.messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    def _turns(self, value: object, name: str, *, context: bool = False) -> None:
        if not isinstance(value, list):
            raise JloraError(f"{name!r} must be a list, not {_kind(value)}")
        for i, turn in enumerate(value):
            self._turn(turn, f"{name}[{i}]", context=context)

    def _turn(self, turn: object, at: str, *, context: bool) -> None:
        """Add one turn; `context` says that no answer of this list is to be trained."""
        if not isinstance(turn, dict):
            raise JloraError(f"{at} must be an object, not {_kind(turn)}")
        turn = self._take(turn, _TURN, "of a turn")
        for pair in (("role", "from"), ("content", "value"), ("tool_calls", "function_call")):
            if turn.keys() >= set(pair):
                raise JloraError(f"{at} has both {' and '.join(pair)}: keep one of them")
        role_key = "from" if "from" in turn else "role"
        content_key = "value" if "value" in turn else "content"
        given = turn.get(role_key)
        role = ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            hint = nearest(str(given)[:_SHOWN], ROLES)
            raise JloraError(
                f"{at} has {role_key} {_short(given)}; known: {', '.join(ROLES)}{hint}"
            )
        message: Message = {"role": role}
        content = turn.get(content_key)
        if given == "function_call":
            message["tool_calls"], content = _calls(content, at), ""
        elif calls := turn.get("tool_calls") or turn.get("function_call"):
            message["tool_calls"] = _calls(calls, at)
        thoughts = {
            key: self._text(turn[key], f"{at} has a {key} that is")
            for key in REASONING
            if key in turn
        }
        if len(set(thoughts.values())) > 1:
            raise JloraError(f"{at} has {' and '.join(thoughts)}, which differ: keep one of them")
        if content is None and "tool_calls" in message:
            content = ""
        message["content"] = self._text(content, f"{at} has a {content_key} that is")
        if thought := next(iter(thoughts.values()), ""):
            message["reasoning_content"] = thought
        message |= {k: turn[k] for k in ("name", "tool_call_id") if k in turn}
        if role != "assistant" and (own := {"tool_calls", "reasoning_content"} & message.keys()):
            raise JloraError(f"{at}, of role {role}, has {', '.join(own)}: that is an assistant's")
        trained = _trained(turn, at)
        if trained and (role != "assistant" or context):
            flags = " and ".join(f"{k} {turn[k]!r}" for k in FLAGS if k in turn)
            whose = "a turn of the prompt" if context else f"a turn of role {role}"
            raise JloraError(
                f"{at} has {flags}, and is {whose}: only the assistant's answers are trained"
            )
        if role == "assistant" and (context or trained is False):
            self.context.add(len(self.messages))
        self.messages.append(message)

    def _text(self, content: object, what: str) -> str:
        """Return text that stands alone, or in a list of text parts as OpenAI's API has it."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            raise JloraError(f"{what} {_kind(content)}, not a string or a list of text parts")
        texts = []
        for part in content:
            if (kind := part.get("type")) not in (None, "text"):
                raise JloraError(f"{what} partly of type {kind!r}: jlora trains on text alone")
            texts.append(_string(self._take(part, ("type", "text"), "of a content part"), "text"))
        return "".join(texts)


_READERS: dict[tuple[str, ...], tuple[tuple[str, ...], Callable[..., None]]] = {
    ("messages",): (("messages",), _Reader._conversation),
    ("conversations",): (("conversations",), _Reader._conversation),
    ("prompt", "completion"): (("prompt", "completion"), _Reader._completion),
    ("instruction", "output"): (
        ("instruction", "input", "output", "history"),
        _Reader._instruction,
    ),
}


def is_record(keys: set[str]) -> bool:
    """Say whether an object with these keys has the shape of a record."""
    return any(needed <= keys for needed in map(set, _READERS))


def _shape_of(keys: set[Any]) -> tuple[tuple[str, ...], Callable[..., None]]:
    """Return the keys that the shape of a record may hold, and what reads it."""
    for needed, shape in _READERS.items():
        if set(needed) <= keys:
            return shape
    raise JloraError(f"unknown shape of record, with the keys {sorted(map(str, keys))}")


def _trained(turn: Mapping[str, Any], at: str) -> bool | None:
    """Return what a turn says of being trained, or None if it says nothing."""
    said = {}
    for key in FLAGS:
        if (value := turn.get(key)) is not None:
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise JloraError(
                    f"{at} has {key} {_short(value)}; 1 or true trains a turn, 0 or false "
                    "leaves it as context, and nothing between them is supported"
                )
            said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise JloraError(f"{at} contradicts itself: {said}")
    return next(iter(said.values()), None)


def _calls(value: object, at: str) -> list[dict[str, Any]]:
    """Return tool calls in OpenAI's form, with arguments as objects, which templates expect.

    Args:
        value: a list of them, or one call as `function_call` has it, also as JSON text.
        at: the turn's place.
    """
    value = _parsed(value, f"{at} has a tool call that")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        whole = call if isinstance(call, dict) else {}
        function = whole.get("function", whole)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise JloraError(
                f"{at} has the tool call {_kind(call)}; a call is "
                '{"type": "function", "function": {"name": "...", "arguments": {...}}}'
            )
        name = function["name"]
        arguments = _parsed(
            function.get("arguments") or {}, f"{at} calls {name} with arguments that"
        )
        if not isinstance(arguments, dict):
            raise JloraError(f"{at} calls {name} with {_kind(arguments)}, not with an object")
        beside = whole if "function" in whole else {}
        function = function | {"arguments": arguments}
        calls.append({"type": "function"} | beside | {"function": function})
    return calls


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return a record's tools; `functions` is OpenAI's older name for their schemas."""
    if row.get("tools") and row.get("functions"):
        raise JloraError("has both 'tools' and 'functions', its older form: keep one of them")
    key = "tools" if row.get("tools") else "functions"
    tools = _parsed(row.get(key) or [], f"{key!r}")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise JloraError(f"{key!r} must be a list of objects, not {_kind(tools)}")
    if key == "functions":
        tools = [{"type": "function", "function": function} for function in tools]
    return tools or None


def _parsed(value: object, what: str) -> Any:
    """Return what JSON text says, and anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else []
    except (ValueError, RecursionError) as error:
        raise JloraError(f"{what} is no JSON: {error}") from None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _string(row: Mapping[str, Any], key: str) -> str:
    if not _is_text(row.get(key)):
        raise JloraError(f"{key!r} must be a string, not {_kind(row.get(key))}")
    return row[key]


def _check_order(record: Record) -> None:
    if not record.messages:
        raise JloraError("the conversation has no turn")
    roles = [message["role"] for message in record.messages]
    if "assistant" not in roles:
        raise JloraError(f"no assistant turn to learn from, only {', '.join(roles)}")
    if record.trained[:1] == [0]:
        raise JloraError(
            "the first turn is the assistant's, with nothing before it to answer; "
            'with "train": false it is context'
        )


def _check_text(values: object) -> None:
    """Refuse text that no tokenizer can take."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise JloraError(f"half a surrogate pair, {half!r}, which is not a character") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise JloraError(f"holds what JSON cannot say: {error}") from None


def _kind(value: object) -> str:
    """Name a value by its JSON type, shortened: the reader looks at a file, not at Python."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "missing or null"
    return f"{names.get(type(value), 'the value')} {_short(value)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
