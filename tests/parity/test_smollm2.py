"""SmolLM2 as we convert, tokenise and run it, against the gguf library and transformers."""

import hashlib
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from counterpart import our_logits, torch_logits, torch_model
from gguf.quants import dequantize
from helpers import contents
from safetensors.numpy import load_file
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer

import jlora
from jlora.data import chat, source
from jlora.data.records import Record
from jlora.generation import generate, pad, prefill
from jlora.injection import partition
from jlora.models.gguf import convert

HEADS = {"q_proj": 9, "k_proj": 3}

# Weights ------------------------------------------------------------------------------------------


def test_converting_again_gives_the_same_files(smollm2, smollm2_gguf, tmp_path):
    convert(smollm2_gguf, tmp_path / "again")
    fetched, again = (
        {name: hashlib.sha256(file).hexdigest() for name, file in contents(directory).items()}
        for directory in (smollm2, tmp_path / "again")
    )
    fetched.pop("jlora_source.json")
    assert again == fetched


def test_weights_are_those_that_the_gguf_library_dequantises(smollm2, smollm2_gguf):
    ours = load_file(smollm2 / "model.safetensors")
    theirs = {t.name: t for t in gguf.GGUFReader(smollm2_gguf).tensors}
    layers = sum(name.endswith("attn_q.weight") for name in theirs)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    kinds = set()
    for name, weight in ours.items():
        tensor = theirs.pop(names.get_name(name, try_suffixes=(".weight",)))
        kinds.add(tensor.tensor_type.name)
        module = name.split(".")[-2]
        if module in HEADS:  # llama.cpp keeps the two halves of each head's rows interleaved
            halves = weight.reshape(HEADS[module], 2, -1, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        np.testing.assert_array_equal(weight, dequantize(tensor.data, tensor.tensor_type), name)
    assert not theirs
    assert len(ours) == 272
    assert kinds == {"Q4_1", "Q8_0", "F32"}  # more than one way of packing


def test_the_gguf_library_dequantises_as_the_format_says(smollm2_gguf):
    """Blocks of 32: scale, least value and nibbles (Q4_1); scale and bytes (Q8_0)."""
    tensors = {t.tensor_type.name: t for t in gguf.GGUFReader(smollm2_gguf).tensors}
    blocks = np.asarray(tensors["Q4_1"].data).reshape(-1, 20)[:5000]
    scale, least = np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(np.float32).T
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    expected = {"Q4_1": scale[:, None] * codes + least[:, None]}
    blocks = np.asarray(tensors["Q8_0"].data).reshape(-1, 34)[:5000]
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    expected["Q8_0"] = scale * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    for kind, values in expected.items():
        got = dequantize(tensors[kind].data, tensors[kind].tensor_type).reshape(-1, 32)[:5000]
        np.testing.assert_array_equal(got, values, kind)


# Logits -------------------------------------------------------------------------------------------

SYSTEM = "Is this movie review positive or negative? Answer with one word."
PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n",
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nA gem.<|im_end|>\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Il était une fois, dans un pays lointain, une princesse qui",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Once upon a time " * 12,
    "🙂",
]


@pytest.fixture(scope="module")
def models(smollm2):
    """Ours and theirs."""
    return jlora.load(smollm2), torch_model(smollm2)


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = chat.load_tokenizer(smollm2)
    return [chat.encode_prompt(text, tokenizer) for text in PROMPTS]


@pytest.fixture(scope="module")
def expected(models, prompts):
    """Their logits of each prompt by itself, (T, V)."""
    return [torch_logits(models[1], prompt[None])[0] for prompt in prompts]


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_logits_padded_and_not(models, prompts, expected, side):
    model, _ = models
    assert len({len(prompt) for prompt in prompts}) >= 6
    width = max(map(len, prompts))
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    places = []
    for row, prompt in enumerate(prompts):
        start = width - len(prompt) if side == "left" else 0
        places.append(slice(start, start + len(prompt)))
        tokens[row, places[-1]], mask[row, places[-1]] = prompt, True
    if side == "none":
        got = [our_logits(model, prompt[None])[0] for prompt in prompts]
    else:
        logits = our_logits(model, tokens, mask)
        got = [row[place] for row, place in zip(logits, places, strict=True)]
    for ours, theirs in zip(got, expected, strict=True):
        assert np.abs(theirs).max() > 10
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_cached_decoding(models, prompts, expected):
    """Prompts in the cache, then all greedy tokens: as without a cache, and as transformers'."""
    model, theirs = models
    tokens, mask = pad(prompts, np.arange(len(prompts)), max(map(len, prompts)), len(prompts))
    read = prefill(*partition(model), tokens, mask, slots=tokens.shape[1] + 8)
    last = np.stack([logits[-1] for logits in expected])
    np.testing.assert_allclose(read.logits, last, atol=1e-3)

    new = 24
    generated = generate(model, prompts, max_new_tokens=new, stop_ids=(), batch_size=len(prompts))
    for prompt, ours in zip(prompts, generated, strict=True):
        whole = np.concatenate([prompt, ours])[None]
        logits = torch_logits(theirs, whole)[0, len(prompt) - 1 : -1]
        # Theirs would have taken the same token at each place, but for ties within the rounding.
        chosen = np.take_along_axis(logits, ours[:, None], axis=-1)[:, 0]
        assert len(ours) == new
        np.testing.assert_allclose(chosen, logits.max(axis=-1), atol=1e-3)


