"""Load in torch what `make foreign` exported of transformers' Linen models."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

EXPORTED = Path(__file__).parents[2] / "build" / "foreign"
# name -> its class, the number of its tensors, and how it is called with the inputs' arrays
MODELS = {
    "flax_llama": ("LlamaForCausalLM", 28, lambda m, x: m(x[0])),
    "flax_bert": (
        "BertForMaskedLM",
        26,
        lambda m, x: m(x[0], attention_mask=x[1], token_type_ids=x[2]),
    ),
    "flax_vit": (
        "ViTForImageClassification",
        26,
        lambda m, x: m(x[0].permute(0, 3, 1, 2).contiguous()),
    ),
    "flax_whisper": (
        "WhisperForConditionalGeneration",
        52,
        lambda m, x: m(x[0], decoder_input_ids=x[1], decoder_attention_mask=x[2]),
    ),
}


def written(path: Path) -> Path:
    """`path`, which must be there."""
    assert path.exists(), f"{path} is absent: `make foreign` writes it"
    return path


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_adapter_gives_the_same_logits_in_peft(name):
    cls, tensors, call = MODELS[name]
    with np.load(written(EXPORTED / name / "logits.npz")) as arrays:
        expected = dict(arrays)
    inputs = [torch.tensor(x) for key, x in sorted(expected.items()) if key.startswith("input_")]
    base = getattr(transformers, cls).from_pretrained(EXPORTED / name).eval()
    with torch.no_grad():
        plain = call(base, inputs).logits.numpy()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            model = PeftModel.from_pretrained(base, EXPORTED / name / "adapter").eval()
        adapted = call(model, inputs).logits.numpy()
    keys = {k for k in model.state_dict() if "lora_" in k}
    assert len(keys) == tensors
    np.testing.assert_allclose(plain, expected["plain"], atol=2e-5)
    np.testing.assert_allclose(adapted, expected["adapted"], atol=2e-5)
    assert np.abs(adapted - plain).max() > 1e-3 * np.abs(plain).max()


def test_names_of_flax_models_are_those_of_torch():
    """Each module that holds parameters, of every type that jlora exports without asking."""
    found = json.loads(written(EXPORTED / "names.json").read_text())
    strange = {}
    for flax, row in found.items():
        name = flax.removeprefix("Flax")
        cls = getattr(transformers, {"BertForCausalLM": "BertLMHeadModel"}.get(name, name))
        with torch.device("meta"):
            model = cls(CONFIG_MAPPING[row["type"]](**row["config"]))
        modules = {name for name, _ in model.named_modules()}
        if missing := [name for name in row["names"] if name not in modules]:
            strange[flax] = missing
    assert not strange
    assert len(found) > 50
