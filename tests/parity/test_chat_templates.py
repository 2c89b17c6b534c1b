"""Rows and masks of chats in the model families' own templates, as TRL's wheel has them."""

import functools
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from chat_rows import CONVERSATIONS, check_rows, load, render, traits
from chat_templates import Family

from jlora.data.chat import encode
from jlora.errors import JloraError

CALLS = {"two calls", "words and a call"}
CHATML = {"end": "<|im_end|>", "eos": "<|im_end|>"}
DEEPSEEK = {
    "end": "<｜end▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "refuses": {"tools"},
    "opens": True,
    "text_arguments": True,
}
TALK = {"refuses": {"reasoning", "tools"}}  # there is nothing but what is said
# What ends an answer, the tokenizer's end of sequence where it is another, and what is refused.
FAMILIES = {
    "qwen2_5": CHATML | {"refuses": {"reasoning"}},
    "qwen3": CHATML | {"refuses": set()},
    "qwen3_instruct_2507": CHATML | {"refuses": {"reasoning"}},
    "qwen3_5_think": CHATML | {"refuses": set()},
    # Its generation prompt has an empty thought, so that nothing can be thought.
    "qwen3_5_nothink": CHATML | {"refuses": {"reasoning", "inline"}},
    "qwen3_6": CHATML | {"refuses": set()},
    "qwen3_8": CHATML | {"refuses": set()},
    "llama3": TALK | {"end": "<|eot_id|>"},
    "llama3_1": {"end": "<|eot_id|>", "refuses": {"reasoning", *CALLS}},
    "llama3_2": {"end": "<|eot_id|>", "refuses": {"reasoning", *CALLS}},
    "deepseek_r1_distill": DEEPSEEK,
    "deepseekv3": DEEPSEEK,
    "gemma": {"end": "<end_of_turn>", "refuses": {"system", "reasoning", "tools"}},
    "gemma3": TALK | {"end": "<end_of_turn>"},
    "phi3": TALK | {"end": "<|end|>"},
    "phi3_5": TALK | {"end": "<|end|>"},
    "cohere": TALK | {"end": "<|END_OF_TURN_TOKEN|>"},
    "lfm2_v2": CHATML | {"refuses": {"reasoning"}},
    "lfm2_2_5": CHATML | {"refuses": set()},
}
TAKEN = {
    frozenset(): 30,
    frozenset({"reasoning"}): 20,
    frozenset({"tools"}): 20,
    frozenset({"reasoning", *CALLS}): 18,
    frozenset({"reasoning", "inline"}): 17,
    frozenset({"reasoning", "tools"}): 15,
    frozenset({"system", "reasoning", "tools"}): 8,
}
# Where TRL's training template writes the same text, it marks the same answers, and besides
# what of the generation prompt stands before them, and what the template writes behind them: behind
# those between, behind the last. None of it has the model to write. DeepSeek's are not here, as
# TRL's text leaves out the thought that the prompt opens. The number is of answers compared.
MASKS = {
    "qwen2_5": ("\n", "\n", "\n", 44),
    "qwen3": ("", "\n", "\n", 20),
    "qwen3_instruct_2507": ("", "\n", "\n", 44),
    "qwen3_5_think": ("<think>\n", "\n", "\n", 5),
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n", "\n", "\n", 18),
    "qwen3_6": ("<think>\n", "\n", "\n", 5),
    "qwen3_8": ("<think>\n", "\n", "\n", 11),
    "llama3": ("", "", "", 30),
    "gemma": ("", "\n", "\n", 15),
    "gemma3": ("", "\n", "\n", 30),
    "phi3": ("", "\n", "\n<eos>", 24),
    "phi3_5": ("", "\n", "\n<eos>", 24),
    "cohere": ("", "", "", 30),
    "lfm2_v2": ("", "\n", "\n", 44),
}


def read(name):
    """Read a template from the installed wheel, without importing it."""
    (package,) = importlib.util.find_spec("trl").submodule_search_locations
    return (Path(package) / "chat_templates" / f"{name}.jinja").read_text()


def family(name):
    case = dict(FAMILIES[name])
    source, end = read(name), case.pop("end")
    # All that looks like a special token is one, as in the models' own tokenizers.
    found = re.findall(r"<\|[^|<>\s']+\|>|<｜[^｜]+｜>|</?think>|<(?:start|end)_of_turn>", source)
    tokens = [token for token in dict.fromkeys(found) if token != end]
    case["refuses"] = frozenset(case["refuses"])
    return Family(
        source,
        (*tokens, end),
        taken=TAKEN[case["refuses"]],
        bos="<bos>",
        **{"eos": "<eos>"} | case,
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return functools.cache(lambda name: load(family(name), tmp_path_factory.mktemp("tokenizer")))


def conversations(name, *, refused):
    cannot = family(name).refuses
    return [record for record in CONVERSATIONS if bool(traits(record) & cannot) == refused]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_answer_is_trained_behind_its_own_prompt(name, tokenizer):
    taken = conversations(name, refused=False)
    assert len(taken) == family(name).taken
    for record in taken:
        check_rows(family(name), tokenizer(name), record)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_template_cannot_render_is_refused(name, tokenizer):
    for record in conversations(name, refused=True):
        with pytest.raises(JloraError, match=r"refuses|does not write|does not render"):
            encode(record, tokenizer(name), 100_000)


def spans(tokens, trained, tokenizer):
    edges = np.flatnonzero(np.diff(np.asarray(trained, bool), prepend=False, append=False))
    return [tokenizer.decode(tokens[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_those_of_trl(name, tokenizer):
    before, between, behind, number = MASKS[name]
    compared = 0
    for record in conversations(name, refused=False):
        for row in [] if record.context else encode(record, tokenizer(name), 100_000):
            turn = re.search(r"turn (\d+)", row.where)
            theirs = render(
                family(name),
                tokenizer(name).base,
                record,
                1 + (int(turn[1]) if turn else record.trained[-1]),
                chat_template=read(f"{name}_training"),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            if theirs["input_ids"][: len(row.tokens)] != row.tokens.tolist():
                continue  # another text, or a token that spans the end of the prompt
            ours = spans(row.tokens.tolist(), row.trained, tokenizer(name))
            said = spans(theirs["input_ids"], theirs["assistant_masks"], tokenizer(name))
            # Of several rows, each trains the last answers in it.
            assert turn or len(ours) == len(said)
            wanted = [before + text + between for text in ours[:-1]] + [before + ours[-1] + behind]
            assert said[-len(ours) :] == wanted
            compared += len(ours)
    assert compared == number
