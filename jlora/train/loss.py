"""Next-token cross-entropy that never holds all logits, and spends nothing on untrained tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def chunk_size(tokens: int) -> int:
    """Tokens a chunk: an eighth of the batch, in whole 128s from 128 to 1024."""
    return min(max(-(-tokens // 8 // 128) * 128, 128), 1024)


@jax.custom_vjp
def cross_entropy(hidden: Array, head: Array, targets: Array, mask: Array) -> Array:
    """Summed cross-entropy of the trained tokens, with logits for one chunk of tokens at a time.

    Trained tokens are gathered first and only as many chunks run as they fill, so that prompts cost
    nothing here. The gradient is computed along with the value (it needs the same logits), that of
    `head` only where it is asked for.

    Args:
        hidden: (N, D) states.
        head: (V, D) output projection.
        targets: int32 (N,) tokens to predict.
        mask: bool (N,), True for trained tokens.

    Returns:
        float32 (), the sum of -log p in nats.
    """
    return _run(hidden, head, targets, mask, want_hidden=False, want_head=False)[0]


def _run(
    hidden: Array, head: Array, targets: Array, mask: Array, *, want_hidden: bool, want_head: bool
) -> tuple[Array, Array | None, Array | None]:
    """The loss, and the gradients of `hidden` and of `head` where wanted."""
    tokens, dim = hidden.shape
    chunk = chunk_size(tokens)
    # Trained tokens first, in order; what fills the last chunk points past the end and is dropped.
    order = jnp.nonzero(mask, size=-(-tokens // chunk) * chunk, fill_value=tokens)[0]
    count = mask.sum()

    def body(i: Array, carry: tuple) -> tuple:
        loss, d_hidden, d_head = carry
        rows = lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        valid = rows < tokens
        states = hidden.at[rows].get(mode="fill", fill_value=0)
        answer = targets.at[rows].get(mode="fill", fill_value=0)
        logits = jnp.einsum("nd,vd->nv", states, head, preferred_element_type=jnp.float32)
        # Relative to the largest logit, never to a log-sum-exp, which is rounded as coarsely as
        # any number of its size: nearly certain answers would lose digits of loss and of 1 - p.
        largest = logits.max(axis=-1, keepdims=True)
        log_norm = jnp.log(jnp.exp(logits - largest).sum(axis=-1, keepdims=True))
        picked = jnp.take_along_axis(logits, answer[:, None], axis=-1)
        loss = loss + jnp.where(valid, (log_norm - (picked - largest))[:, 0], 0).sum()
        if want_hidden or want_head:
            probs = jnp.exp((logits - largest) - log_norm)
            d_logits = probs - jax.nn.one_hot(answer, head.shape[0], dtype=probs.dtype)
            d_logits = jnp.where(valid[:, None], d_logits, 0).astype(hidden.dtype)
            if want_hidden:
                d_hidden = d_hidden.at[rows].set(d_logits @ head, mode="drop")
            if want_head:
                d_head = d_head + jnp.einsum(
                    "nv,nd->vd", d_logits, states, preferred_element_type=jnp.float32
                )
        return loss, d_hidden, d_head

    start = (
        jnp.zeros((), jnp.float32),
        jnp.zeros((tokens, dim), hidden.dtype) if want_hidden else None,
        jnp.zeros(head.shape, jnp.float32) if want_head else None,
    )
    return lax.fori_loop(0, -(-count // chunk), body, start)


def _forward(hidden: Any, head: Any, targets: Any, mask: Any) -> tuple[Array, tuple]:
    loss, d_hidden, d_head = _run(
        hidden.value,
        head.value,
        targets.value,
        mask.value,
        want_hidden=hidden.perturbed,
        want_head=head.perturbed,
    )
    like = jnp.zeros((), head.value.dtype)
    return loss, (d_hidden, d_head, like)


def _backward(saved: tuple, grad: Any) -> tuple:
    d_hidden, d_head, like = saved
    if not isinstance(grad, jax.Array):  # a symbolic zero: nothing depends on the loss
        grad = jnp.zeros((), jnp.float32)
    scale = functools.partial(jnp.multiply, grad)
    return (
        None if d_hidden is None else scale(d_hidden.astype(jnp.float32)).astype(d_hidden.dtype),
        None if d_head is None else scale(d_head).astype(like.dtype),
        None,
        None,
    )


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
