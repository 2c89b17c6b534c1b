"""Chat templates, and which tokens are trained."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from jlora.data import chat
from jlora.data.chat import (
    ChatTokenizer,
    Example,
    answer_text,
    encode,
    encode_all,
    encode_prompt,
    load_tokenizer,
    prompt_tokens,
    show_mask,
)
from jlora.data.records import Record
from jlora.data.source import load_records
from jlora.errors import JloraError

ROOT = Path(__file__).parent.parent
SMOLLM2 = Path(os.environ.get("JLORA_SMOLLM2", ROOT / "models" / "smollm2"))
SHARED_DATA = Path(os.environ.get("JLORA_SHARED_DATA", ROOT.parent / "shared" / "data"))

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
# As Llama 2: the generation prompt is empty, and the content is trimmed and set off by spaces.
INST = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }} <|eos|>"
    "{% else %}<|bos|>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
# As Phi 3: a conversation that is complete ends with one more token.
CLOSED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|eos|>{% endif %}"
)
# As Qwen 3: reasoning stands in the last turn alone.
REWRITES = CHATML.replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}",
)
# As DeepSeek R1: the generation prompt opens the reasoning, which history leaves out.
OPENS = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>")
REFUSES = "{{ raise_exception('roles must alternate') }}"


def write_tokenizer(
    directory: Path, template: str, *, eos: str | None = "<|eos|>", trim: bool = False
) -> Path:
    """Write a tokenizer with a token for each byte, and one for two line breaks in a row."""
    from transformers import PreTrainedTokenizerFast

    # Ċ is how byte-level tokenizers write the line break.
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*bytes_, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        additional_special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>"],
        chat_template=template,
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict:
    def load(template: str, **options) -> object:
        return load_tokenizer(
            write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template, **options)
        )

    return {
        "chatml": load(CHATML),
        "chatml, trimmed offsets": load(CHATML, trim=True),
        "chatml, no line break": load(CHATML.replace("<|im_end|>\n", "<|im_end|>")),
        "inst": load(INST),
        "closed": load(CLOSED),
        "plain": load(PLAIN),
        "plain, no eos": load(PLAIN, eos=None),
        "rewrites": load(REWRITES),
        "opens": load(OPENS),
        "refuses": load(REFUSES),
        "bare": load("{% for m in messages %}{{ m.content if m.role == 'assistant' }}{% endfor %}"),
    }


def conversation(*contents: str, where: str = "train.jsonl:7") -> Record:
    """User and assistant in turn."""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    return Record(turns, where)


def row_of(record: Record, tokenizer, max_length: int = 10_000) -> Example:
    """The only row of a record."""
    (example,) = encode(record, tokenizer, max_length)
    return example


def trained_text(record: Record, tokenizer, max_length: int = 10_000) -> str:
    example = row_of(record, tokenizer, max_length)
    return tokenizer.decode(example.tokens[example.trained].tolist())


class TestMask:
    def test_it_reads_as_meant(self, tokenizers: dict) -> None:
        example = row_of(conversation("Hi?", "Hello."), tokenizers["chatml"], 100)
        assert show_mask(example, tokenizers["chatml"]) == (
            "<|im_start|>system\nBe kind.<|im_end|>\n"
            "<|im_start|>user\nHi?<|im_end|>\n"
            "<|im_start|>assistant\n[[Hello.<|im_end|>]]\n"
        )
        assert example.tokens.dtype == np.int32
        assert example.trained.dtype == np.bool_
        assert example.tokens.shape == example.trained.shape
        assert example.where == "train.jsonl:7"

    @pytest.mark.parametrize(
        ("template", "shown"),
        [
            (
                "chatml, no line break",
                "<|im_start|>system\nBe kind.<|im_end|><|im_start|>user\na<|im_end|>"
                "<|im_start|>assistant\n[[b<|im_end|>]]<|im_start|>user\nc<|im_end|>"
                "<|im_start|>assistant\n[[d<|im_end|>]]",
            ),
            ("inst", "<|bos|>[INST] a [/INST][[ b <|eos|>]]<|bos|>[INST] c [/INST][[ d <|eos|>]]"),
            (
                "closed",
                "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
                "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]\n<|eos|>",
            ),
            (
                "plain, no eos",
                "### user:\na\n\n### assistant:\n[[b]]\n\n### user:\nc\n\n"
                "### assistant:\n[[d]]\n\n",
            ),
        ],
    )
    def test_two_turns_in_other_templates(
        self, template: str, shown: str, tokenizers: dict
    ) -> None:
        example = row_of(conversation("a", "b", "c", "d"), tokenizers[template], 1000)
        assert show_mask(example, tokenizers[template]) == shown

    def test_without_an_end_of_turn_each_answer_gets_the_end_of_sequence(
        self, tokenizers: dict
    ) -> None:
        first, second = encode(conversation("a", "b", "c", "d"), tokenizers["plain"], 1000)
        assert show_mask(first, tokenizers["plain"]) == (
            "### user:\na\n\n### assistant:\n[[b<|eos|>]]"
        )
        assert show_mask(second, tokenizers["plain"]) == (
            "### user:\na\n\n### assistant:\nb\n\n### user:\nc\n\n### assistant:\n[[d<|eos|>]]"
        )

    # The tokenizer is to see text as it is: without what it would take for its special tokens.
    text = st.text(st.characters(codec="utf-8"), max_size=20)

    @pytest.mark.parametrize("name", ["chatml", "chatml, trimmed offsets"])
    @settings(deadline=None)
    @given(contents=st.lists(st.tuples(text, text), min_size=1, max_size=3))
    def test_trained_is_each_answer_and_its_end(
        self, contents: list[tuple[str, str]], name: str, tokenizers: dict
    ) -> None:
        record = conversation(*[text for pair in contents for text in pair])
        rows = encode(record, tokenizers[name], 10_000)
        texts = [tokenizers[name].decode(row.tokens[row.trained].tolist()) for row in rows]
        assert "".join(texts) == "".join(answer + "<|im_end|>" for _, answer in contents)

    @pytest.mark.parametrize(
        "answer",
        ["naïve 🙂👩‍👩‍👧", "  two  spaces ", "\ttab\n\n", "<think>", "e", "assistant\n"],
    )
    @pytest.mark.parametrize("name", ["chatml", "chatml, trimmed offsets", "closed"])
    def test_odd_answers(self, answer: str, name: str, tokenizers: dict) -> None:
        record = conversation(answer, answer, answer, answer)
        assert trained_text(record, tokenizers[name]) == (answer + "<|im_end|>") * 2

    def test_an_empty_answer_is_its_end(self, tokenizers: dict) -> None:
        record = conversation("a", "", "b", "")
        assert trained_text(record, tokenizers["chatml"]) == "<|im_end|>" * 2

    def test_no_token_straddles_the_edge(self, tokenizers: dict) -> None:
        # In the whole text "\n\n" is one token; generation has seen the first line break alone.
        tokenizer = tokenizers["chatml"]
        example = row_of(conversation("a", "\nb"), tokenizer)
        prompt = prompt_tokens(conversation("a", "\nb"), tokenizer)
        np.testing.assert_array_equal(example.tokens[: len(prompt)], prompt)
        assert show_mask(example, tokenizer).endswith("assistant\n[[\nb<|im_end|>]]\n")

    def test_the_first_token_is_not_trained(self, tokenizers: dict) -> None:
        # Here the answer is all there is, and its first token has nothing to be predicted from.
        example = row_of(conversation("", "bcd"), tokenizers["bare"], 100)
        assert show_mask(example, tokenizers["bare"]) == "b[[cd<|eos|>]]"

    def test_a_row_ends_with_the_last_answer(self, tokenizers: dict) -> None:
        example = row_of(conversation("a", "b", "c"), tokenizers["chatml"], 100)
        assert show_mask(example, tokenizers["chatml"]).endswith("[[b<|im_end|>]]\n")

    def test_a_system_turn_replaces_the_default(self, tokenizers: dict) -> None:
        turns = [{"role": "system", "content": "Be brief."}, *conversation("a", "b").messages]
        example = row_of(Record(turns, ""), tokenizers["chatml"], 100)
        assert show_mask(example, tokenizers["chatml"]).startswith(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
        )

    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            (
                "rewrites",
                [
                    "assistant\n[[<think></think>b<|im_end|>]]\n",
                    "assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
                    "[[<think></think>d<|im_end|>]]\n",
                ],
            ),
            (
                "opens",
                [
                    "assistant\n<think>[[\n</think>\n\nb<|im_end|>]]\n",
                    "assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
                    "<think>[[\n</think>\n\nd<|im_end|>]]\n",
                ],
            ),
        ],
    )
    def test_templates_that_rewrite_history_have_a_row_for_each_answer(
        self, name: str, shown: list[str], tokenizers: dict
    ) -> None:
        record = conversation("a", "b", "c", "d")
        examples, report = encode_all([record], tokenizers[name], 1000)
        for example, end in zip(examples, shown, strict=True):
            assert show_mask(example, tokenizers[name]).endswith(end)
        assert [example.where for example in examples] == [
            "train.jsonl:7, turn 1",
            "train.jsonl:7, turn 3",
        ]
        assert (report.records, report.rows, report.several) == (1, 2, 1)
        assert "1 of 1 records are a row for each answer" in str(report)

    def test_what_a_template_adds_to_the_last_turn_is_trained(self, tokenizers: dict) -> None:
        got = trained_text(conversation("a", "b"), tokenizers["rewrites"])
        assert got == "<think></think>b<|im_end|>"

    def test_an_answer_that_only_its_reasoning_has_is_missed(self, tokenizers: dict) -> None:
        keeps_reasoning = CHATML.replace(
            "{{ m.content }}", "{{ m.reasoning_content if m.reasoning_content else m.content }}"
        )
        tokenizer = ChatTokenizer(tokenizers["chatml"].base, template=keeps_reasoning)
        asked, answer = conversation("2+2?", "4").messages
        answer["reasoning_content"] = "2+2 is 4"
        with pytest.raises(JloraError, match=r"does not write turn 1 .* of its content\n  '4'"):
            encode(Record([asked, answer], ""), tokenizer, 100)

    def test_tokens_in_a_row_end_a_turn_and_the_first_stops(self, tokenizers: dict) -> None:
        twice = CHATML.replace("<|im_end|>", "<|im_end|><|eos|>")
        tokenizer = ChatTokenizer(tokenizers["chatml"].base, template=twice)
        assert trained_text(conversation("a", "b"), tokenizer) == "b<|im_end|><|eos|>"
        assert tokenizer.turn_end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")

    def test_a_template_that_refuses_the_turns(self, tokenizers: dict) -> None:
        with pytest.raises(
            JloraError, match=r"train.jsonl:7: .* refuses the turns user: roles must alternate"
        ):
            row_of(conversation("a", "b"), tokenizers["refuses"], 100)
        with pytest.raises(JloraError, match=r"the prompt: .* roles must alternate"):
            encode_prompt("a", tokenizers["refuses"])


class TestTruncation:
    @given(max_length=st.integers(2, 200))
    @settings(deadline=None, max_examples=30)
    def test_it_keeps_the_first_tokens(self, max_length: int, tokenizers: dict) -> None:
        whole = row_of(conversation("a" * 40, "b" * 40), tokenizers["chatml"], 10_000)
        cut = row_of(conversation("a" * 40, "b" * 40), tokenizers["chatml"], max_length)
        np.testing.assert_array_equal(cut.tokens, whole.tokens[:max_length])
        np.testing.assert_array_equal(cut.trained, whole.trained[:max_length])

    def test_the_report_counts_what_was_cut_and_dropped(
        self, tokenizers: dict, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chat, "_TEXTS_AT_A_TIME", 2)
        tokenizer = tokenizers["plain"]
        # "### user:\n?\n\n### assistant:\n" is 28 bytes, and "\n\n" in it is one token.
        records = [
            conversation("?", "12", where="fits"),
            conversation("?" * 40, "1", where="dropped"),
            conversation("?", "1" * 40, where="cut"),
        ]
        examples, report = encode_all(records, tokenizer, 32)
        assert [example.where for example in examples] == ["fits", "cut"]
        assert [len(example.tokens) for example in examples] == [30, 32]
        assert (report.rows, report.truncated, report.dropped) == (3, 2, 1)
        assert (report.tokens, report.trained, report.longest) == (30 + 32, 3 + 5, 27 + 41)
        assert str(report) == (
            "2 rows, 62 tokens, 8 of them trained, longest row 68; "
            "2 rows cut, 1 of them dropped as no answer was left"
        )

    def test_batches_of_texts_change_nothing(
        self, tokenizers: dict, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chat, "_TEXTS_AT_A_TIME", 3)
        records = [conversation("?" * n, "!" * n) for n in range(1, 9)]
        examples, report = encode_all(records, tokenizers["chatml"], 1000)
        for record, example in zip(records, examples, strict=True):
            alone = row_of(record, tokenizers["chatml"], 1000)
            np.testing.assert_array_equal(example.tokens, alone.tokens)
            np.testing.assert_array_equal(example.trained, alone.trained)
        assert report.truncated == report.dropped == 0
        assert "cut" not in str(report)

    def test_no_row_left(self, tokenizers: dict) -> None:
        records = [conversation("?", "!", where="a:1"), conversation("???", "!", where="a:2")]
        with pytest.raises(JloraError) as caught:
            encode_all(records, tokenizers["plain"], 20)
        assert "none of the 2 rows has a trained token within max_length = 20" in str(caught.value)
        assert "27 to 29 tokens (the most in a:2). Raise max_length above 29" in str(caught.value)
        with pytest.raises(JloraError, match="no record to encode"):
            encode_all([], tokenizers["plain"], 20)

    def test_max_length_below_2(self, tokenizers: dict) -> None:
        with pytest.raises(JloraError, match="max_length is 1; it must be at least 2"):
            row_of(conversation("a", "b"), tokenizers["chatml"], 1)


class TestPrompts:
    def test_prompt_and_answer_of_the_last_turn(self, tokenizers: dict) -> None:
        tokenizer = tokenizers["chatml"]
        record = conversation("a", "b", "c", "d", "e")
        prompt = prompt_tokens(record, tokenizer)
        assert prompt.dtype == np.int32
        assert tokenizer.decode(prompt.tolist()).endswith(
            "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
        )
        assert answer_text(record) == "d"
        whole = row_of(record, tokenizer, 1000).tokens
        np.testing.assert_array_equal(prompt, whole[: len(prompt)])

    def test_a_users_prompt(self, tokenizers: dict) -> None:
        tokenizer = tokenizers["chatml"]
        record = conversation("Hi?", "!")
        expected = prompt_tokens(record, tokenizer)
        np.testing.assert_array_equal(encode_prompt("Hi?", tokenizer), expected)
        np.testing.assert_array_equal(encode_prompt(record.messages[:1], tokenizer), expected)


class TestLoading:
    def test_missing_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(JloraError, match=r"has no tokenizer.json. Copy tokenizer.json"):
            load_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(JloraError, match="the tokenizer cannot be read"):
            load_tokenizer(tmp_path)

    def test_missing_template(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path, CHATML)
        (tmp_path / "chat_template.jinja").unlink()
        with pytest.raises(JloraError, match=r"has no chat template, in chat_template.jinja or"):
            load_tokenizer(tmp_path)

    def test_it_is_quiet_and_needs_no_torch(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path, CHATML)
        code = (
            "import os, sys; from jlora.data.chat import load_tokenizer; before = dict(os.environ);"
            f"load_tokenizer({str(tmp_path)!r});"
            "assert 'torch' not in sys.modules; assert dict(os.environ) == before"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(SMOLLM2)


@pytest.mark.skipif(
    not (SMOLLM2 / "tokenizer.json").is_file(), reason=f"no SmolLM2 tokenizer in {SMOLLM2}"
)
class TestSmolLM2:
    @pytest.mark.parametrize(
        "answer", ["18 + 27 = 45\n#### 45", " 🙂 naïve  café ", "\nb", "e", ""]
    )
    def test_multi_turn(self, answer: str, smollm2) -> None:
        got = trained_text(conversation("Hi?", answer, "Go on.", answer), smollm2)
        assert got == (answer + "<|im_end|>") * 2

    @pytest.mark.skipif(
        not (SHARED_DATA / "gsm8k").is_dir(), reason=f"no gsm8k data in {SHARED_DATA}"
    )
    def test_gsm8k(self, smollm2) -> None:
        records = load_records(SHARED_DATA / "gsm8k", "valid")
        examples, report = encode_all(records, smollm2, 2048)
        assert report.dropped == report.truncated == 0
        for record, example in zip(records, examples, strict=True):
            prompt = prompt_tokens(record, smollm2)
            np.testing.assert_array_equal(prompt, example.tokens[: len(prompt)])
            assert not example.trained[: len(prompt)].any()
            got = smollm2.decode(example.tokens[example.trained].tolist())
            assert got == answer_text(record) + "<|im_end|>"