# Tokens -------------------------------------------------------------------------------------------

PIECES = [
    *"aZ09 .,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`",
    " ", "  ", "     ", "\t", "\t\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u2003", "\u3000",
    "7", "42", "1984", "3.14159", "1,000,000", "٣٤٥", "१२३", "½", "²", "Ⅷ",
    "the", " The", "don't", "we'll", "I'M", "naïve", "e\u0301", "Straße", "İstanbul", "ﬁ",
    "中文字", "日本語の", "한국어", "Русский", "ελληνικά", "עברית", "العربية", "ไทย", "हिन्दी",
    "🙂", "👍🏽", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "🇫🇷", "❤\ufe0f", "\u200b", "\u200d",
    "\ufeff", "\U0001d54f", "\u0000", "\x7f", "def f(x):\n    return x\n", "<div class='a'>",
    "for (int i=0;i<10;++i) {\n\t", "http://a.b/c?d=1", "snake_case", "camelCase", "x->y", "a::b",
    "!=", "===", "<|im_start|>", "<|im_end|>", "<|", "|>", "<|endoftext|>", "<think>",
]  # fmt: skip


def texts(sentiment: Path) -> list[str]:
    """1,000 texts: reviews, lines of code, and mixtures of what tokenizers trip over."""
    reviews = [r.messages[1]["content"] for r in source.load_records(str(sentiment), "test")[:300]]
    code = sorted(Path(jlora.__file__).parent.rglob("*.py"))
    lines = "".join(file.read_text(encoding="utf-8") for file in code).splitlines(keepends=True)
    blocks = ["".join(lines[i : i + 8]) for i in range(0, 2400, 8)]
    draw = random.Random(0)
    assert all(blocks)
    mixed = ["".join(draw.choices(PIECES, k=draw.randint(1, 30))) for _ in range(400)]
    return reviews + blocks + mixed


@pytest.fixture(scope="module")
def theirs(smollm2_gguf) -> Any:
    """Transformers' reading of the GGUF's tokenizer, which splits no digits."""
    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="module")
def theirs_with_digits(smollm2_gguf) -> Any:
    """The same with each digit by itself, as the model was trained."""
    file = smollm2_gguf
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    splitters = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(splitters)
    return tokenizer


def test_tokens_of_1000_texts(smollm2, sentiment, theirs_with_digits):
    ours = chat.load_tokenizer(smollm2)
    all_texts = texts(sentiment)
    assert len(all_texts) == 1000
    for text in all_texts:
        tokens = ours(text)["input_ids"]
        assert tokens == theirs_with_digits(text)["input_ids"], repr(text)
        assert ours.decode(tokens) == text


def test_digits_are_what_transformers_reads_differently(smollm2, sentiment, theirs):
    ours = chat.load_tokenizer(smollm2)
    differing = []
    for text in texts(sentiment):
        if ours(text)["input_ids"] != theirs(text)["input_ids"]:
            differing.append(text)
            assert any(character.isnumeric() for character in text), repr(text)
    assert len(differing) > 20
    assert ours.tokenize("  1") == ["ĠĠ", "1"]
    assert theirs.tokenize("  1") == ["Ġ", "Ġ", "1"]


# Chat ---------------------------------------------------------------------------------------------


def conversations() -> list[list[dict[str, str]]]:
    """20 of them: with and without a system turn, long, empty, and with markup in the content."""
    contents = [
        "Hi", "", "  leading and trailing  ", "two\nlines\n", "1984 + 16 = 2000", "🙂 中文",
        "{{ x }}", "{% if a %}b{% endif %}", "<b>&amp;</b>", "He said \"don't\".",
    ]  # fmt: skip
    made = []
    for i, content in enumerate(contents):
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": f"A{i}"}]
        system = [{"role": "system", "content": contents[-i]}]
        made.append(turns * (1 + i % 3))
        made.append(system + turns * (1 + i % 4))
    return made


def test_chat_template(smollm2, theirs, theirs_with_digits):
    ours = chat.load_tokenizer(smollm2)
    assert len(conversations()) == 20
    for messages in conversations():
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert ours.apply_chat_template(messages, tokenize=False) == text
        assert messages[-1]["content"] in text
        tokens = theirs_with_digits(text)["input_ids"]
        (row,) = chat.encode(Record(messages, where="here"), ours, max_length=4096)
        assert row.tokens.tolist() == tokens
        prompt = theirs.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        expected = theirs_with_digits(prompt)["input_ids"]
        assert chat.encode_prompt(messages[:-1], ours).tolist() == expected
