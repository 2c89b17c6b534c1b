"""Each family of models against transformers, on random weights."""

import numpy as np
import pytest
import torch
from counterpart import FAMILIES, our_logits, random_tokens, torch_logits, torch_model
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import jlora
from jlora.models import families
from jlora.models.attention import rotary_tables


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(tiny, family, scan_layers):
    directory = tiny(family)
    tokens = random_tokens(2, 40)
    expected = torch_logits(torch_model(directory), tokens)
    got = our_logits(jlora.load(directory, scan_layers=scan_layers), tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("theta", [10000.0, 100000.0, 500000.0, 1000000.0, 12345.6])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_rotary_frequencies(tmp_path, theta, head_dim):
    """At most one unit in the last place apart, which at position 8191 is 5e-4 of a radian."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=97,
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    config.save_pretrained(tmp_path)
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    got = np.array(families.read_config(tmp_path).inv_freq, np.float32)
    np.testing.assert_array_max_ulp(got, expected, maxulp=1)
    positions = np.arange(0, 8192, 127, dtype=np.int32)[None]
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    for ours, theirs in zip(
        rotary_tables(positions, got, np.dtype(np.float32)), expected, strict=True
    ):
        np.testing.assert_allclose(ours[0, :, 0], theirs[0, :, : head_dim // 2], atol=6e-4)
