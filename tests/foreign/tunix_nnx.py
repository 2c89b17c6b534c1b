"""google-tunix's models, in NNX: einsum on plain parameters, caches as dictionaries of arrays."""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from models import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    POSITIONS,
    TOKENS,
    VOCAB,
    WIDTH,
    Model,
    one_by_one,
    positions,
)  # fmt: skip


def llama3(tied=False, remat="NONE"):
    """Einsum modules beside nnx.Linear."""
    from tunix.models.llama3 import model as llama3

    config = llama3.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=WIDTH,
        hidden_dim=HIDDEN,
        num_heads=HEADS,
        head_dim=WIDTH // HEADS,
        num_kv_heads=KV_HEADS,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=tied,
        remat_config=llama3.RematConfig[remat],
    )
    return _random_mlp(llama3.Llama3(config, rngs=nnx.Rngs(0))), None


def qwen3(tied=True, remat="NONE", experts=None):
    """With experts: three weights (experts, in, out) in one module."""
    from tunix.models.qwen3 import model as qwen3

    config = qwen3.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=WIDTH,
        hidden_dim=HIDDEN,
        num_heads=HEADS,
        head_dim=12,  # heads * head_dim need not be the width
        num_kv_heads=KV_HEADS,
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=tied,
        num_experts=experts,
        num_experts_per_tok=2 if experts else None,
        remat_config=qwen3.RematConfig[remat],
    )
    return _random_mlp(qwen3.Qwen3(config, rngs=nnx.Rngs(0))), None


def gemma3(remat="NONE"):
    """Key and value in one weight, gates that are nnx.Linear, an embedding used twice."""
    from tunix.models.gemma3 import model as gemma3

    config = gemma3.ModelConfig(
        num_layers=LAYERS,
        num_embed=VOCAB,
        embed_dim=WIDTH,
        hidden_dim=HIDDEN,
        num_heads=HEADS,
        head_dim=8,
        num_kv_heads=KV_HEADS,
        sliding_window_size=16,
        param_dtype=jnp.float32,
        remat_config=gemma3.RematConfig[remat],
    )
    return _random_mlp(gemma3.Gemma3(config, rngs=nnx.Rngs(0))), None


def _random_mlp(model):
    """Tunix initialises the MLP's kernels with zeros, where adapters would have no gradient."""
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "kernel" and path[-3] == "mlp":
            key = jax.random.fold_in(
                jax.random.key(1), zlib.crc32("/".join(map(str, path)).encode())
            )
            param.set_value(0.1 * jax.random.normal(key, param.shape, param.dtype))
    return model


def inputs(tokens=TOKENS):
    """Arguments of tunix's models: tokens, positions, cache, mask."""
    length = tokens.shape[-1]
    causal = jnp.broadcast_to(jnp.tri(length, dtype=bool), (tokens.shape[0], length, length))
    return tokens, positions(tokens), None, causal


def decode(heads, size):
    """Through a cache of POSITIONS places, of which a mask shows those that are filled."""

    def run(model, _):
        batch = TOKENS.shape[0]
        shape = (batch, POSITIONS, heads, size)
        cache = {
            f"layer_{i}": {
                "k": jnp.zeros(shape), "v": jnp.zeros(shape),
                "end_index": jnp.zeros((batch,), jnp.int32),
            }
            for i in range(LAYERS)
        }  # fmt: skip

        def step(token, i):
            nonlocal cache
            mask = jnp.broadcast_to(jnp.arange(POSITIONS) <= i, (batch, 1, POSITIONS))
            logits, cache = model(token, jnp.full_like(token, i), cache, mask)
            return logits

        return one_by_one(step)

    return run


def _row(name, build, sites, parameters, head=12):
    logits = lambda out: out[0]  # noqa: E731
    run = decode(KV_HEADS, head)
    return Model(name, "tunix", build, inputs, sites, parameters, logits, run)


ROWS = [
    _row("tunix_llama3", llama3, 14, 3_712, WIDTH // HEADS),
    _row("tunix_qwen3", qwen3, 14, 4_096),
    _row("tunix_qwen3_moe", lambda: qwen3(experts=4), 16, 10_144),
    _row("tunix_gemma3", gemma3, 12, 3_456, 8),
]
