"""Merging against PEFT's merge_and_unload, and merged directories in transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from counterpart import our_logits, random_tokens, torch_logits, torch_model
from flax import nnx
from helpers import contents

import jlora
from jlora import injection, merging
from jlora.commands import MergeConfig
from jlora.models.tensors import Tensors

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "tied": ("llama-tied", {"r": 3, "target_modules": "all-linear"}),
    "biases": ("llama3-rope-biases", {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("mistral", {"r": 4, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]}),
    "half": ("qwen2-bf16", {"r": 4, "target_modules": ["k_proj", "up_proj"]}),
    "head": ("llama", {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "patterns": (
        "qwen3",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {"v_proj": 32, r"layers\.[02]\.mlp\.down_proj": 3},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_merge_and_unload(tiny, tmp_path: Path, case: str) -> None:
    family, settings = CASES[case]
    directory = tiny(family)
    before = contents(directory)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", **settings, init_lora_weights=False)
    theirs = peft.get_peft_model(torch_model(directory), lora).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    tokens = random_tokens(2, 30)
    adapted = torch_logits(theirs, tokens)
    merged = theirs.merge_and_unload().state_dict()

    model = jlora.import_peft(tmp_path / "adapter", jlora.load(directory))
    leaves, _ = injection.partition(model, everything=True)
    bits = {path: np.array(leaf) for path, leaf in leaves.items()}
    in_memory = jlora.merge(model)
    for path, leaf in injection.partition(model, everything=True)[0].items():
        np.testing.assert_array_equal(leaf, bits[path], path)
    np.testing.assert_allclose(our_logits(in_memory, tokens), adapted, atol=1e-4)

    given = MergeConfig(
        model=directory, adapter=tmp_path / "adapter", to=tmp_path / "merged", dtype="float32"
    )
    merging.merge(given)
    assert contents(directory) == before
    ours = Tensors(tmp_path / "merged")
    names = ours.shapes()
    assert set(merged) - set(names) <= {"lm_head.weight"}
    moved = 0
    for name in names:
        value = merged[name].numpy()
        assert np.abs(ours.read(name) - value).max() <= 1e-6 * np.abs(value).max(), name
        moved += not np.array_equal(ours.read(name), Tensors(directory).read(name))
    assert moved >= 4
    np.testing.assert_allclose(
        torch_logits(torch_model(tmp_path / "merged"), tokens), adapted, atol=1e-4
    )
    np.testing.assert_allclose(
        our_logits(jlora.load(tmp_path / "merged"), tokens), adapted, atol=1e-4
    )


def test_a_directory_in_its_own_dtype_loads_in_transformers(tiny, tmp_path: Path) -> None:
    """bfloat16, in shards, tied; with biases trained."""
    config = jlora.LoraConfig(r=4, init_lora_weights=False, bias="all")
    model = jlora.inject(jlora.load(tiny("qwen2-bf16")), config, rngs=nnx.Rngs(0))
    leaves, _ = jlora.partition(model)
    injection.update(model, {p: x + 0.1 * p.endswith("bias") for p, x in leaves.items()})
    jlora.save_adapter(tmp_path / "a", model, config)
    given = MergeConfig(model=tiny("qwen2-bf16"), adapter=tmp_path / "a", to=tmp_path / "m")
    merging.merge(given)
    tokens = random_tokens(2, 30)
    ours = our_logits(jlora.load(tmp_path / "m"), tokens)
    np.testing.assert_allclose(torch_logits(torch_model(tmp_path / "m"), tokens), ours, atol=1e-4)
    assert np.abs(ours - our_logits(model, tokens)).max() < 0.1
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1


def test_an_export_says_more_than_peft_reads(tiny, tmp_path: Path) -> None:
    """The fingerprint in the file's metadata is passed over by PEFT, which drops it on saving."""
    config = jlora.LoraConfig(r=4, init_lora_weights=False)
    model = jlora.inject(jlora.load(tiny("llama")), config, rngs=nnx.Rngs(0))
    jlora.export_peft(tmp_path / "ours", model, config)
    assert jlora.adapters.read(tmp_path / "ours").base is not None
    theirs = peft.PeftModel.from_pretrained(torch_model(tiny("llama")), tmp_path / "ours").eval()
    tokens = random_tokens(2, 30)
    np.testing.assert_allclose(our_logits(model, tokens), torch_logits(theirs, tokens), atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert jlora.adapters.read(tmp_path / "theirs").base is None
