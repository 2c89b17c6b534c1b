"""Finds what a model sees and writes at each answer of a conversation, as text.

A row begins with the prompt that generation would render, and goes on with what the template writes
for the answer. Most templates only append, and all answers of a conversation fit in one row. Others
write earlier turns otherwise once later ones follow: they leave earlier reasoning out, or move the
system message. Then each answer has a row of its own.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from jlora.data.records import Message, Record
from jlora.data.shapes import REASONING
from jlora.data.template import ChatTokenizer
from jlora.errors import JloraError

# A generation prompt that opens the reasoning, as DeepSeek-R1's: "...<think>\n".
_OPENED = re.compile(r"<([\w:.-]*(?:think|thought|reason)[\w:.-]*)>\s*\Z")
_SHOWN = 300  # characters of a text that an error shows


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer at the moment that it is written.

    Attributes:
        index: which of the record's messages it is.
        text: the conversation up to and with the answer, and what the template puts behind it.
        start: where in `text` the answer starts, behind the generation prompt.
        end: where it ends, behind the token that ends the turn.
    """

    index: int
    text: str
    start: int
    end: int

    @property
    def prompt(self) -> str:
        """What generation is given."""
        return self.text[: self.start]


def rows(record: Record, tokenizer: ChatTokenizer) -> list[list[Turn]]:
    """Return the answers to be trained, those in one list that fit in the last one's text.

    Raises:
        JloraError: the template refuses the conversation, or does not write whole what is trained.
    """
    found: list[list[Turn]] = []
    seen = 0
    for index in record.trained:
        turn = _turn(record, index, tokenizer)
        _check_context(record, range(seen, index), turn.prompt, tokenizer)
        seen = index + 1
        last = found[-1][-1] if found else None
        if last is not None and turn.text.startswith(last.text[: last.end]):
            found[-1].append(turn)
        else:
            found.append([turn])
    return found


def _turn(record: Record, index: int, tokenizer: ChatTokenizer) -> Turn:
    before = tokenizer.render(record, index, prompt=True)
    whole = tokenizer.render(record, index + 1, prompt=False)
    opened = _OPENED.search(before)
    written = _written(record, index, before, whole, opened, tokenizer)
    text = before + written
    end = _end(text, len(before), tokenizer)
    if end is None:
        end = max(len(before), len(text.rstrip()))
        if tokenizer.eos_token:
            # The template ends no turn, and the model would not learn to stop.
            text = text[:end] + tokenizer.eos_token
            end = len(text)
    turn = Turn(index, text, len(before), end)
    _check_whole(record, turn, opened.start() if opened else len(before), tokenizer)
    return turn


def _written(
    record: Record,
    index: int,
    before: str,
    whole: str,
    opened: re.Match[str] | None,
    tokenizer: ChatTokenizer,
) -> str:
    """Return what follows the generation prompt: the answer, and what the template puts behind it.

    Args:
        record: the conversation.
        index: of the answer.
        before: the turns before it, with the generation prompt.
        whole: the turns up to and with it.
        opened: the tag in which the prompt opens the reasoning.
        tokenizer: has rendered them.
    """
    if whole.startswith(before):
        return whole[len(before) :]
    stem = before[: opened.start()] if opened else before
    at = _behind(stem, whole, record.messages[index - 1])
    if at is None:
        raise JloraError(_rewritten(record, index, before, whole, tokenizer))
    if opened is None:
        return whole[at:]
    return _reasoned(record.messages[index], opened, whole[at:])


def _behind(stem: str, whole: str, last: Message) -> int | None:
    """Return where in `whole` the answer begins, if the turn before it ends as in `stem`.

    `whole` may have earlier turns otherwise than `stem`, which ends with the turn `last`.
    """
    if whole.startswith(stem):
        return len(stem)
    content = last["content"].strip()
    begin = stem.rfind(content)
    if not content or begin < 0:
        return None
    ending = stem[begin:]
    at = -1
    for _ in range(stem.count(ending)):  # an earlier turn may have the same text
        at = whole.find(ending, at + 1)
        if at < 0:
            return None
    return at + len(ending)


def _reasoned(message: Message, opened: re.Match[str], written: str) -> str:
    """Return the answer with its reasoning, which the generation prompt has opened.

    Templates that open it there leave it out of the answers that they write, so that history has
    none. The model writes it all the same: the reasoning, the tag that closes it, the answer.

    Args:
        message: the answer's; its reasoning is apart, or in its content, or there is none.
        opened: the opening tag in the prompt, with the white space behind it.
        written: how the template writes the answer.
    """
    tag, close = f"<{opened[1]}>", f"</{opened[1]}>"
    if close in written:  # this one does not leave it out
        return written.removeprefix(opened.group()).removeprefix(tag)
    thought, closed, rest = message["content"].partition(close)
    if closed:
        if thought.startswith(opened.group()):
            thought = thought.removeprefix(opened.group())
        else:
            thought = thought.rpartition(tag)[2].lstrip("\n")
        gap = rest[: len(rest) - len(rest.lstrip())]
    else:
        thought, gap = message.get("reasoning_content", "").strip("\n") + "\n", "\n\n"
    return thought + close + ("" if written[:1].isspace() else gap) + written


