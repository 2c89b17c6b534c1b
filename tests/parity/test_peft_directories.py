"""PEFT directories as others write them, that PEFT loads and that are whole: the same logits."""

import json
import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch
from counterpart import our_logits, random_tokens, torch_logits, torch_model
from safetensors.torch import load_file, save_file

import jlora
from jlora.errors import JloraError

Q = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}


def trained(directory: Any, **settings: Any) -> peft.PeftModel:
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    return peft.get_peft_model(torch_model(directory), config).eval()


def rename(directory: Any, change: Any) -> None:
    file = directory / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)


def configure(directory: Any, **changes: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def default_infix(at: Any) -> None:
    rename(at, lambda key: key.replace(".weight", ".default.weight"))


def no_layer(at: Any) -> None:
    configure(at, target_modules=["q_proj", "v_proj", "c_attn", "query_key_value"])


def no_pattern(at: Any) -> None:
    configure(at, rank_pattern={"h.0.c_attn": 2}, alpha_pattern={"h.1.c_attn": 9},
              exclude_modules=["vision_tower"])  # fmt: skip


# The settings, the family, and what is done to the directory.
CASES: dict[str, tuple[dict[str, Any], str, Any]] = {
    "one layer": (Q | {"layers_to_transform": 1}, "llama", lambda at: configure(
        at, layers_to_transform=1)),
    "the first layer": (Q | {"layers_to_transform": [0]}, "qwen3", lambda at: configure(
        at, layers_to_transform=0)),
    "no layers are all": (Q, "mistral", lambda at: configure(at, layers_to_transform=[])),
    "what stands before the number": (
        Q | {"layers_to_transform": [1], "layers_pattern": ["layers", "h"]}, "llama",
        lambda at: None,
    ),
    "axes that torch keeps as they are": (
        Q, "qwen3", lambda at: configure(at, fan_in_fan_out=True)
    ),
    "an adapter's name in the names": (Q, "llama", default_infix),
    "the same of an embedding": (
        {"target_modules": ["embed_tokens", "q_proj"]}, "llama",
        lambda at: rename(at, lambda key: key.replace(".weight", ".default.weight")
                          if ".lora_A." in key or ".lora_B." in key
                          else key.replace("embedding_A", "embedding_A.default")
                                  .replace("embedding_B", "embedding_B.default")),
    ),
    "targets that the model lacks": (Q, "llama", no_layer),
    "patterns that match nothing": (Q, "qwen3", no_pattern),
    "a layer that is not there": (
        Q | {"layers_to_transform": [0, 2]}, "llama",
        lambda at: configure(at, layers_to_transform=[0, 2, 40])),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_loads_as_in_peft(tiny, tmp_path, case):
    settings, family, change = CASES[case]
    trained(tiny(family), **settings).save_pretrained(tmp_path)
    change(tmp_path)
    tokens = random_tokens(2, 20)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(torch_model(tiny(family)), tmp_path).eval()
    expected = torch_logits(theirs, tokens)
    model = jlora.load(tiny(family))
    assert np.abs(expected - our_logits(model, tokens)).max() > 0.1
    jlora.load_adapter(tmp_path, model)
    np.testing.assert_allclose(our_logits(model, tokens), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", {"trainable_token_indices": [3, 5]}),
        ("llama-tied", {}),
        ("qwen2-bf16", {}),
    ],
    ids=["llama", "rows", "tied", "bf16"],
)
def test_embeddings_beside_the_factors(tiny, tmp_path, family, more):
    theirs = trained(tiny(family), **Q, **more)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert any(key.endswith(("embed_tokens.weight", "base_layer.weight")) for key in tensors)
    tokens = random_tokens(2, 20)
    expected = torch_logits(theirs, tokens)
    model = jlora.load_adapter(tmp_path, jlora.load(tiny(family)))
    np.testing.assert_allclose(our_logits(model, tokens), expected, atol=1e-4)


def test_another_embedding_beside_the_factors_and_its_remedy(tiny, tmp_path):
    theirs = trained(tiny("llama"), **Q)
    theirs.get_input_embeddings().weight.data[7:9] += 1
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(JloraError, match=r"embed_tokens\.weight differs in 2 of 97 rows") as caught:
        jlora.load_adapter(tmp_path / "adapter", jlora.load(tiny("llama")))
    assert ".unload()" in str(caught.value)
    # What the message says to do.
    loaded = peft.PeftModel.from_pretrained(torch_model(tiny("llama")), tmp_path / "adapter")
    tokens = torch.tensor(random_tokens(2, 20), dtype=torch.long)
    with torch.no_grad():
        expected = loaded.eval()(input_ids=tokens).logits.numpy()
    loaded.unload().save_pretrained(tmp_path / "base")
    model = jlora.load_adapter(tmp_path / "adapter", jlora.load(tmp_path / "base"))
    np.testing.assert_allclose(our_logits(model, random_tokens(2, 20)), expected, atol=1e-4)
