"""A decoder as jax-ml/bonsai writes Qwen3: layers that hold weights which the model's code reads.

The embedding's table is indexed, projections are einsums on their kernels, and a list of cache
modules is an argument, which each call writes. Written for these tests.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from models import (
    DECODED,
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
)  # fmt: skip

SIZE = 12  # of a head


class Cache(nnx.Module):
    """Keys and values (B, POSITIONS, N, H) of one layer, and how many of them there are."""

    def __init__(self, batch):
        shape = (batch, POSITIONS, KV_HEADS, SIZE)
        self.keys, self.values = nnx.Cache(jnp.zeros(shape)), nnx.Cache(jnp.zeros(shape))
        self.filled = nnx.Variable(jnp.zeros((), jnp.int32))


class Weights(nnx.Module):
    """A kernel, and the equation by which it is used."""

    def __init__(self, equation, shape, rngs):
        self.equation = equation
        self.w = nnx.Param(rngs.params.normal(shape) * shape[0] ** -0.5)

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class Attention(nnx.Module):
    """Grouped queries, norms of queries and keys; the cache is the argument's."""

    def __init__(self, rngs):
        self.q_proj = Weights("btd,dnh->btnh", (WIDTH, HEADS, SIZE), rngs)
        self.k_proj = Weights("bsd,dkh->bskh", (WIDTH, KV_HEADS, SIZE), rngs)
        self.v_proj = Weights("bsd,dkh->bskh", (WIDTH, KV_HEADS, SIZE), rngs)
        self.o_proj = Weights("btnh,nhd->btd", (HEADS, SIZE, WIDTH), rngs)
        self.q_norm, self.k_norm = (nnx.RMSNorm(SIZE, rngs=rngs) for _ in range(2))

    def __call__(self, x, cache):
        q, k = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
        at = cache.filled[...]
        cache.keys[...] = jax.lax.dynamic_update_slice(cache.keys[...], k, (0, at, 0, 0))
        cache.values[...] = jax.lax.dynamic_update_slice(
            cache.values[...], self.v_proj(x), (0, at, 0, 0)
        )
        cache.filled[...] = at + x.shape[1]
        seen = jnp.arange(POSITIONS)[None] <= at + jnp.arange(x.shape[1])[:, None]
        grouped = q.reshape(*q.shape[:2], KV_HEADS, HEADS // KV_HEADS, SIZE)
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, cache.keys[...]) * SIZE**-0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
        out = jnp.einsum("bkgts,bskh->btkgh", weights, cache.values[...])
        return self.o_proj(out.reshape(q.shape))


class MLP(nnx.Module):
    """Layers of nnx: one is called, of two the kernel is read by this code."""

    def __init__(self, rngs):
        self.gate_proj = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        gate = nnx.silu(jnp.dot(x, self.gate_proj.kernel[...]))
        return jnp.dot(gate * self.up_proj(x), self.down_proj.kernel[...])


class Layer(nnx.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, rngs):
        self.input_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.self_attn = Attention(rngs)
        self.post_attention_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mlp = MLP(rngs)

    def __call__(self, x, cache):
        x = x + self.self_attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nnx.Module):
    """Learnt positions in place of rotations; the head is the embedding's transpose."""

    def __init__(self, rngs):
        self.embedder = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.places = nnx.Embed(POSITIONS, WIDTH, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.final_norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens, caches):
        at = caches[0].filled[...] + jnp.arange(tokens.shape[1])
        x = self.embedder.embedding[...].at[tokens].get() + self.places(at)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache)
        return jnp.dot(self.final_norm(x), self.embedder.embedding[...].T)


def caches():
    """Empty ones."""
    return [Cache(TOKENS.shape[0]) for _ in range(LAYERS)]


def _decode(model, _):
    held = caches()
    logits = one_by_one(lambda token, i: model(token, held))
    return logits + 0 * sum(cache.filled[...] - DECODED for cache in held)


PROJECTIONS = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
ROWS = [
    Model(
        "bonsai_qwen3", "bonsai-like", lambda: (Qwen3(nnx.Rngs(0)), None),
        lambda: (TOKENS, caches()), 15, 4_608, decode=_decode,
        target_modules=(*PROJECTIONS, "embedder"),
    ),
]  # fmt: skip