def _end(text: str, start: int, tokenizer: ChatTokenizer) -> int | None:
    """Return where the answer that starts at `start` ends, or None where no token ends it."""
    if tokenizer.turn_end and (at := text.rfind(tokenizer.turn_end, start)) >= 0:
        return at + len(tokenizer.turn_end)
    stripped = text.rstrip()
    # Some templates end a call of a tool with another token than an answer.
    if len(stripped) > start and stripped.endswith(tuple(tokenizer.all_special_tokens) or "\0"):
        return len(stripped)
    return None


def _check_whole(record: Record, turn: Turn, start: int, tokenizer: ChatTokenizer) -> None:
    """Demand that all of an answer stands in the text that is trained, white space aside.

    Raises:
        JloraError: what the template leaves out of it, or changes.
    """
    message = record.messages[turn.index]
    seen = _squeezed(turn.text[start : turn.end])
    lost = []
    for key, value in _said(message):
        form = next((form for form in _forms(value) if form in seen), None)
        if form is None:
            lost.append((key, value))
        elif key != "tool_calls":
            seen = seen.replace(form, "", 1)  # an answer may stand in its reasoning as well
    if lost:
        key, value = lost[0]
        raise JloraError(
            f"{record.where}: the chat template {tokenizer.name} does not write turn {turn.index} "
            f"(from 0, the assistant's) whole: of its {key}\n  {_short(value)}\nnot all is in "
            f"what would be trained:\n  {_short(turn.text[turn.start : turn.end])}\n"
            f"Write the turn as this template wants it, or give another template with "
            "--chat-template FILE" + ("." if key != "reasoning_content" else ", or leave it out "
            f"with --loader.ignore {' '.join(REASONING)} (of jlora eval: --ignore).")
        )  # fmt: skip


def _said(message: Message) -> Iterator[tuple[str, str]]:
    """Yield each text of an answer that is to be trained, after its key."""
    yield "reasoning_content", message.get("reasoning_content", "")
    yield "content", message["content"]
    for call in message.get("tool_calls", ()):
        yield "tool_calls", call["function"]["name"]
        for value in _leaves(call["function"]["arguments"]):
            yield "tool_calls", value


def _leaves(value: object) -> Iterator[str]:
    """Yield the names and texts in the arguments of a call; numbers may be written in many ways."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _check_context(record: Record, turns: range, prompt: str, tokenizer: ChatTokenizer) -> None:
    """Demand that the prompt has what a record says before an answer: its turns, its tools.

    Args:
        record: the conversation.
        turns: those since the answer before.
        prompt: as the template renders it.
        tokenizer: has rendered it.

    Raises:
        JloraError: the template leaves a turn out, or the tools.
    """
    seen = _squeezed(prompt)
    for i in turns:
        message = record.messages[i]
        if message["role"] == "assistant" or any(x in seen for x in _forms(message["content"])):
            continue
        # It may be there in another form: then another text makes another prompt.
        other = message | {"content": message["content"] + " and more"}
        messages = [*record.messages[:i], other, *record.messages[i + 1 :]]
        if _same_prompt(dataclasses.replace(record, messages=messages), turns, prompt, tokenizer):
            raise JloraError(
                f"{record.where}: the chat template {tokenizer.name} leaves out turn {i} (from 0, "
                f"of role {message['role']}): {_short(message['content'])}. Say it in a turn that "
                "the template renders, or give another template with --chat-template FILE."
            )
    if not record.tools or turns.start > 0:
        return
    named = all(name in prompt for name in map(_tool_name, record.tools))
    without = dataclasses.replace(record, tools=None)
    if not named and _same_prompt(without, turns, prompt, tokenizer):
        raise JloraError(
            f"{record.where}: the chat template {tokenizer.name} does not render the record's "
            "tools. Give one that does with --chat-template FILE, or leave them out with "
            "--loader.ignore tools functions (of jlora eval: --ignore)."
        )


def _same_prompt(other: Record, turns: range, prompt: str, tokenizer: ChatTokenizer) -> bool:
    try:
        return tokenizer.render(other, turns.stop, prompt=True) == prompt
    except JloraError:
        return False


def _tool_name(tool: dict) -> str:
    """Return a tool's name, or what no prompt has."""
    function = tool.get("function", tool)
    return str(function.get("name", "\0")) if isinstance(function, dict) else "\0"


def _forms(text: str) -> tuple[str, str]:
    """Return text as it may stand in a template's: as it is, or within a JSON string."""
    return _squeezed(text), _squeezed(json.dumps(text, ensure_ascii=False)[1:-1])


def _squeezed(text: str) -> str:
    """Return text without white space, which templates add and take away."""
    return "".join(text.split())


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}")


def _rewritten(
    record: Record, index: int, before: str, whole: str, tokenizer: ChatTokenizer
) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
        min(len(before), len(whole)),
    )
    near = max(0, same - 40)
    return (
        f"{record.where}: the chat template {tokenizer.name} does not render turn {index} (from "
        "0, the assistant's) behind the prompt that the model is given when it writes it. The "
        f"prompt has\n  …{_short(before[near : same + 100])}\nwhere the whole has\n  "
        f"…{_short(whole[near : same + 100])}\nGive another template with --chat-template FILE."
    )
