"""Quantised model directories: those of transformers and bitsandbytes here, and ours there."""

from pathlib import Path
from typing import Any

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import jlora
from jlora.models import load
from jlora.quant.array import QuantArray

TOKENS = np.random.default_rng(0).integers(3, 270, (2, 24))
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
KINDS = {
    "nf4": (jlora.QuantConfig(), {"bnb_4bit_quant_type": "nf4"}),
    "fp4": (jlora.QuantConfig(kind="fp4"), {"bnb_4bit_quant_type": "fp4"}),
    "nf4-double": (
        jlora.QuantConfig(double_quant=True),
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
}


def theirs(model_dir: Path, **quantised: Any) -> Any:
    if quantised:
        settings = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} | quantised
        quantised = {"quantization_config": BitsAndBytesConfig(**settings)}
    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, device_map="cpu", **quantised
    ).eval()


def torch_logits(model: Any) -> np.ndarray:
    """In training mode: to evaluate, bitsandbytes computes in bfloat16 on CPUs that can."""
    return model.train()(torch.tensor(TOKENS)).logits.detach().numpy()


def our_logits(model: Any) -> np.ndarray:
    return np.asarray(model(jnp.asarray(TOKENS)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_that_transformers_wrote(kind: str, tied: bool, tmp_path: Path) -> None:
    source = helpers.write_model(tmp_path / "model", tie_word_embeddings=tied, **SIZES)
    model = theirs(source, **KINDS[kind][1])
    model.save_pretrained(tmp_path / "theirs")
    loaded = jlora.load(tmp_path / "theirs")
    assert isinstance(loaded.model.layers[1].mlp.up_proj.kernel.get_value(), QuantArray)
    expected = torch_logits(model)
    assert np.abs(expected).max() > 0.1
    assert np.abs(our_logits(loaded) - expected).max() < 1e-3
    stacked = jlora.load(tmp_path / "theirs", scan_layers=True)
    assert np.abs(our_logits(stacked) - expected).max() < 1e-3
    # And what quantising the same weights here gives.
    ours = jlora.load(source, quant=KINDS[kind][0])
    # The last bit of their mean of all scales depends on the number of threads.
    assert np.abs(our_logits(ours) - expected).max() < (3e-3 if "double" in kind else 1e-3)


@pytest.mark.parametrize("excluded", [None, ("down_proj",)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_that_we_wrote(kind: str, excluded: Any, tmp_path: Path) -> None:
    source = helpers.write_model(tmp_path / "model", **SIZES)
    config = KINDS[kind][0]
    if excluded:
        config = jlora.QuantConfig(
            kind=config.kind, double_quant=config.double_quant, exclude_modules=excluded
        )
    load.quantize(source, tmp_path / "ours", config)
    ours = jlora.load(tmp_path / "ours")
    model = theirs(tmp_path / "ours")
    layer = model.model.layers[1].mlp
    assert type(layer.up_proj).__name__ == "Linear4bit"
    assert (type(layer.down_proj).__name__ == "Linear4bit") == (not excluded)
    expected = our_logits(ours)
    assert np.abs(expected).max() > 0.1
    assert np.abs(torch_logits(model) - expected).max() < 1e-3


def test_int8_directories(tmp_path: Path) -> None:
    source = helpers.write_model(tmp_path / "model", **SIZES)
    file = source / "model.safetensors"  # bitsandbytes makes float16 of a weight first
    save_file({k: v.astype(np.float16) for k, v in load_file(file).items()}, file)
    model = theirs(source, load_in_4bit=False, load_in_8bit=True)
    model.save_pretrained(tmp_path / "theirs")
    own = jlora.load(source, quant=jlora.QuantConfig(kind="int8"))
    loaded = jlora.load(tmp_path / "theirs")
    weights = [m.model.layers[0].mlp.up_proj.kernel.get_value() for m in (own, loaded)]
    np.testing.assert_array_equal(weights[0].codes, weights[1].codes)
    np.testing.assert_array_equal(weights[0].absmax, weights[1].absmax)
    load.quantize(source, tmp_path / "ours", jlora.QuantConfig(kind="int8"))
    again = theirs(tmp_path / "ours")
    assert type(again.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    # Their int8 layers also quantise activations: only like is compared with like.
    np.testing.assert_allclose(torch_logits(again), torch_logits(model), atol=2e-2)
