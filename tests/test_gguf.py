"""The GGUF converter, on a tiny model that these tests write with the gguf library."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from jlora.errors import JloraError
from jlora.files import new_directory
from jlora.models.gguf import convert

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 2, 32, 64, 4, 2
# A head of 4 would hide a reversed permutation: it is its own inverse there.
HEAD_DIM = 8
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT_TOKENS = [*sorted(ByteLevel.alphabet()), "Ġa", "ab", "12"]
TOKENS = [*SPECIAL, *TEXT_TOKENS, "<think>"]
TYPES = [3] * len(SPECIAL) + [1] * len(TEXT_TOKENS) + [4]
MERGES = ["Ġ a", "a b", "1 2"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": CHAT_TEMPLATE,
}


def hugging_face_weights() -> dict[str, np.ndarray]:
    """Random weights by the GGUF name, with rows in Hugging Face's order."""
    rng = np.random.default_rng(0)
    kv = KV_HEADS * HEAD_DIM
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (HIDDEN,),
            f"blk.{i}.attn_q": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_k": (kv, HIDDEN),
            f"blk.{i}.attn_v": (kv, HIDDEN),
            f"blk.{i}.attn_output": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_norm": (HIDDEN,),
            f"blk.{i}.ffn_gate": (INNER, HIDDEN),
            f"blk.{i}.ffn_up": (INNER, HIDDEN),
            f"blk.{i}.ffn_down": (HIDDEN, INNER),
        }
    return {
        f"{name}.weight": rng.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows as llama.cpp's converter does when it writes a GGUF."""
    rows, columns = w.shape
    return w.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path, changes=(), weights=None, quantise=None, endianess=None) -> Path:
    """Write a GGUF; `changes` override METADATA (None removes a key)."""
    options = {"endianess": endianess} if endianess else {}
    writer = gguf.GGUFWriter(path, arch="llama", **options)
    writer.kv_data[0].clear()
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    add |= {float: writer.add_float32, list: writer.add_array}
    for key, value in (METADATA | dict(changes)).items():
        if value is not None:
            add[type(value)](key, value)
    for name, weight in (hugging_face_weights() if weights is None else weights).items():
        if name.endswith("attn_q.weight"):
            weight = interleave(weight, HEADS)
        if name.endswith("attn_k.weight"):
            weight = interleave(weight, KV_HEADS)
        if quantise and weight.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(weight, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(tmp_path, **kwargs) -> Path:
    convert(write(tmp_path / "m.gguf", **kwargs), tmp_path / "hf")
    return tmp_path / "hf"


def refusal(tmp_path, **kwargs) -> str:
    """Return the error's message, and check that nothing was left behind."""
    file = write(tmp_path / "m.gguf", **kwargs)
    with pytest.raises(JloraError) as error:
        convert(file, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert "m.gguf" in str(error.value)
    return str(error.value)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    if not name.startswith("blk."):
        return {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }[name]
    _, i, kind, _ = name.split(".")
    return f"model.layers.{i}.{HF_NAMES[kind]}.weight"


# Weights and config.json -------------------------------------------------------------------------


def test_every_weight_arrives_in_hugging_face_order(tmp_path):
    weights = hugging_face_weights()
    got = load_file(converted(tmp_path) / "model.safetensors")
    assert set(got) == {hf_name(name) for name in weights}
    for name, weight in weights.items():
        np.testing.assert_array_equal(got[hf_name(name)], weight, err_msg=name)
        assert got[hf_name(name)].dtype == np.float32
    # What the check above rests on: the file's rows really are in another order.
    q = weights["blk.0.attn_q.weight"]
    assert not np.array_equal(interleave(q, HEADS), q)
    assert not np.array_equal(interleave(interleave(q, HEADS), HEADS), q)


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16"])
def test_quantised_values_are_the_librarys(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    got = load_file(converted(tmp_path, quantise=kind) / "model.safetensors")
    for name, weight in hugging_face_weights().items():
        if weight.ndim == 2:  # each row is quantised alone, so the order of rows doesn't matter
            weight = gguf.dequantize(gguf.quants.quantize(weight, kind), kind)
        np.testing.assert_array_equal(got[hf_name(name)], weight, err_msg=name)


def test_config(tmp_path):
    to = converted(tmp_path)
    with safe_open(to / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert read_json(to / "config.json") == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,  # exactly: not the float32 nearest to it
        "rope_theta": 100000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "vocab_size": len(TOKENS),
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert read_json(to / "generation_config.json") == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_untied_output_and_defaults(tmp_path):
    weights = hugging_face_weights()
    weights["output.weight"] = weights["token_embd.weight"] * 2
    for i in range(LAYERS):  # without head_count_kv every head has a key of its own
        for kind in "kv":
            weights[f"blk.{i}.attn_{kind}.weight"] = np.ones((HEADS * HEAD_DIM, HIDDEN), np.float32)
    changes = {"llama.attention.head_count_kv": None, "llama.rope.freq_base": None}
    to = converted(tmp_path, changes=changes, weights=weights)
    config = read_json(to / "config.json")
    assert config["tie_word_embeddings"] is False
    assert config["rope_theta"] == 10000.0
    assert config["num_key_value_heads"] == HEADS
    lm_head = load_file(to / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(lm_head, weights["output.weight"])


def test_tensor_problems_are_listed_all_at_once(tmp_path):
    weights = hugging_face_weights()
    del weights["blk.1.ffn_up.weight"], weights["output_norm.weight"]
    weights["blk.0.attn_q.bias"] = np.zeros(32, np.float32)
    weights["rope_freqs.weight"] = np.zeros(4, np.float32)
    weights["blk.0.ffn_gate.weight"] = np.zeros((INNER, 8), np.float32)
    message = refusal(tmp_path, weights=weights)
    assert "5 tensors can't be converted" in message
    assert "blk.1.ffn_up.weight: missing" in message
    assert "output_norm.weight: missing" in message
    assert "blk.0.attn_q.bias: not known for this architecture" in message
    assert "rope_freqs.weight: the scaled rotary frequencies of Llama 3.1" in message
    assert "blk.0.ffn_gate.weight: shape (64, 8), the metadata say (64, 32)" in message


def test_metadata_problems_are_listed_all_at_once(tmp_path):
    changes = {"llama.block_count": None, "llama.attention.head_count_kv": [2, 1]}
    message = refusal(tmp_path, changes=changes)
    assert "llama.block_count: expected a positive int, found None" in message
    assert "llama.attention.head_count_kv: expected a positive int, found [2, 1]" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"general.architecture": "lama"}, "is 'lama', which can't be converted; supported: llama"),
        ({"general.architecture": None}, "general.architecture is None"),
        ({"llama.rope.scaling.type": "yarn"}, "only 'none' can be converted, found 'yarn'"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count: only 8 can be converted"),
        ({"llama.expert_count": 8}, "expert_count: only 0 can be converted, found 8"),
        ({"llama.attention.head_count_kv": 3}, "4 heads must be a multiple of 3 key heads"),
        ({"tokenizer.ggml.model": "llama"}, "model is 'llama'; supported: 'gpt2'"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre is 'tekken'; supported: 'gpt-2', 'smollm'"),
        ({"tokenizer.ggml.pre": "default"}, "pre is 'default'"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token_type has 2 entries for 263 tokens"),
        ({"tokenizer.ggml.token_type": [6, *TYPES[1:]]}, "token_type has [6]"),
        ({"tokenizer.ggml.tokens": ["a"] * len(TOKENS)}, "263 entries, 1 of them different"),
        ({"tokenizer.ggml.merges": ["a nowhere"]}, "merges don't fit the tokens"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id is 999, outside the 263 tokens"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
            "add_bos_token is true without bos_token_id",
        ),
    ],
)
def test_refusals_name_the_key_and_the_value(tmp_path, changes, expected):
    assert expected in refusal(tmp_path, changes=changes)


# Files and directories ---------------------------------------------------------------------------


def test_no_truncation_goes_unnoticed(tmp_path):
    whole = write(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 8, 20, *range(24, len(whole) - 32, len(whole) // 40)]:
        cut.write_bytes(whole[:size])
        with pytest.raises(JloraError, match=r"cut\.gguf .* is not a complete GGUF file: .*again"):
            convert(cut, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"whole.gguf", "cut.gguf"}


def test_other_files_are_refused(tmp_path):
    with pytest.raises(JloraError, match="no such file"):
        convert(tmp_path / "absent.gguf", tmp_path / "hf")
    (tmp_path / "text").write_text("not a model at all")
    with pytest.raises(JloraError, match="not a complete GGUF file: GGUF magic invalid"):
        convert(tmp_path / "text", tmp_path / "hf")
    big = write(tmp_path / "big.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(JloraError, match="big-endian"):
        convert(big, tmp_path / "hf")


def test_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(JloraError, match="needs the gguf package: pip install gguf"):
        convert(tmp_path / "m.gguf", tmp_path / "hf")


def test_an_occupied_target_is_left_alone(tmp_path):
    file = write(tmp_path / "m.gguf")
    to = tmp_path / "hf"
    to.mkdir()
    (to / "mine.txt").write_text("mine")
    with pytest.raises(JloraError, match="isn't empty; give another path"):
        convert(file, to)
    assert [path.name for path in to.iterdir()] == ["mine.txt"]
    with pytest.raises(JloraError, match="is a file"):
        convert(file, file)


def test_new_directory_appears_complete_or_not_at_all(tmp_path):
    to = tmp_path / "deep" / "to"

    def interrupted():
        with new_directory(to) as stage:
            (stage / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(to.parent.iterdir()) == []
    to.mkdir()  # an empty directory is as good as none
    with new_directory(to) as stage:
        (stage / "whole").write_text("x")
        assert list(to.iterdir()) == []
    assert [path.name for path in to.parent.iterdir()] == ["to"]
    assert [path.name for path in to.iterdir()] == ["whole"]


# Tokenizer ---------------------------------------------------------------------------------------

TEXTS = [
    "a b ab",
    "12 ab12",
    "naïve 🎉",
    "def f(x):\n    return  x\t+ 1\n",
    "<|im_start|>ab<think>",
]


def test_ids_are_the_files_ids(tmp_path):
    tokenizer = Tokenizer.from_file(str(converted(tmp_path) / "tokenizer.json"))
    assert {tokenizer.token_to_id(token): token for token in TOKENS} == dict(enumerate(TOKENS))
    # Digits stand alone, so that the merge "12" is never reached; no bos is added.
    assert tokenizer.encode("ab a12").tokens == ["ab", "Ġa", "1", "2"]
    assert tokenizer.encode("<|im_end|><think>").tokens == ["<|im_end|>", "<think>"]
    assert tokenizer.decode(tokenizer.encode("<|im_end|><think>").ids) == "<think>"
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_transformers_reads_the_same_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    to = converted(tmp_path)
    fast, tokenizer = AutoTokenizer.from_pretrained(to), Tokenizer.from_file(f"{to}/tokenizer.json")
    for text in TEXTS:
        assert fast(text)["input_ids"] == tokenizer.encode(text).ids
        assert fast.decode(fast(text)["input_ids"]) == text
    assert len(fast) == len(TOKENS)
    names = (fast.bos_token, fast.eos_token, fast.unk_token, fast.pad_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>")
    assert fast.model_max_length == 128
    prompt = fast.apply_chat_template(
        [{"role": "user", "content": "a b"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("reader", ["tokenizers", "transformers"])
def test_bos_and_eos_are_added_where_the_file_says_so(tmp_path, reader):
    from transformers import AutoTokenizer

    changes = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    to = converted(tmp_path, changes=changes)
    if reader == "tokenizers":
        tokenizer = Tokenizer.from_file(str(to / "tokenizer.json"))
        one, two = tokenizer.encode("ab").ids, tokenizer.encode("ab", "ab").ids
    else:
        fast = AutoTokenizer.from_pretrained(to)
        one, two = fast("ab")["input_ids"], fast("ab", "ab")["input_ids"]
    assert one == [1, TOKENS.index("ab"), 2]
    assert two == one + one


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["x", "12345", "ĊĊ", "Ġy", "'s"]),
        ("smollm", ["x", "1", "2", "3", "4", "5", "ĊĊ", "Ġy", "'s"]),
        ("llama-bpe", ["x", "123", "45", "ĊĊ", "Ġy", "'s"]),
    ],
)
def test_splitters(tmp_path, pre, pieces):
    to = converted(tmp_path, changes={"tokenizer.ggml.pre": pre})
    splitter = Tokenizer.from_file(str(to / "tokenizer.json")).pre_tokenizer
    assert [piece for piece, _ in splitter.pre_tokenize_str("x12345\n\n y's")] == pieces


def test_end_of_turn_also_ends_an_answer(tmp_path):
    to = converted(tmp_path, changes={"tokenizer.ggml.eot_token_id": 0})
    assert read_json(to / "generation_config.json")["eos_token_id"] == [0, 2]


# The real model ----------------------------------------------------------------------------------


def test_the_real_smollm2():
    root = Path(__file__).parents[1]
    to = Path(os.environ.get("JLORA_SMOLLM2", root / "models" / "smollm2"))
    if not (to / "config.json").is_file():
        pytest.skip(
            f"no SmolLM2 in {to}: fetch('smollm2', ...) puts it there; or set JLORA_SMOLLM2"
        )
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(to)
    assert fast("a b")["input_ids"] == [81, 278]
    assert fast("<|im_start|>user\nhi<|im_end|>\n")["input_ids"] == [1, 4093, 198, 6004, 2, 198]
    assert fast.convert_ids_to_tokens(fast("In 1984")["input_ids"]) == list(("In", "Ġ", *"1984"))
    for text in ["👩‍👩‍👧 naïve", "def f(x):\n    return  x\t\t+ 1\n\n\n   ", "中文字 don't", ""]:
        assert fast.decode(fast(text)["input_ids"]) == text
    config = read_json(to / "config.json")
    with safe_open(to / "model.safetensors", "np") as file:
        assert len(file.keys()) == 2 + 9 * config["num_hidden_layers"] == 272
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
