"""What records say: every key has its meaning, changes nothing, or is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from jlora.data.chat import EncodeReport, encode, encode_all, load_tokenizer, show_mask
from jlora.data.keys import HARMLESS
from jlora.data.records import Record
from jlora.data.source import load_records
from jlora.errors import JloraError
from tests.test_data_chat import CHATML, write_tokenizer

# As Qwen 3: earlier thoughts are left out, and the last answer always has a block for them.
THINKS = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As templates that call tools: the schemas first, and calls and their results as JSON.
CALLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = {"role": "user", "content": "Which river runs through Graz?"}
SAID = {"role": "assistant", "content": "The Mur."}
PAIR = [ASKED, SAID]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"name": "weather", "arguments": {"town": "Graz"}}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    templates = {"plain": CHATML, "thinks": THINKS, "calls": CALLS}
    return {
        name: load_tokenizer(write_tokenizer(tmp_path_factory.mktemp(name), template))
        for name, template in templates.items()
    }


def read(tmp_path: Path, *rows: object, ignore: tuple[str, ...] = ()) -> list[Record]:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records(path, ignore=ignore)


def refusal(tmp_path: Path, *rows: object, ignore: tuple[str, ...] = ()) -> str:
    with pytest.raises(JloraError) as caught:
        read(tmp_path, *rows, ignore=ignore)
    return str(caught.value)


def chat(*turns: dict, **beside: object) -> dict:
    return {"messages": list(turns), **beside}


def shown(record: Record, tokenizer: Any) -> list[str]:
    return [show_mask(row, tokenizer) for row in encode(record, tokenizer, 10_000)]


class TestReasoning:
    @pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
    def test_it_is_trained_as_the_template_writes_it(
        self, key: str, tokenizers: dict, tmp_path: Path
    ) -> None:
        (record,) = read(tmp_path, chat(ASKED, SAID | {key: "A town in Styria."}))
        (row,) = shown(record, tokenizers["thinks"])
        assert row.endswith(
            "assistant\n[[<think>\nA town in Styria.\n</think>\n\nThe Mur.<|im_end|>]]\n"
        )

    def test_each_answer_has_its_own(self, tokenizers: dict, tmp_path: Path) -> None:
        (record,) = read(
            tmp_path,
            chat(
                ASKED, SAID | {"reasoning": "first thought"},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes.", "thinking": "second thought"},
            ),
        )  # fmt: skip
        first, second = shown(record, tokenizers["thinks"])
        assert "[[<think>\nfirst thought\n</think>\n\nThe Mur.<|im_end|>]]" in first
        assert "[[<think>\nsecond thought\n</think>\n\nYes.<|im_end|>]]" in second
        assert "first thought" not in second
        assert second.count("[[") == 1

    def test_a_template_that_drops_it_is_refused(self, tokenizers: dict, tmp_path: Path) -> None:
        row = chat(ASKED, SAID | {"thinking": "A town in Styria."})
        (record,) = read(tmp_path, row)
        with pytest.raises(JloraError, match=r"(?s)train.jsonl:1: .*A town in Styria") as caught:
            encode(record, tokenizers["plain"], 1000)
        assert "--loader.ignore" in str(caught.value)

    def test_the_way_out_that_the_refusal_names_is_one(
        self, tokenizers: dict, tmp_path: Path
    ) -> None:
        row = chat(ASKED, SAID | {"thinking": "A town in Styria."})
        with pytest.raises(JloraError) as caught:
            encode(read(tmp_path, row)[0], tokenizers["plain"], 1000)
        keys = str(caught.value).partition("--loader.ignore ")[2].partition(" (")[0].split()
        (record,) = read(tmp_path, row, ignore=tuple(keys))
        assert "[[The Mur.<|im_end|>]]" in shown(record, tokenizers["plain"])[0]

    def test_two_that_differ_and_one_of_a_user(self, tmp_path: Path) -> None:
        turn = SAID | {"reasoning": "this", "thinking": "that"}
        assert "messages[1] has reasoning and thinking, which differ" in refusal(
            tmp_path, chat(ASKED, turn)
        )
        assert "messages[0], of role user, has reasoning_content" in refusal(
            tmp_path, chat(ASKED | {"reasoning": "this"}, SAID)
        )


class TestSystem:
    @pytest.mark.parametrize(
        "row",
        [
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            {"instruction": "Hi", "input": "", "output": "Ho"},
            {"prompt": "Hi", "completion": "Ho"},
            chat({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}),
        ],
        ids=["sharegpt", "alpaca", "pair", "messages"],
    )
    def test_it_comes_first(self, row: dict, tokenizers: dict, tmp_path: Path) -> None:
        (record,) = read(tmp_path, row | {"system": "Speak in verse."})
        assert shown(record, tokenizers["plain"]) == [
            "<|im_start|>system\nSpeak in verse.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n[[Ho<|im_end|>]]\n"
        ]

    def test_context_is_the_same_turns_behind_it(self, tmp_path: Path) -> None:
        row = chat(ASKED, SAID | {"train": False}, ASKED, SAID, system="Be brief.")
        assert read(tmp_path, row)[0].trained == [4]

    def test_two_of_them_must_agree(self, tmp_path: Path) -> None:
        first = {"role": "system", "content": "Be brief."}
        (record,) = read(tmp_path, chat(first, *PAIR, system="Be brief."))
        assert len(record.messages) == 3
        said = refusal(tmp_path, chat(first, *PAIR, system="Be long."))
        assert "Be brief." in said
        assert "Be long." in said

    def test_another_type_is_refused(self, tmp_path: Path) -> None:
        for value in (7, True, {"content": "Be brief."}, ["Be brief."]):
            assert "'system'" in refusal(tmp_path, chat(*PAIR, system=value))

    @pytest.mark.parametrize("where", [0, 2])
    def test_developer_is_openais_word_for_it(self, where: int, tmp_path: Path) -> None:
        turns = [ASKED, SAID, ASKED, SAID]
        turns.insert(where, {"role": "developer", "content": "Be brief."})
        (record,) = read(tmp_path, chat(*turns))
        assert record.messages[where] == {"role": "system", "content": "Be brief."}


class TestHistory:
    def test_its_pairs_come_first_and_are_trained(self, tokenizers: dict, tmp_path: Path) -> None:
        (record,) = read(
            tmp_path,
            {"instruction": "And then?", "output": "Sleep.", "system": "Be brief.",
             "history": [["What now?", "Eat."], ["What else?", "Drink."]]},
        )  # fmt: skip
        (row,) = shown(record, tokenizers["plain"])
        assert [part.partition("<|im_end|>]]")[0] for part in row.split("[[")[1:]] == [
            "Eat.", "Drink.", "Sleep.",
        ]  # fmt: skip
        assert row.index("What now?") < row.index("What else?") < row.index("And then?")

    @pytest.mark.parametrize("empty", [[], None])
    def test_none_is_none(self, empty: object, tmp_path: Path) -> None:
        row = {"instruction": "Now?", "output": "No.", "history": empty}
        assert len(read(tmp_path, row)[0].messages) == 2

    @pytest.mark.parametrize(
        "bad",
        [[["only one"]], [["a", "b", "c"]], [["a", None]], ["ab"], "ab", {"a": "b"}, [["a", 7]]],
    )
    def test_another_form_is_refused(self, bad: object, tmp_path: Path) -> None:
        said = refusal(tmp_path, {"instruction": "Now?", "output": "No.", "history": bad})
        assert "train.jsonl:1: " in said
        assert "history" in said

    def test_the_other_shapes_have_none(self, tmp_path: Path) -> None:
        said = refusal(tmp_path, chat(*PAIR, history=[["a", "b"]]))
        assert "'history': 1 times" in said


class TestFlags:
    @pytest.mark.parametrize("flag", ["train", "trainable", "training", "loss_mask", "weight"])
    @pytest.mark.parametrize(
        ("value", "trained"), [(False, [3]), (0, [3]), (0.0, [3]), (True, [1, 3]), (1, [1, 3]),
                               (1.0, [1, 3]), (None, [1, 3])],
    )  # fmt: skip
    def test_each_name_and_value(
        self, flag: str, value: object, trained: list[int], tmp_path: Path
    ) -> None:
        (record,) = read(tmp_path, chat(ASKED, SAID | {flag: value}, ASKED, SAID))
        assert record.trained == trained

    def test_an_untrained_turn_is_context(self, tokenizers: dict, tmp_path: Path) -> None:
        wrong = {"role": "assistant", "content": "The Inn.", "train": False}
        (record,) = read(tmp_path, chat(ASKED, wrong, {"role": "user", "content": "No!"}, SAID))
        (row,) = shown(record, tokenizers["plain"])
        assert row.endswith(
            "assistant\nThe Inn.<|im_end|>\n<|im_start|>user\nNo!<|im_end|>\n"
            "<|im_start|>assistant\n[[The Mur.<|im_end|>]]\n"
        )

    def test_the_untrained_last_turn_is_in_no_row(self, tokenizers: dict, tmp_path: Path) -> None:
        last = {"role": "assistant", "content": "The Inn.", "weight": 0}
        (record,) = read(tmp_path, chat(*PAIR, {"role": "user", "content": "No!"}, last))
        (row,) = shown(record, tokenizers["plain"])
        assert row.endswith("[[The Mur.<|im_end|>]]\n")

    @pytest.mark.parametrize("value", [0.5, 2, -1, "false", "0", [], float("nan")])
    def test_a_value_between_is_refused(self, value: object, tmp_path: Path) -> None:
        assert "messages[1] has weight" in refusal(tmp_path, chat(ASKED, SAID | {"weight": value}))

    def test_contradictions_and_trained_users(self, tmp_path: Path) -> None:
        said = refusal(
            tmp_path,
            chat(ASKED, SAID | {"train": True, "weight": 0}),
            chat(ASKED | {"train": True}, SAID),
        )
        assert "train.jsonl:1: messages[1] contradicts itself" in said
        assert "train.jsonl:2: messages[0] has train True, and is a turn of role user" in said
        assert read(tmp_path, chat(ASKED | {"weight": 0}, SAID))[0].trained == [1]

    def test_a_greeting_that_is_context(self, tokenizers: dict, tmp_path: Path) -> None:
        greeting = {"role": "assistant", "content": "Welcome!"}
        assert "nothing before it to answer" in refusal(tmp_path, chat(greeting, *PAIR))
        (record,) = read(tmp_path, chat(greeting | {"train": False}, *PAIR))
        (row,) = shown(record, tokenizers["plain"])
        assert "assistant\nWelcome!<|im_end|>" in row
        assert row.count("[[") == 1

    def test_a_record_with_nothing_to_train_is_counted(
        self, tokenizers: dict, tmp_path: Path
    ) -> None:
        untrained = chat(ASKED, SAID | {"train": False})
        _, report = encode_all(read(tmp_path, untrained, chat(*PAIR)), tokenizers["plain"], 1000)
        assert (report.nothing, report.rows) == (1, 1)
        with pytest.raises(JloraError, match="none of the 1 records has an answer to be trained"):
            encode_all(read(tmp_path, untrained), tokenizers["plain"], 1000)


class TestParts:
    @pytest.mark.parametrize(
        "parts",
        [
            [{"type": "text", "text": "The Mur."}],
            [{"type": "text", "text": "The "}, {"type": "text", "text": "Mur."}],
            [{"text": "The Mur.", "type": None, "image_url": None}],
        ],
    )
    def test_texts_are_joined(self, parts: list, tmp_path: Path) -> None:
        (record,) = read(tmp_path, chat(ASKED, {"role": "assistant", "content": parts}))
        assert record.messages[1]["content"] == "The Mur."

    @pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "thinking"])
    def test_another_part_is_refused_by_its_name(self, kind: str, tmp_path: Path) -> None:
        parts = [{"type": "text", "text": "See"}, {"type": kind, kind: "x"}]
        said = refusal(tmp_path, chat({"role": "user", "content": parts}, SAID))
        assert f"messages[0] has a content that is partly of type '{kind}'" in said

    @pytest.mark.parametrize(
        "bad", [[{"type": "text"}], [{"text": 7}], ["text"], [["text"]], [None], 7, True, {}]
    )
    def test_no_text_is_refused(self, bad: object, tmp_path: Path) -> None:
        said = refusal(tmp_path, chat({"role": "user", "content": bad}, SAID))
        assert "train.jsonl:1: " in said

    def test_unknown_keys_of_a_part(self, tmp_path: Path) -> None:
        part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
        row = chat({"role": "user", "content": [part]}, SAID)
        assert "'cache_control' of a content part: 1 times" in refusal(tmp_path, row)
        assert read(tmp_path, row, ignore=("cache_control",))[0].messages[0]["content"] == "Hi"


class TestConversationalPrompt:
    def test_the_completion_is_trained_alone(self, tokenizers: dict, tmp_path: Path) -> None:
        shot = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "two"}]
        (record,) = read(tmp_path, {"prompt": [*shot, ASKED], "completion": [SAID]})
        (row,) = shown(record, tokenizers["plain"])
        assert row.count("[[") == 1
        assert "[[The Mur.<|im_end|>]]" in row
        assert "assistant\ntwo<|im_end|>" in row

    def test_a_completion_of_several_turns(self, tmp_path: Path) -> None:
        (record,) = read(tmp_path, {"prompt": [ASKED], "completion": [SAID, ASKED, SAID]})
        assert record.trained == [1, 3]

    def test_a_flag_against_it_is_refused(self, tmp_path: Path) -> None:
        row = {"prompt": [*[ASKED, SAID | {"train": True}], ASKED], "completion": [SAID]}
        assert "prompt[1] has train True, and is a turn of the prompt" in refusal(tmp_path, row)

    @pytest.mark.parametrize(
        ("prompt", "completion"), [("a", [SAID]), ([ASKED], "b"), ([ASKED], 7), ([], [SAID]),
                                   ([ASKED], []), ([ASKED], [ASKED])],
    )  # fmt: skip
    def test_halves_are_refused(self, prompt: object, completion: object, tmp_path: Path) -> None:
        said = refusal(tmp_path, {"prompt": prompt, "completion": completion})
        assert "train.jsonl:1: " in said


class TestTools:
    @pytest.mark.parametrize(
        "turn",
        [
            {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": CALL}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "assistant", "tool_calls": json.dumps([CALL])},
            {"role": "assistant", "function_call": CALL},
            {"role": "assistant",
             "function_call": {"name": "weather", "arguments": '{"town": "Graz"}'}},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "function_call", "value": CALL},
        ],
    )  # fmt: skip
    def test_a_call_is_trained_in_each_form(
        self, turn: dict, tokenizers: dict, tmp_path: Path
    ) -> None:
        (record,) = read(tmp_path, chat(ASKED, turn, tools=[WEATHER]))
        (row,) = shown(record, tokenizers["calls"])
        assert row.startswith('<|im_start|>system\n[{"type": "function"')
        assert row.endswith(
            'assistant\n[[<call>{"name": "weather", "arguments": {"town": "Graz"}}</call>'
            "<|im_end|>]]\n"
        )

    @pytest.mark.parametrize("role", ["tool", "function", "observation"])
    def test_a_result_is_context(self, role: str, tokenizers: dict, tmp_path: Path) -> None:
        result = {"role": role, "content": "rain", "name": "weather", "tool_call_id": "1"}
        calls = {"role": "assistant", "tool_calls": [CALL]}
        (record,) = read(tmp_path, chat(ASKED, calls, result, SAID, tools=[WEATHER]))
        (row,) = shown(record, tokenizers["calls"])
        assert "<|im_start|>tool\nrain<|im_end|>\n" in row
        assert row.count("[[") == 2
        assert record.messages[2] == {**result, "role": "tool"}

    @pytest.mark.parametrize(
        "beside",
        [
            {"tools": [WEATHER]},
            {"tools": json.dumps([WEATHER])},
            {"functions": [WEATHER["function"]]},
            {"functions": json.dumps([WEATHER["function"]])},
        ],
    )
    def test_schemas_in_each_form(self, beside: dict, tmp_path: Path) -> None:
        assert read(tmp_path, chat(*PAIR, **beside))[0].tools == [WEATHER]

    @pytest.mark.parametrize(
        ("beside", "said"),
        [
            ({"tools": "{"}, "'tools' is no JSON"),
            ({"tools": [7]}, "'tools' must be a list of objects"),
            ({"tools": 7}, "'tools' must be a list of objects"),
            ({"tools": [WEATHER], "functions": [WEATHER]}, "both 'tools' and 'functions'"),
        ],
    )
    def test_bad_schemas(self, beside: dict, said: str, tmp_path: Path) -> None:
        assert said in refusal(tmp_path, chat(*PAIR, **beside))

    @pytest.mark.parametrize(
        "calls", [7, [7], [{}], [{"function": 7}], [{"function": {"name": 7}}], "{", '"x"',
                  [{"name": "f", "arguments": "["}], [{"name": "f", "arguments": [1]}],
                  [{"name": "f", "arguments": 7}]],
    )  # fmt: skip
    def test_bad_calls(self, calls: object, tmp_path: Path) -> None:
        said = refusal(tmp_path, chat(ASKED, {"role": "assistant", "tool_calls": calls}))
        assert "train.jsonl:1: messages[1]" in said

    def test_templates_without_them_are_refused(self, tokenizers: dict, tmp_path: Path) -> None:
        (record,) = read(tmp_path, chat(*PAIR, tools=[WEATHER]))
        with pytest.raises(JloraError, match=r"does not render the record's tools"):
            encode(record, tokenizers["plain"], 1000)
        (record,) = read(tmp_path, chat(ASKED, {"role": "assistant", "tool_calls": [CALL]}))
        with pytest.raises(JloraError, match=r"of its tool_calls"):
            encode(record, tokenizers["plain"], 1000)
        (record,) = read(
            tmp_path, chat(*PAIR, functions=[WEATHER["function"]]), ignore=("tools", "functions")
        )
        assert "[[The Mur.<|im_end|>]]" in shown(record, tokenizers["plain"])[0]


class TestOptions:
    def test_they_reach_the_template(self, tmp_path: Path) -> None:
        template = CHATML.replace("Be kind.", "{{ mood }}")
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", template))
        rows = [chat(*PAIR, chat_template_kwargs={"mood": m}) for m in ("Sing.", "Hum.")]
        texts = [shown(record, tokenizer)[0] for record in read(tmp_path, *rows)]
        assert ["Sing." in texts[0], "Hum." in texts[1]] == [True, True]

    @pytest.mark.parametrize("bad", ["x", 7, [["a", 1]], True])
    def test_another_type_is_refused(self, bad: object, tmp_path: Path) -> None:
        said = refusal(tmp_path, chat(*PAIR, chat_template_kwargs=bad))
        assert "'chat_template_kwargs' must be an object" in said


class TestKeys:
    def test_an_unknown_one_is_named_once_with_its_count(self, tmp_path: Path) -> None:
        rows = [chat(*PAIR, chosen="x"), chat(*PAIR), chat(ASKED, SAID | {"prefix": True})]
        said = refusal(tmp_path, *rows, *rows)
        assert "'chosen': 2 times, first in train.jsonl:1" in said
        assert "'prefix' of a turn: 2 times, first in train.jsonl:3" in said
        assert said.count("chosen") == 2  # the second is in the way to leave it out
        assert "--loader.ignore chosen prefix" in said

    def test_those_left_out_and_those_that_change_nothing_are_counted(
        self, tokenizers: dict, tmp_path: Path
    ) -> None:
        records = read(
            tmp_path,
            chat(ASKED | {"id": 1}, SAID, id="a", score=0.5, chosen="x"),
            chat(*PAIR, id="b", chosen="y"),
            ignore=("chosen",),
        )
        _, report = encode_all(records, tokenizers["plain"], 1000)
        assert report.harmless == {"id": 2, "id of a turn": 1, "score": 1}
        assert report.left_out == {"chosen": 2}
        assert "keys that change nothing: id (2), score (1), id of a turn (1)" in str(report)
        assert "keys left out as you said: chosen (2)" in str(report)

    @pytest.mark.parametrize("key", ["system", "tools", "messages"])
    def test_a_known_key_may_be_left_out(self, key: str, tmp_path: Path) -> None:
        row = chat(*PAIR, system="Be brief.", tools=[WEATHER])
        if key == "messages":
            assert "unknown shape" in refusal(tmp_path, row, ignore=(key,))
        else:
            (record,) = read(tmp_path, row, ignore=(key,))
            assert record.left_out == (key,)

    @pytest.mark.parametrize("nothing", [None, "", [], {}])
    def test_an_unknown_one_that_holds_nothing(self, nothing: object, tmp_path: Path) -> None:
        assert len(read(tmp_path, chat(*PAIR, chosen=nothing))) == 1

    @pytest.mark.parametrize("something", [0, False, " ", [None], {"a": None}])
    def test_an_unknown_one_that_holds_little(self, something: object, tmp_path: Path) -> None:
        assert "'chosen'" in refusal(tmp_path, chat(*PAIR, chosen=something))

    @pytest.mark.parametrize(
        "text",
        [
            '{"messages": [], "messages": %s}',
            '{"messages": %s, "system": "a", "system": "b"}',
            '{"messages": [{"role": "user", "content": "a", "content": "b"}], "id": %s}',
        ],
    )
    def test_one_that_comes_twice_is_refused(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "train.jsonl"
        path.write_text(json.dumps(chat(*PAIR)) + "\n" + text % json.dumps(PAIR) + "\n")
        with pytest.raises(JloraError, match=r"train.jsonl:2: .* has the key '\w+' twice"):
            load_records(path)

    def test_a_message_shows_the_beginning_of_a_long_value(self, tmp_path: Path) -> None:
        for turn in (ASKED | {"role": "x" * 9999}, ASKED | {"weight": "x" * 9999}):
            assert len(refusal(tmp_path, chat(turn, SAID))) < 1500

    def test_none_is_both_known_and_harmless(self) -> None:
        from jlora.data import shapes

        known = {*shapes._COMMON, *shapes._TURN, "input", "history"}
        assert not known & HARMLESS

    def test_the_report_of_no_keys_does_not_speak_of_them(self) -> None:
        assert "keys" not in str(EncodeReport(1, 1, 0, 0, 0, 0, 5, 2, 5))


class TestFiles:
    two = (chat(*PAIR), chat(ASKED, SAID, ASKED, SAID))

    def load(self, tmp_path: Path, text: str, name: str = "train.json") -> list[Record]:
        (tmp_path / name).write_text(text)
        return load_records(tmp_path / name)

    def refused(self, tmp_path: Path, text: str) -> str:
        with pytest.raises(JloraError) as caught:
            self.load(tmp_path, text)
        return str(caught.value)

    @pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
    @pytest.mark.parametrize("indent", [None, 0, 2])
    @pytest.mark.parametrize("key", ["data", "train", "rows", "conversation_list"])
    def test_an_object_around_the_records(
        self, name: str, indent: int | None, key: str, tmp_path: Path
    ) -> None:
        text = json.dumps({"version": "1", "description": "x", key: self.two}, indent=indent)
        assert [len(r.messages) for r in self.load(tmp_path, text, name)] == [2, 4]

    def test_lines_are_those_of_the_records(self, tmp_path: Path) -> None:
        text = '{"data": [\n' + json.dumps(self.two[0]) + ",\n" + json.dumps(chat(ASKED)) + "\n]}"
        assert "train.json:3: no assistant turn" in self.refused(tmp_path, text)

    def test_what_stands_beside_the_array_is_not_dropped(self, tmp_path: Path) -> None:
        said = self.refused(tmp_path, json.dumps({"system": "Be brief.", "data": self.two}))
        assert "the array 'data', and beside it 'system'" in said
        said = self.refused(tmp_path, json.dumps({"train": self.two, "valid": self.two}))
        assert "2 arrays, 'train', 'valid'" in said

    @pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
    def test_records_over_several_lines(self, name: str, tmp_path: Path) -> None:
        one = json.dumps(self.two[0], indent=4)
        assert len(self.load(tmp_path, one, name)) == 1
        records = self.load(tmp_path, one + "\n" + json.dumps(self.two[1], indent=2) + "\n", name)
        assert [len(r.messages) for r in records] == [2, 4]
        assert records[1].where == f"{name}:{one.count(chr(10)) + 2}"

    @pytest.mark.parametrize("indent", [None, 2])
    @pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
    def test_an_array_by_either_name(self, name: str, indent: int | None, tmp_path: Path) -> None:
        if (name, indent) == ("train.jsonl", None):
            pytest.skip("one line of a .jsonl is one record")
        assert len(self.load(tmp_path, json.dumps(self.two, indent=indent), name)) == 2

    def test_nested_nulls_of_parquet(self, tokenizers: dict, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        # Arrow gives each object the keys of all, so most of them hold null.
        turns = [ASKED, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "function": CALL},
            {"id": None, "function": {"name": "clock", "arguments": {"zone": "CET"}}},
        ]}, {"role": "tool", "content": "rain"}, SAID | {"reasoning": "wet"}]  # fmt: skip
        path = tmp_path / "train.parquet"
        tool = {
            "type": "function",
            "function": {"name": "weather", "parameters": {"type": "object"}},
        }
        rows = [chat(*turns, tools=[tool], note="x"), chat(*PAIR)]
        datasets.Dataset.from_list(rows).to_parquet(str(path))
        first, second = load_records(path)
        assert second.messages == PAIR
        assert second.tools is None
        assert first.messages[3] == {**SAID, "reasoning_content": "wet"}
        arguments = [c["function"]["arguments"] for c in first.messages[1]["tool_calls"]]
        assert arguments == [{"town": "Graz"}, {"zone": "CET"}]
        assert first.where == "train.parquet row 0"
