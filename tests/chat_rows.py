"""Conversations, and what the rows must be that a chat template makes of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from chat_templates import Family
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jlora.data.chat import ChatTokenizer, encode, load_tokenizer
from jlora.data.records import Record


def load(family: Family, directory: Path) -> ChatTokenizer:
    """Write a tokenizer of bytes with the family's special tokens and template, and load it.

    Two line breaks are one token, which may span the end of a prompt.
    """
    from transformers import PreTrainedTokenizerFast

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*bytes_, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        additional_special_tokens=list(family.tokens),
        chat_template=family.template,
    ).save_pretrained(directory)
    return load_tokenizer(directory)


QUESTIONS = [
    "How far is the moon?",
    "And the sun?\n\nIn kilometres, please.",
    "How far is the moon?",  # once more: what is searched for is found twice
    'Say "naïve" in JSON: {"a": [1, "ü"]}',
    "  spaces around, and 🙂  ",
]
ANSWERS = [
    "Near.",
    "Far:\n\n1. very\n2. very far\n",
    "\n\nAfter two line breaks.",
    '{"say": "naïve", "tabs": "\t"}',
    "   Indented 👩‍👩‍👧, with a tail.  ",
]
THOUGHTS = ["It is 384,400 km.", "\nA line\n\nand another.\n", "So?", "JSON, then.", "Ünïcode…"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}.",
            "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
        },
    }
    for name in ("measure", "convert")
]


def conversation(
    turns: int,
    *,
    rule: bool = False,
    thoughts: Callable[[int], bool] = lambda k: False,
    inline: bool = False,
    calls: tuple[int, ...] = (),
    words: str = "",
    context: tuple[int, ...] = (),
    tools: bool = False,
) -> Record:
    """Return a record.

    Args:
        turns: questions.
        rule: a system message stands before them.
        thoughts: says which answers, counted from 0, have reasoning.
        inline: the reasoning is in the content.
        calls: how many tools are called for each question, from the first.
        words: said with each call.
        context: which answers, counted from 0, are not trained.
        tools: there are tools.
    """
    messages: list[dict[str, Any]] = []
    answers: list[int] = []
    if rule:
        messages.append({"role": "system", "content": "Answer in one line.\nBe kind. "})

    def answer(**message: Any) -> None:
        k = len(answers)
        answers.append(len(messages))
        if thoughts(k) and inline:
            thought = THOUGHTS[k % 5].strip("\n")
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content'].lstrip()}"
        elif thoughts(k):
            message["reasoning_content"] = THOUGHTS[k % 5]
        messages.append({"role": "assistant", **message})

    for n in range(turns):
        messages.append({"role": "user", "content": QUESTIONS[n]})
        if number := (calls + (0,) * turns)[n]:
            made = [
                {
                    "type": "function",
                    "id": f"call{n:04}{c}",
                    "function": {
                        "name": TOOLS[c]["function"]["name"],
                        "arguments": {"what": f"naïve {n}", "times": c, "deep": {"a": ["x\ny"]}},
                    },
                }
                for c in range(number)
            ]
            answer(content=words, tool_calls=made)
            messages.extend(
                {
                    "role": "tool",
                    "name": call["function"]["name"],
                    "tool_call_id": call["id"],
                    "content": f'{{"result": {n}}}',
                }
                for call in made
            )
        answer(content=ANSWERS[n])
    return Record(
        messages,
        "train.jsonl:7",
        context=frozenset(answers[k] for k in context),
        tools=TOOLS if tools else None,
    )


def _conversations() -> Iterator[Record]:
    """Yield six for each number of questions from 1 to 5."""
    for n in range(1, 6):
        yield conversation(n)
        yield conversation(n, rule=True)
        # Reasoning: of all answers, or of some.
        yield conversation(n, rule=n % 2 == 0, thoughts=lambda k, n=n: k % 2 == 0 or n == 4)
        # An untrained answer, the first or one between; of one answer alone, nothing is trained.
        # Of some, reasoning in the content.
        yield conversation(
            n, rule=n % 2 == 0, context=(n // 2,), thoughts=lambda k, n=n: n > 2, inline=True
        )
        # Tools: called for one question or several, two at once, with words, or never.
        yield conversation(
            n,
            rule=n % 2 == 1,
            tools=True,
            calls=[(1,), (1, 1), (0, 2, 1), (1, 0, 1, 1), ()][n - 1],
            words="I look it up." if n == 4 else "",
        )
        yield conversation(
            n, rule=True, tools=True, calls=(1,) * n, context=(n,), thoughts=lambda k: k != 1
        )


CONVERSATIONS = list(_conversations())


def traits(record: Record) -> set[str]:
    """Return what a template may refuse of a record, by what stands in it."""
    has = {
        "system": record.messages[0]["role"] == "system",
        "tools": bool(record.tools),
        "reasoning": any("reasoning_content" in record.messages[i] for i in record.trained),
        "inline": any("</think>" in record.messages[i]["content"] for i in record.trained),
    }
    for message in record.messages:
        made = message.get("tool_calls", ())
        has["two calls"] = has.get("two calls", False) or len(made) > 1
        spoken = bool(made and message["content"])
        has["words and a call"] = has.get("words and a call", False) or spoken
    return {trait for trait, is_there in has.items() if is_there}


def render(family: Family, base: Any, record: Record, turns: int, **options: Any) -> Any:
    """Return what transformers makes of the first turns, as ids or text."""
    messages = record.messages[:turns]
    if family.text_arguments:
        messages = json.loads(json.dumps(messages))
        for message in messages:
            for call in message.get("tool_calls", ()):
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                call["function"]["arguments"] = arguments
    return base.apply_chat_template(
        messages, tools=record.tools, **{"return_dict": False, **options}
    )


def expected(family: Family, base: Any, record: Record, index: int) -> tuple[str, str]:
    """Return the prompt of an answer, and what is to be written behind it, both text."""
    prompt = render(family, base, record, index, tokenize=False, add_generation_prompt=True)
    whole = render(family, base, record, index + 1, tokenize=False)
    end = family.tokens[-1]
    if family.opens:
        message = record.messages[index]
        if "</think>" in message["content"]:
            return prompt, message["content"].removeprefix("<think>\n") + end
        thought = message.get("reasoning_content", "").strip("\n")
        gap = "" if message["content"][:1].isspace() else "\n\n"
        return prompt, f"{thought}\n</think>{gap}{message['content']}{end}"
    whole = whole[: whole.rindex(end) + len(end)]
    if not whole.startswith(prompt) and family.behind:
        return prompt, whole[max(whole.rfind(x) + len(x) for x in family.behind if x in whole) :]
    assert whole.startswith(prompt)
    return prompt, whole[len(prompt) :]


def check_rows(family: Family, tokenizer: ChatTokenizer, record: Record) -> int:
    """Demand that each answer to be trained is trained once, behind exactly its own prompt.

    Returns:
        how many of the answers begin within a token of the whole text.
    """
    base = tokenizer.base
    spans = [
        (row.tokens, int(start), int(end))
        for row in encode(record, tokenizer, 100_000)
        for start, end in np.flatnonzero(np.diff(row.trained, prepend=False, append=False)).reshape(
            -1, 2
        )
    ]
    assert len(spans) == len(record.trained)
    within = 0
    for (tokens, start, end), index in zip(spans, record.trained, strict=True):
        prompt, answer = expected(family, base, record, index)
        given = render(family, base, record, index, tokenize=True, add_generation_prompt=True)
        assert tokens[:start].tolist() == given
        assert tokenizer.decode(tokens[:start].tolist()) == prompt
        assert tokenizer.decode(tokens[start:end].tolist()) == answer
        ids = base(prompt + answer, add_special_tokens=False)["input_ids"]
        if ids[:start] == given:
            assert tokens[:end].tolist() == ids
        else:
            within += 1
    return within
