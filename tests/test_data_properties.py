"""Whatever a record says: trained is every answer that is to be, and nothing else, or a refusal.

What is to be trained is known from the making of the record: each of its texts holds a marker, a
word that no other text holds, and what the generator says of the marker is compared with what is
found in the trained tokens. Nothing here asks jlora what a record means.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from jlora.data.chat import encode_all, load_tokenizer
from jlora.data.source import load_records
from jlora.errors import JloraError
from tests.test_data_chat import write_tokenizer
from tests.test_data_records import CALLS, THINKS

HEAD = "<|im_start|>assistant\n"
# As ChatML with all that a turn may have; it only appends.
APPENDS = CALLS.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}",
    "<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{{ m.content }}",
)
# As Qwen 3: thoughts of earlier questions are left out.
STRIPS = THINKS.replace(
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}",
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}",
)
# As DeepSeek R1: the prompt opens the thought, and history has none.
OPENS = CALLS.replace(HEAD, HEAD + "<think>\n").replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"
)
# As Mistral: the system message stands in the last user turn. It knows no tools, nor thoughts.
MOVES = (
    "{% if messages[0].role == 'system' %}{% set rule = messages[0].content %}"
    "{% set turns = messages[1:] %}"
    "{% else %}{% set rule = '' %}{% set turns = messages %}{% endif %}"
    "<|bos|>{% for m in turns %}{% if m.role == 'user' %}[INST]"
    "{% if turns[loop.index:] | selectattr('role', 'eq', 'user') | list | length == 0 %}"
    "{{ rule }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|eos|>"
    "{% else %}{{ raise_exception('no turns of role ' + m.role) }}{% endif %}{% endfor %}"
)
TEMPLATES = {"appends": APPENDS, "strips": STRIPS, "opens": OPENS, "moves": MOVES}

HARMLESS = {"id": 7, "source": "a book", "score": 0.5, "metadata": {"by": "hand"}}
UNKNOWN = ["chosen", "rejected", "prefix", "mask", "labels"]


@dataclass
class Made:
    """A record, and what its maker knows of it."""

    row: dict[str, Any] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    context: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    harmless: int = 0


class Marks:
    """Gives each text a word of its own, of a length that no other is part of."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        return f"w{self.count:04d}w"


@st.composite
def _extras(draw: st.DrawFn, made: Made) -> dict[str, Any]:
    """Keys that belong to no shape."""
    extra = {}
    if draw(st.integers(0, 4)) == 4:
        key = draw(st.sampled_from(sorted(HARMLESS)))
        extra[key] = HARMLESS[key]
    if draw(st.integers(0, 24)) == 24:
        key = draw(st.sampled_from(UNKNOWN))
        extra[key] = draw(st.sampled_from([True, 0, "x", [1], {"a": None}]))
    if draw(st.integers(0, 9)) == 9:
        extra[draw(st.sampled_from(["nothing", "void"]))] = draw(st.sampled_from([None, "", []]))
    return extra


@st.composite
def _content(draw: st.DrawFn, made: Made, marks: Marks, into: set[str]) -> Any:
    texts = []
    for _ in range(draw(st.integers(1, 2))):
        mark = marks()
        into.add(mark)
        texts.append(draw(st.sampled_from(["", " ", "A\n", "ü🙂 ", "</p>"])) + mark)
    if draw(st.booleans()):
        return " ".join(texts)
    return [{"type": "text", "text": text, **draw(_extras(made))} for text in texts]


@st.composite
def _answer(draw: st.DrawFn, made: Made, marks: Marks, *, context: bool) -> dict[str, Any]:
    turn = draw(_extras(made))
    trained = not context
    flag = draw(st.sampled_from(["train", "trainable", "training", "loss_mask", "weight"]))
    said = draw(st.sampled_from([None, None, None, 0, False] + ([] if context else [1, True])))
    if said is not None:
        turn[flag] = said
        trained = trained and bool(said)
    into = made.trained if trained else made.context
    turn["content"] = draw(_content(made, marks, into))
    if draw(st.integers(0, 3)) == 3:
        mark = marks()
        into.add(mark)
        turn[draw(st.sampled_from(["reasoning_content", "reasoning", "thinking"]))] = mark
    if draw(st.integers(0, 5)) == 5:
        name, value = marks(), marks()
        into |= {name, value}
        arguments: Any = {"town": value}
        if draw(st.booleans()):
            arguments = json.dumps(arguments)
        call = {"name": name, "arguments": arguments}
        if draw(st.booleans()):
            turn["function_call"] = call
        else:
            turn["tool_calls"] = [{"type": "function", "function": call}]
    return turn


@st.composite
def _turns(draw: st.DrawFn, made: Made, marks: Marks, *, context: bool, names: tuple) -> list:
    """Questions and answers, and where it is drawn a result of a tool and another answer."""
    role, content, user, assistant, tool = names

    def named(turn: dict[str, Any], who: str) -> dict[str, Any]:
        return {(content if k == "content" else k): v for k, v in turn.items()} | {role: who}

    turns = []
    for _ in range(draw(st.integers(1, 3))):
        asked = {"content": draw(_content(made, marks, made.context)), **draw(_extras(made))}
        turns.append(named(asked, user))
        turns.append(named(draw(_answer(made, marks, context=context)), assistant))
        if draw(st.integers(0, 7)) == 7:
            turns.append(named({"content": draw(_content(made, marks, made.context))}, tool))
            turns.append(named(draw(_answer(made, marks, context=context)), assistant))
    return turns


