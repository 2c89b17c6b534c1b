"""Adapters in the real PEFT, in both directions, over configurations and families."""

import dataclasses
import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch
from counterpart import our_logits, random_tokens, torch_logits, torch_model
from flax import nnx
from safetensors.torch import load_file

import jlora
from jlora import injection

# The family, and a configuration in words that PEFT and we share.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear-tied": ("llama-tied", {"r": 3, "target_modules": "all-linear"}),
    "q-and-v": ("llama3-rope-biases", {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("mistral", {"r": 4, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]}),
    "expression": ("qwen3", {"r": 5, "target_modules": r".*\.mlp\.(up|gate)_proj"}),
    "some-layers": (
        "qwen2-bf16",
        {"r": 4, "target_modules": ["k_proj", "up_proj"], "layers_to_transform": [0, 2]},
    ),
    "head": ("llama", {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {"v_proj": 32, r"layers\.[02]\.mlp\.down_proj": 3},
        },
    ),
    "patterns-rslora": (
        "qwen3",
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": ["q_proj", "gate_proj"],
            "rank_pattern": {"gate_proj": 16},
        },
    ),
}


def of_peft(settings: dict[str, Any], **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", **settings, **more)


def read_by_peft(directory: Any, adapter: Any) -> Any:
    """PEFT's model with an adapter; a key that is missing or unexpected is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*adapter keys.*")
        model = peft.PeftModel.from_pretrained(torch_model(directory), adapter).eval()
    loaded = peft.set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora" in key]
    return model


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if "lora" in key}


@pytest.mark.parametrize("case", CASES)
def test_ours_in_peft(tiny, tmp_path, case):
    family, settings = CASES[case]
    model = jlora.load(tiny(family))
    tokens = random_tokens(2, 30)
    base = our_logits(model, tokens)
    config = jlora.LoraConfig(**settings, init_lora_weights=False)
    jlora.inject(model, config, rngs=nnx.Rngs(0))
    jlora.export_peft(tmp_path / "adapter", model, config)

    read = read_by_peft(tiny(family), tmp_path / "adapter")
    expected = torch_logits(read, tokens)
    assert np.abs(expected - base).max() > 1e-2
    np.testing.assert_allclose(our_logits(model, tokens), expected, atol=1e-4)

    fresh = peft.get_peft_model(torch_model(tiny(family)), of_peft(settings))
    assert factors(fresh).keys() == factors(read).keys()
    assert injection.count(model) == fresh.get_nb_trainable_parameters()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "stacked"])
def test_peft_adapter_in_ours(tiny, tmp_path, case, scan_layers):
    family, settings = CASES[case]
    theirs = peft.get_peft_model(
        torch_model(tiny(family)), of_peft(settings, init_lora_weights=False, lora_dropout=0.1)
    ).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    tokens = random_tokens(2, 30)
    expected = torch_logits(theirs, tokens)

    model = jlora.load(tiny(family), scan_layers=scan_layers)
    base = our_logits(model, tokens)
    jlora.import_peft(tmp_path / "adapter", model)
    assert np.abs(expected - base).max() > 1e-2
    np.testing.assert_allclose(our_logits(model, tokens), expected, atol=1e-4)
    assert injection.count(model) == theirs.get_nb_trainable_parameters()


def test_there_and_back_to_the_same_bits(tiny, tmp_path):
    config = jlora.LoraConfig(r=4, init_lora_weights=False)
    model = jlora.inject(jlora.load(tiny("llama")), config, rngs=nnx.Rngs(0))
    jlora.export_peft(tmp_path / "ours", model, config)
    theirs = peft.PeftModel.from_pretrained(torch_model(tiny("llama")), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = jlora.import_peft(tmp_path / "theirs", jlora.load(tiny("llama")))
    read, written = injection.partition(again)[0], injection.partition(model)[0]
    assert read.keys() == written.keys()
    for path, leaf in written.items():
        np.testing.assert_array_equal(read[path], leaf, path)


# SmolLM2 ------------------------------------------------------------------------------------------


def test_smollm2(smollm2, tmp_path):
    """Rank 16 on all linear layers of the real model."""
    model = jlora.load(smollm2)
    tokens = random_tokens(2, 48)
    base = our_logits(model, tokens)
    config = jlora.LoraConfig(r=16, lora_alpha=32, init_lora_weights=False)
    jlora.inject(model, config, rngs=nnx.Rngs(0))
    jlora.export_peft(tmp_path, model, config)
    theirs = read_by_peft(smollm2, tmp_path)
    expected = torch_logits(theirs, tokens)
    assert np.abs(expected - base).max() > 1  # of logits up to 30
    np.testing.assert_allclose(our_logits(model, tokens), expected, atol=1e-3)
    settings = dataclasses.asdict(config)
    same = {name: settings[name] for name in ("r", "lora_alpha", "target_modules")}
    fresh = peft.get_peft_model(torch_model(smollm2), of_peft(same))
    assert injection.count(model) == fresh.get_nb_trainable_parameters() == (4884480, 139399488)
