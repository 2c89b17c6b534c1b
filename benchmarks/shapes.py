"""Shapes of well-known models, and random models of them whose weights are made leaf by leaf."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jlora
from jlora.models.transformer import CausalLM, ModelConfig


def _llama(theta: float = 1e4, **sizes: Any) -> ModelConfig:
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    frequencies = tuple(theta ** (-np.arange(0, head_dim, 2) / head_dim))
    sizes = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False} | sizes
    return ModelConfig(head_dim=head_dim, inv_freq=frequencies, **sizes)


SHAPES = {
    "smollm2-135m": _llama(
        theta=1e5,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "llama2-7b": _llama(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "llama2-70b": _llama(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}


def abstract_model(
    config: ModelConfig,
    lora: jlora.LoraConfig,
    *,
    quant: jlora.QuantConfig | None,
    dtype: Any,
    scan_layers: bool,
    remat: bool,
) -> CausalLM:
    """An injected model with shapes for weights: nothing is allocated."""

    def make() -> Any:
        rngs = nnx.Rngs(0)
        model = CausalLM(config, rngs=rngs, dtype=dtype, scan_layers=scan_layers, remat=remat)
        if quant is not None:
            jlora.quantize(model, quant)
        return jlora.inject(model, lora, rngs=nnx.Rngs(1))

    return nnx.eval_shape(make)


def random_leaves(tree: Any, seed: int) -> Any:
    """Random arrays for the shapes of a tree; never more than one leaf is held in float32."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))
    made = [_random(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, made)


def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Codes are any bytes; of floats, matrices are normal, vectors and scales a constant."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)
    if len(shape) < 2:
        return jnp.ones(shape, dtype)
    deviation = 1 / math.sqrt(shape[-2])
    return _normal(key, shape, jnp.dtype(dtype)) * jnp.asarray(deviation, dtype)


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.jit(jax.random.normal, static_argnums=(1, 2))(key, shape, dtype)
