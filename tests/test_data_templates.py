"""Rows of chats in the templates of the model families, against what transformers renders."""

import functools

import pytest
from chat_rows import CONVERSATIONS, check_rows, load, traits
from chat_templates import FAMILIES

from jlora.data.chat import encode
from jlora.errors import JloraError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return functools.cache(lambda name: load(FAMILIES[name], tmp_path_factory.mktemp("tokenizer")))


def conversations(name, *, refused):
    cannot = FAMILIES[name].refuses
    return [record for record in CONVERSATIONS if bool(traits(record) & cannot) == refused]


def test_there_are_conversations_of_all_kinds():
    assert len(CONVERSATIONS) == 30
    assert sum(len(record.trained) for record in CONVERSATIONS) == 103
    for trait, count in {
        "system": 17,
        "tools": 10,
        "reasoning": 10,
        "inline": 3,
        "two calls": 1,
        "words and a call": 1,
    }.items():
        assert sum(trait in traits(record) for record in CONVERSATIONS) == count, trait
    assert sum(bool(record.context) for record in CONVERSATIONS) == 10


@pytest.mark.parametrize("name", FAMILIES)
def test_each_answer_is_trained_behind_its_own_prompt(name, tokenizer):
    taken = conversations(name, refused=False)
    assert len(taken) == FAMILIES[name].taken
    within = sum(check_rows(FAMILIES[name], tokenizer(name), record) for record in taken)
    assert (within > 0) == (name in {"qwen 2.5", "deepseek r1 distill", "smollm2"})


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_template_cannot_render_is_refused(name, tokenizer):
    refused = conversations(name, refused=True)
    assert len(refused) == 30 - FAMILIES[name].taken
    for record in refused:
        with pytest.raises(JloraError, match=r"refuses|does not write|does not render"):
            encode(record, tokenizer(name), 100_000)
