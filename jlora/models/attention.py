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

    def row(positions: Array) -> tuple[Array, Array]:
        angles = positions[:, None, None].astype(jnp.float32) * inv_freq
        return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)

    # A loop over the rows keeps XLA from fusing the cosines into each layer's use of them and
    # computing them again for every head there, which took 6 % of a training step on CPU.
    return jax.lax.map(row, positions)


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


def _forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple]:
    kv_heads = k.shape[2]
    q = _rows(q, kv_heads) * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = _dot("bkmh,bksh->bkms", q, k)
    by_query = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])  # (B, K, G, T, S)
    by_query = jnp.where(mask[:, None, None], by_query, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(by_query, axis=-1).astype(q.dtype).reshape(scores.shape)
    out = jnp.einsum("bkms,bksh->bkmh", probs, v)
    return _heads(out, mask.shape[1]), (q, k, v, probs, out)


def _backward(saved: tuple, grad: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, probs, out = saved
    length, scale = grad.shape[1], 1 / math.sqrt(k.shape[-1])
    d_out = _rows(grad, k.shape[1])
    d_v = jnp.einsum("bkms,bkmh->bksh", probs, d_out)
    d_probs = _dot("bkmh,bksh->bkms", d_out, v)
    # sum_s probs * d_probs = sum_h out * d_out, which is the smaller of the two.
    inner = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_scores = (probs.astype(jnp.float32) * (d_probs - inner)).astype(q.dtype)
    d_q = jnp.einsum("bkms,bksh->bkmh", d_scores, k) * jnp.asarray(scale, q.dtype)
    d_k = jnp.einsum("bkms,bkmh->bksh", d_scores, q)
    return _heads(d_q, length), d_k.swapaxes(1, 2), d_v.swapaxes(1, 2), None


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _rows(x: Array, kv_heads: int) -> Array:
    """(B, T, N, H) to (B, K, G T, H), the queries of one key head as the rows of one matrix.

    Every product here is then one of matrices over the leading axes B and K, for which XLA need not
    transpose the T x S scores.
    """
    B, T, N, H = x.shape
    grouped = x.reshape(B, T, kv_heads, N // kv_heads, H)
    return grouped.transpose(0, 2, 3, 1, 4).reshape(B, kv_heads, -1, H)


def _heads(rows: Array, length: int) -> Array:
    """The inverse of `_rows`: (B, K, G T, H) to (B, T, N, H)."""
    B, K, _, H = rows.shape
    return rows.reshape(B, K, -1, length, H).transpose(0, 3, 1, 2, 4).reshape(B, length, -1, H)


attention.defvjp(_forward, _backward)
