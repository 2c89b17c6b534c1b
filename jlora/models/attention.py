"""Grouped-query attention with backward passes of its own, and rotary position embeddings.

There are two, of the same numbers: one that keeps the probabilities, which is the fastest on CPU,
and one that never holds them all, for accelerators.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax


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


# Scores that are held at once, and the fewest rows of them: matrix units want 128.
_SCORES, _ROWS = 2**23, 128

# On CPU, parts of a whole sequence, and the fewest rows of one. Four spare 6 % of a training step
# at 256 tokens and 17 % at 1024; eight no more at 256, and 19 % at 1024.
_PARTS, _PART_ROWS = 4, 64


def causal_attention(
    q: Array, k: Array, v: Array, valid: Array, slots: Array | None = None
) -> Array:
    """softmax(q k^T / sqrt(H)) v over the keys that a query may see.

    Which of the two ways it takes follows from the platform that it is compiled for. (Its
    derivative has zeros for what the other would keep, as branches have: XLA drops them.)

    Args:
        q: (B, T, N, H).
        k: (B, S, K, H), N a multiple of K: each group of query heads shares a key and value head.
        v: (B, S, K, H).
        valid: bool (B, S), False for keys that no query sees; or (B, T, S), what each query sees,
            whatever its slot.
        slots: int32 (T,), the last key that each query sees; None where that is its own, S = T.

    Returns:
        (B, T, N, H) in q's dtype; the softmax is in float32. A query that sees nothing gets a mean
        of v.
    """
    if valid.ndim == 3:
        return attention(q, k, v, valid)
    on_cpu = _whole_attention
    if slots is None:
        on_cpu, slots = _parts_attention, jnp.arange(q.shape[1])
    return lax.platform_dependent(q, k, v, valid, slots, cpu=on_cpu, default=blocked_attention)


def visible(valid: Array, slots: Array) -> Array:
    """Where a query may look, bool (B, T, S); arguments as for `causal_attention`."""
    return (jnp.arange(valid.shape[1]) <= slots[:, None]) & valid[:, None, :]


def windowed(valid: Array, slots: Array | None, window: int) -> Array:
    """Return where a query may look that sees no more than `window` slots, its own the last.

    Args:
        valid: bool (B, S), False for keys that no query sees; or (B, T, S), what each query sees.
        slots: as for `causal_attention`.
        window: how many slots, padding counted.

    Returns:
        bool (B, T, S).
    """
    own = jnp.arange(valid.shape[-1]) if slots is None else slots
    seen = visible(valid, own) if valid.ndim == 2 else valid
    return seen & (jnp.arange(valid.shape[-1]) > own[:, None] - window)


def _whole_attention(q: Array, k: Array, v: Array, valid: Array, slots: Array) -> Array:
    return attention(q, k, v, visible(valid, slots))


def _parts_attention(q: Array, k: Array, v: Array, valid: Array, slots: Array) -> Array:
    """Of a whole sequence: some queries after others, each with no keys after its own part."""
    length = q.shape[1]
    rows = max(-(-length // _PARTS), _PART_ROWS)
    parts = []
    for start in range(0, length, rows):
        end = min(start + rows, length)
        mask = visible(valid[:, :end], slots[start:end])
        parts.append(attention(q[:, start:end], k[:, :end], v[:, :end], mask))
    return jnp.concatenate(parts, axis=1)


@jax.custom_vjp
def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """`causal_attention` with any mask, bool (B, T, S).

    Written out with its own gradient, which keeps the probabilities: faster on CPU than what
    autodiff makes of `jax.nn.dot_product_attention`.
    """
    return _forward(q, k, v, mask)[0]


def _forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple]:
    kv_heads = k.shape[2]
    q = _scaled_rows(q, kv_heads)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    by_query = _scores(q, k, mask)
    probs = jax.nn.softmax(by_query, axis=-1).astype(q.dtype)
    probs = probs.reshape(*q.shape[:3], k.shape[2])
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


attention.defvjp(_forward, _backward)


@jax.custom_vjp
def blocked_attention(q: Array, k: Array, v: Array, valid: Array, slots: Array) -> Array:
    """`causal_attention` for some queries after others: scores are held for these alone.

    The backward pass computes them again, from each row's largest score and sum (Rabe & Staats
    2021, arXiv:2112.05682; Dao et al. 2022, arXiv:2205.14135).
    """
    return _blocked_forward(q, k, v, valid, slots)[0]


def _blocked_forward(
    q: Array, k: Array, v: Array, valid: Array, slots: Array
) -> tuple[Array, tuple]:
    # Or the masks of all blocks, which are those of every layer, would be computed once and kept.
    q, valid, slots = lax.optimization_barrier((q, valid, slots))
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    blocks = _query_blocks(q, k)

    def block(_: None, xs: tuple[Array, Array]) -> tuple[None, tuple[Array, ...]]:
        q, slots = xs
        scores = _scores(_scaled_rows(q, k.shape[2]), keys, visible(valid, slots))
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        probs = (weights / total).astype(q.dtype)
        out = jnp.einsum("bkgts,bksh->btkgh", probs, values)
        return None, (out.reshape(q.shape), largest, total)

    _, (out, largest, total) = lax.scan(
        block, None, (_split(q, 1, blocks), _split(slots, 0, blocks))
    )
    out = _join(out, q.shape[1])
    return out, (q, k, v, valid, slots, out, largest, total)


def _blocked_backward(saved: tuple, grad: Array) -> tuple:
    q, k, v, valid, slots, out, largest, total = saved
    grad, valid, slots = lax.optimization_barrier((grad, valid, slots))
    kv_heads, scale = k.shape[2], jnp.asarray(1 / math.sqrt(k.shape[-1]), q.dtype)
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    blocks = len(total)
    # sum_s probs * d_probs = sum_h out * d_out, which is the smaller of the two.
    inner = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1, keepdims=True)

    def block(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], Array]:
        d_k, d_v = carry
        q, d_out, inner, slots, largest, total = xs
        q, d_out, inner = _scaled_rows(q, kv_heads), _rows(d_out, kv_heads), _rows(inner, kv_heads)
        scores = _scores(q, keys, visible(valid, slots))
        probs = (jnp.exp(scores - largest) / total).reshape(*q.shape[:3], -1)
        d_v += _dot("bkms,bkmh->bksh", probs.astype(q.dtype), d_out)
        d_probs = _dot("bkmh,bksh->bkms", d_out, values)
        d_scores = (probs * (d_probs - inner)).astype(q.dtype)
        d_k += _dot("bkms,bkmh->bksh", d_scores, q)
        d_q = jnp.einsum("bkms,bksh->bkmh", d_scores, keys) * scale
        return (d_k, d_v), _heads(d_q, slots.size)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    by_query = (_split(x, 1, blocks) for x in (q, grad, inner))
    xs = (*by_query, _split(slots, 0, blocks), largest, total)
    (d_k, d_v), d_q = lax.scan(block, (zeros, zeros), xs)
    d_k, d_v = (x.astype(k.dtype).swapaxes(1, 2) for x in (d_k, d_v))
    return _join(d_q, q.shape[1]), d_k, d_v, None, None


blocked_attention.defvjp(_blocked_forward, _blocked_backward)


def _query_blocks(q: Array, k: Array) -> int:
    """Into how many blocks the queries are split."""
    B, T, N, _ = q.shape
    rows = max(_SCORES // (B * N * k.shape[1]) // _ROWS, 1) * _ROWS
    return -(-T // rows)


def _split(x: Array, axis: int, blocks: int) -> Array:
    """Blocks of equal size along an axis, padded with zeros, on a new first axis."""
    rows = -(-x.shape[axis] // blocks)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, blocks * rows - x.shape[axis])
    shape = (*x.shape[:axis], blocks, rows, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, padding).reshape(shape), axis, 0)


def _join(blocks: Array, length: int) -> Array:
    """The inverse of `_split` along axis 1, of an array of that length."""
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _scaled_rows(q: Array, kv_heads: int) -> Array:
    return _rows(q, kv_heads) * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)


def _scores(q: Array, k: Array, mask: Array) -> Array:
    """Masked scores, float32 (B, K, G, T, S), of rows of scaled queries and keys (B, K, S, H)."""
    scores = _dot("bkmh,bksh->bkms", q, k)
    scores = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


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
