"""What config.json and the files beside it may say, against what transformers makes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counterpart import our_logits, random_tokens, torch_logits
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import jlora

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"type": "linear", "factor": 2.0}
# Model type, what config.json says otherwise, and the keys that it leaves out.
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("llama", {}, set()),
    "rope_scaling beside rope_parameters": (
        "llama",
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        set(),
    ),
    "rope_scaling with a theta of its own": (
        "qwen2", {"rope_scaling": LINEAR | {"rope_theta": 50.0}, "rope_parameters": {}}, set()
    ),
    "an empty rope_scaling": (
        "llama", {"rope_scaling": {}, "rope_parameters": {"rope_theta": 77.0}}, set()
    ),
    "llama3 without the original length": ("llama", {"rope_scaling": LLAMA3}, set()),
    "llama3 in qwen3": (
        "qwen3", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}}, {"head_dim"}
    ),
    "llama3 with the original length at the top": (
        "llama",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32},
         "original_max_position_embeddings": 8},
        set(),
    ),
    "no rope at all": ("mistral", {}, {"rope_theta"}),
    "no eps": ("llama", {}, {"rms_norm_eps"}),
    "swish": ("mistral", {"hidden_act": "swish"}, set()),
    "no activation": ("qwen2", {}, {"hidden_act"}),
    "no tie": ("qwen2", {}, {"tie_word_embeddings"}),
    "tied": ("qwen3", {"tie_word_embeddings": True}, set()),
    "no head_dim in qwen3, which is 128": ("qwen3", {}, set()),
    "key heads by the heads": ("llama", {}, {"num_key_value_heads"}),
    "null key heads": ("llama", {"num_key_value_heads": None}, set()),
    "8 key heads in mistral": ("mistral", {}, {"num_key_value_heads"}),
    "a window in mistral": ("mistral", {"sliding_window": 16}, set()),
    "a window of 1": ("mistral", {"sliding_window": 1}, set()),
    "mistral passes over use_sliding_window": (
        "mistral", {"sliding_window": 16, "use_sliding_window": False}, set()
    ),
    "no window in mistral": ("mistral", {"sliding_window": None}, set()),
    "a window that llama has not": ("llama", {"sliding_window": 16}, set()),
    "a window that qwen2 does not use": (
        "qwen2", {"sliding_window": 16, "max_window_layers": 0}, set()
    ),
    "a window from a layer on": (
        "qwen2",
        {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
        set(),
    ),
    "a window beyond the layers": (
        "qwen3", {"sliding_window": 16, "use_sliding_window": True}, set()
    ),
    "kinds of layers": (
        "qwen3",
        {"sliding_window": 9, "use_sliding_window": True,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        set(),
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, set()),
    "biases that mistral has not": ("mistral", {"attention_bias": True}, set()),
    "architectures null": ("llama", {"architectures": None}, set()),
}  # fmt: skip


def write(to: Path, kind: str, changes: dict[str, Any], absent: set[str]) -> Any:
    """Write a directory whose weights transformers drew; its model there."""
    about = {"model_type": kind} | SIZES | changes
    to.mkdir()
    (to / "config.json").write_text(
        json.dumps({key: value for key, value in about.items() if key not in absent})
    )
    torch.manual_seed(0)
    from transformers import AutoConfig

    drawn = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(to), dtype=torch.float32)
    with torch.no_grad():
        for parameter in drawn.parameters():
            parameter.normal_(0, 0.3)
    said = (to / "config.json").read_bytes()
    drawn.save_pretrained(to)
    (to / "config.json").write_bytes(said)  # not as transformers puts it
    return read(to)


def read(directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path, case):
    kind, changes, absent = CASES[case]
    expected = torch_logits(write(tmp_path / "m", kind, changes, absent), tokens := tokens_of())
    got = our_logits(jlora.load(tmp_path / "m"), tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def tokens_of() -> np.ndarray:
    return random_tokens(2, 40)


@pytest.mark.parametrize("case", ["a window in mistral", "a window from a layer on"])
def test_a_window_where_a_cache_is_filled(tmp_path, case):
    kind, changes, absent = CASES[case]
    theirs = write(tmp_path / "m", kind, changes, absent)
    prompts = [tokens_of()[0][:30], tokens_of()[1][:23]]
    new = jlora.generate(jlora.load(tmp_path / "m"), prompts, max_new_tokens=12, stop_ids=())
    for prompt, answer in zip(prompts, new, strict=True):
        whole = torch.tensor(np.asarray(prompt))[None]
        for _ in range(12):
            with torch.no_grad():
                token = theirs(whole, use_cache=False).logits[0, -1].argmax()
            whole = torch.cat([whole, token[None, None]], dim=1)
        np.testing.assert_array_equal(answer, whole[0, len(prompt) :])


def files(change: str, at: Path) -> None:
    """Change the files of a directory of one model.safetensors."""
    file = at / "model.safetensors"
    tensors = load_file(file)
    if change == "another head under a tied configuration":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    elif change == "the same head under a tied configuration":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    elif change == "a tied embedding under the head's name alone":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    elif change == "buffers of old":
        for name in ("model.rotary_emb.inv_freq",
                     "model.layers.1.self_attn.rotary_emb.inv_freq"):  # fmt: skip
            tensors[name] = np.full(2, 9, np.float32)
    elif change == "an index of an older save":
        older = {name: -tensor for name, tensor in tensors.items()}
        save_file(older, at / "model-00001-of-00001.safetensors")
        where = dict.fromkeys(older, "model-00001-of-00001.safetensors")
        (at / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where})
        )
    elif change == "a shard that the index lacks":
        file.unlink()
        where = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
        save_file(tensors, at / "model-00001-of-00002.safetensors")
        save_file({"model.norm.weight": -tensors["model.norm.weight"]},
                  at / "model-00002-of-00002.safetensors")  # fmt: skip
        (at / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where})
        )
        return
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        "another head under a tied configuration",
        "the same head under a tied configuration",
        "a tied embedding under the head's name alone",
        "buffers of old",
        "an index of an older save",
        "a shard that the index lacks",
    ],
)
def test_files_are_read_as_by_transformers(tmp_path, change):
    write(tmp_path / "m", "llama", {"tie_word_embeddings": True}, set())
    shutil.copytree(tmp_path / "m", tmp_path / "n")
    files(change, tmp_path / "n")
    expected = torch_logits(read(tmp_path / "n"), tokens_of())
    before = torch_logits(read(tmp_path / "m"), tokens_of())
    moved = np.abs(expected - before).max() > 1
    assert moved == (change == "another head under a tied configuration")
    got = our_logits(jlora.load(tmp_path / "n"), tokens_of())
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
