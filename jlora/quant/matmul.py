"""Contractions with a quantised weight, which is dequantised for that contraction alone.

What the backward pass needs is the codes, never the dequantised weight: it would be as large as the
base that quantisation made small. The weight's own gradient is not computed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora.adapter import split_equation
from jlora.errors import JloraError
from jlora.quant import pallas_gpu, pallas_tpu
from jlora.quant.array import QuantArray
from jlora.quant.codebooks import CODEBOOKS


def contract(
    x: Array, q: QuantArray, equation: str, *, dtype: Any = None, precision: Any = None
) -> Array:
    """The einsum of an input and a quantised weight; differentiable with respect to the input.

    In reverse mode, that is, as custom_vjp has it: not by jax.jvp.

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
    if lost := set(inputs) - set(weight) - set(out):
        raise JloraError(
            f"{equation!r} sums over {', '.join(sorted(lost))}, which the weight does not have: "
            "sum the input first"
        )

    def plain(x: Array, q: QuantArray) -> Array:
        return jnp.einsum(equation, x, _dequantize(x, q, dtype), precision=precision)

    @jax.custom_vjp
    def run(x: Array, q: QuantArray) -> Array:
        fused = fused_for(x, q, equation) if precision is None else {}
        if not fused:
            return plain(x, q)
        # On a host with an accelerator, something may still be compiled for its CPU.
        return lax.platform_dependent(x, q, **fused, default=plain)

    def forward(x: Array, q: QuantArray) -> tuple[Array, QuantArray]:
        return run(x, q), q

    def backward(q: QuantArray, dy: Array) -> tuple[Array, None]:
        w = _dequantize(dy, q, dtype, backward=True)
        return jnp.einsum(back, dy, w, precision=precision), None

    run.defvjp(forward, backward)
    return run


def _dequantize(x: Array, q: QuantArray, dtype: Any, backward: bool = False) -> Array:
    """The weight, not before its input `x` is there, and anew for each input.

    Else XLA would dequantise weights that share an input in one go, those of a loop before it, and
    those of unrolled layers all at the start; and it would see that forward and backward dequantise
    alike, and keep every layer's weight from the one to the other.
    """

    def barrier(x: Array, q: QuantArray) -> Array:
        if backward:
            _, q = lax.optimization_barrier((x, q))
            return q.dequantize(dtype)
        # The scales alone: or XLA would cut the codes out of a stack only once for forward and
        # backward, and keep them.
        _, scales = lax.optimization_barrier((x, dataclasses.replace(q, codes=None)))
        return dataclasses.replace(scales, codes=q.codes).dequantize(dtype)

    def on_cpu(x: Array, q: QuantArray) -> Array:
        codes = q.codes + _zero(lax.stop_gradient(x.reshape(-1)[0])).astype(q.codes.dtype)
        return dataclasses.replace(q, codes=codes).dequantize(dtype)

    if not x.size:
        return q.dequantize(dtype)
    if not jax.typeof(x).sharding.mesh.empty:  # whose axes, if explicit, cannot be indexed
        return barrier(x, q)
    return lax.platform_dependent(x, q, cpu=on_cpu, default=barrier)


@jax.custom_batching.custom_vmap
def _zero(x: Array) -> Array:
    """0, as the compiler cannot know: XLA:CPU has no use for barriers."""
    return x > jnp.inf


@_zero.def_vmap
def _zero_of_many(size: int, batched: list[bool], x: Array) -> tuple[Array, bool]:
    # Unbatched, or each example would have a weight of its own.
    return (_zero(x[0]) if size else jnp.zeros((), bool)), False


def fused_for(x: Array, q: QuantArray, equation: str) -> dict[str, Callable[..., Array]]:
    """Platform -> kernel that dequantises within the product, where one pays: the dispatch rule.

    That is where 4-bit codes are multiplied by so few rows (decoding, small batches) that reading
    the weight is what takes the time. With more rows, dequantising it once is a small part. A
    process with several devices has none: the compiler cannot divide a kernel among them.
    """
    inputs, weight, out = split_equation(equation)
    contracted = [c for c in weight if c not in out]
    made = [c for c in weight if c not in inputs]
    rest = [c for c in inputs if c not in contracted]
    as_matrix = inputs == rest + contracted and out == rest + made and weight == contracted + made
    several = jax.device_count() > 1
    if q.kind == "int8" or not as_matrix or q.codes.ndim != 2 or several:
        return {}
    size, columns = math.prod(q.in_shape), math.prod(q.out_shape)
    rows = x.size // size
    book = tuple(map(float, CODEBOOKS[q.kind]))

    def call(kernel: Callable[..., Array]) -> Callable[[Array, QuantArray], Array]:
        def run(x: Array, q: QuantArray) -> Array:
            matrix = x.reshape(rows, size)
            options = {"codebook": book, "block_size": q.block_size}
            y = kernel(matrix, q.codes, q.scales(), **options)
            return y.reshape(*x.shape[: x.ndim - len(q.in_shape)], *q.out_shape)

        return run

    for backend, platform, kernel in (("tpu", "tpu", pallas_tpu), ("gpu", "cuda", pallas_gpu)):
        if jax.default_backend() == backend and kernel.supported(
            rows, size, columns, q.block_size, x.dtype
        ):
            return {platform: call(kernel.matmul)}
    return {}