@st.composite
def records(draw: st.DrawFn, marks: Marks) -> Made:
    made = Made()
    openai = ("role", "content", "user", "assistant", draw(st.sampled_from(["tool", "function"])))
    sharegpt = ("from", "value", "human", "gpt", "observation")
    shape = draw(st.sampled_from(["messages", "conversations", "lists", "pair", "alpaca"]))

    def text(into: set[str]) -> str:
        mark = marks()
        into.add(mark)
        return mark

    if shape in ("messages", "conversations"):
        names = openai if shape == "messages" else sharegpt
        made.row[shape] = draw(_turns(made, marks, context=False, names=names))
        if draw(st.integers(0, 3)) == 3:
            first = {names[0]: "system", names[1]: text(made.context)}
            made.row[shape].insert(0, first)
    elif shape == "lists":
        made.row["prompt"] = draw(_turns(made, marks, context=True, names=openai))
        made.row["prompt"].append({"role": "user", "content": text(made.context)})
        rest = draw(_turns(made, marks, context=False, names=openai))
        made.row["completion"] = rest[1:]  # it begins with an answer
    elif shape == "pair":
        made.row |= {"prompt": text(made.context), "completion": text(made.trained)}
    else:
        made.row |= {"instruction": text(made.context), "output": text(made.trained)}
        if draw(st.booleans()):
            made.row["input"] = text(made.context)
        if draw(st.booleans()):
            pairs = range(draw(st.integers(0, 2)))
            made.row["history"] = [[text(made.context), text(made.trained)] for _ in pairs]
    turns = made.row.get(shape, [{}])
    if draw(st.integers(0, 3)) == 3 and "system" not in turns[0].values():
        made.row["system"] = text(made.context)
    if draw(st.integers(0, 5)) == 5:
        name = text(made.context)
        made.row["tools"] = [{"type": "function", "function": {"name": name}}]
    made.row |= draw(_extras(made))
    made.unknown = {key for key in UNKNOWN if _count(made.row, {key})}
    made.harmless = _count(made.row, set(HARMLESS))
    return made


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        name: load_tokenizer(write_tokenizer(tmp_path_factory.mktemp(name), template))
        for name, template in TEMPLATES.items()
    }


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_answer_is_trained_and_nothing_else(
    name: str, data: st.DataObject, tokenizers: dict, tmp_path_factory: pytest.TempPathFactory
) -> None:
    marks = Marks()
    made = [data.draw(records(marks)) for _ in range(data.draw(st.integers(1, 2)))]
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text("".join(json.dumps(each.row) + "\n" for each in made))
    unknown = set().union(*(each.unknown for each in made))
    if unknown:
        with pytest.raises(JloraError) as caught:
            load_records(path)
        assert all(repr(key) in str(caught.value) for key in unknown)
        event("an unknown key")
    loaded = load_records(path, ignore=unknown)
    wanted = set().union(*(each.trained for each in made))
    assume(wanted)
    try:
        examples, report = encode_all(loaded, tokenizers[name], 1_000_000)
    except JloraError as error:
        event("refused")
        _assert_names_what_is_wrong(str(error), name, made)
        return
    event("trained")
    texts = [tokenizers[name].decode(e.tokens[e.trained].tolist()) for e in examples]
    found = Counter(mark for text in texts for mark in _marks(text))
    assert found == Counter(dict.fromkeys(wanted, 1))
    seen = {m for e in examples for m in _marks(tokenizers[name].decode(e.tokens.tolist()))}
    assert seen - wanted <= set().union(*(each.context for each in made))
    assert sum(report.harmless.values()) == sum(each.harmless for each in made)
    assert sum(report.left_out.values()) == sum(_count(each.row, unknown) for each in made)


def _marks(text: str) -> list[str]:
    return re.findall(r"w\d{4}w", text)


def _count(value: object, keys: set[str]) -> int:
    if isinstance(value, dict):
        return sum((k in keys) + _count(v, keys) for k, v in value.items())
    return sum(_count(v, keys) for v in value) if isinstance(value, list) else 0


def _assert_names_what_is_wrong(said: str, name: str, made: list[Made]) -> None:
    """A refusal must be for what the template cannot do, and say where."""
    line = int(said.removeprefix("train.jsonl:").partition(":")[0])
    row = json.dumps(made[line - 1].row)
    reasons = {"tools": '"tools"' in row, "tool_calls": "_call" in row, "no turns of role": True,
               "reasoning_content": "reason" in row or "thinking" in row,
               "turn ": '"role": "system"' in row or '"system"' in row}  # fmt: skip
    allowed: tuple[str, ...] = {
        "appends": (),  # it writes all that there is
        "strips": ("tools",),
        "opens": (),
        "moves": ("tools", "tool_calls", "reasoning_content", "no turns of role"),
    }[name]
    assert any(reasons[why] and why in said for why in allowed), said
