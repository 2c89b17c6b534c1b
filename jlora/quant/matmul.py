"""Contractions with a quantised weight, which is dequantised for that contraction alone.

What the backward pass needs is the codes, never the dequantised weight: it would be as large as the
base that quantisation made small. The weight's own gradient is not computed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora.adapter import split_equation
from jlora.quant.array import QuantArray


def contract(
    x: Array, q: QuantArray, equation: str, *, dtype: Any = None, precision: Any = None
) -> Array:
    """The einsum of an input and a quantised weight; differentiable with respect to the input.

    Args:
        x: the input.
        q: the weight, of no stacked layers.
        equation: input, weight -> output as for `jnp.einsum`.
        dtype: of the computation and of the result; None means x's.
        precision: of the product, as for `jnp.einsum`.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    return _contraction(equation.replace(" ", ""), dtype, precision)(x.astype(dtype), q)


@functools.cache
def _contraction(equation: str, dtype: Any, precision: Any) -> Callable[[Array, QuantArray], Array]:
    inputs, weight, out = ("".join(term) for term in split_equation(equation))
    back = f"{out},{weight}->{inputs}"

    @jax.custom_vjp
    def run(x: Array, q: QuantArray) -> Array:
        # Or weights that share an input would be dequantised in one go, and those of a loop before
        # it. Tied to their input are the scales alone: XLA would cut the codes out of a stack only
        # once for forward and backward, and keep them.
        x, scales = lax.optimization_barrier((x, dataclasses.replace(q, codes=None)))
        q = dataclasses.replace(scales, codes=q.codes)
        return jnp.einsum(equation, x, q.dequantize(dtype), precision=precision)

    def forward(x: Array, q: QuantArray) -> tuple[Array, QuantArray]:
        return run(x, q), q

    def backward(q: QuantArray, dy: Array) -> tuple[Array, None]:
        # Or XLA would find that forward and backward dequantise alike, and keep every layer's
        # weight from the one to the other.
        q, dy = lax.optimization_barrier((q, dy))
        return jnp.einsum(back, dy, q.dequantize(dtype), precision=precision), None

    run.defvjp(forward, backward)
    return run
