"""Grouped-query attention with a backward pass of its own, and rotary position embeddings."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array


def rotary_tables(positions: Array, inv_freq: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Cosines and sines of rotary embeddings (Su et al. 2021, arXiv:2104.09864).

    Args:
        positions: int32 (B, T).
        inv_freq: float32 (H/2,), radians a position.
        dtype: of the result.

    Returns:
        cos and sin, each (B, T, 1, H/2).
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate each pair (x[i], x[i + H/2]) of (B, T, N, H) by its angle."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@jax.custom_vjp
def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """softmax(q k^T / sqrt(H)) v, each group of query heads sharing one key and value head.

    Written out with its own gradient, which keeps the probabilities: faster on CPU than what
    autodiff makes of `jax.nn.dot_product_attention`.

    Args:
        q: (B, T, N, H).
        k: (B, S, K, H), N a multiple of K.
        v: (B, S, K, H).
        mask: bool, (B, T, S), True where a query may look; a row with no True gives the mean of v.

    Returns:
        (B, T, N, H) in q's dtype; the softmax is in float32.
    """
    return _forward(q, k, v, mask)[0]


def _grouped(q: Array, kv_heads: int) -> Array:
    B, T, N, H = q.shape
    return q.reshape(B, T, kv_heads, N // kv_heads, H)


def _forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple]:
    scale = 1 / math.sqrt(q.shape[-1])
    grouped = _grouped(q, k.shape[2]) * jnp.asarray(scale, q.dtype)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = dot("btkgh,bskh->bkgts", grouped, k)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(q.shape)
    return out, (grouped, k, v, probs, out)


def _backward(saved: tuple, grad: Array) -> tuple[Array, Array, Array, None]:
    grouped, k, v, probs, out = saved
    scale = 1 / math.sqrt(k.shape[-1])
    d_out = _grouped(grad, k.shape[2])
    d_v = jnp.einsum("bkgts,btkgh->bskh", probs, d_out)
    d_probs = jnp.einsum("btkgh,bskh->bkgts", d_out, v, preferred_element_type=jnp.float32)
    # sum_s probs * d_probs = sum_h out * d_out, which is the smaller of the two.
    inner = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    inner = _grouped(inner[..., None], k.shape[2])[..., 0].transpose(0, 2, 3, 1)
    d_scores = (probs.astype(jnp.float32) * (d_probs - inner[..., None])).astype(grouped.dtype)
    d_q = jnp.einsum("bkgts,bskh->btkgh", d_scores, k).reshape(grad.shape)
    d_k = jnp.einsum("bkgts,btkgh->bskh", d_scores, grouped)
    return d_q * jnp.asarray(scale, d_q.dtype), d_k, d_v, None


attention.defvjp(_forward, _backward)
