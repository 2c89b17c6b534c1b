"""Weights to QuantArrays: one at a time, as a checkpoint has them, or stacked."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config import QuantConfig
from jlora.errors import JloraError
from jlora.quant import blockwise, checks
from jlora.quant.array import QuantArray, WeightPath

_CHUNK = 1 << 20  # weights that `quantize_rows` works on at a time


def quantize(
    weight: Any,
    *,
    kind: str = QuantConfig.kind,
    block_size: int = QuantConfig.block_size,
    double_quant: bool = QuantConfig.double_quant,
    contracting: tuple[int, ...] = (-2,),
    output: tuple[int, ...] = (-1,),
    batch: tuple[int, ...] = (),
    path: str = "",
) -> QuantArray:
    """Quantise a weight: NF4 and FP4 of QLoRA (arXiv:2305.14314), int8 of LLM.int8().

    Args:
        weight: NumPy or JAX array of any float dtype; axes beyond its own come first, and stack
            layers. In a transformed function its values are not checked.
        kind: "nf4", "fp4" or "int8" (one scale for each output).
        block_size: values with a scale of their own, along the inputs of each output; the last
            block is padded with zeros. Not for int8.
        double_quant: quantise the scales too, in 8 bits. Not for int8.
        contracting: axes that are summed over with the input, negative.
        output: axes that become axes of the output, negative.
        batch: axes that input and output share, negative.
        path: of the weight, for messages.

    Raises:
        JloraError: an option does not exist or does not fit, or weights are not finite (or are
            beyond 2**126), and how many.
    """
    weight = jnp.asarray(weight)
    axes = (*batch, *contracting, *output)
    if sorted(axes) != list(range(-len(axes), 0)) or len(axes) > weight.ndim:
        raise JloraError(
            f"{checks.at(path)}contracting {contracting}, output {output} and batch {batch} must "
            f"together be the last axes, each once and negative, of a weight {weight.shape}"
        )
    checks.options(weight, kind, block_size, double_quant, path)
    in_shape, out_shape = (tuple(weight.shape[i] for i in x) for x in (contracting, output))
    size = math.prod(in_shape)
    if kind == "int8":
        block_size = size
    checks.padding(size, block_size, path)
    options = kind, block_size, double_quant, batch, contracting, output
    children, absmax = _quantize(weight, *options)
    checks.finite(absmax, weight, path)
    places = contracting, output, batch, in_shape, out_shape, weight.dtype
    fields: tuple[Any, ...] = (*children, kind, block_size, *places, WeightPath(path))
    return QuantArray(*fields)


@functools.partial(jax.jit, static_argnums=range(1, 7))
def _quantize(
    weight: jax.Array,
    kind: str,
    block_size: int,
    double_quant: bool,
    batch: tuple[int, ...],
    contracting: tuple[int, ...],
    output: tuple[int, ...],
) -> tuple[Any, jax.Array]:
    """The children, and absmax: they may lack it."""
    axes = (*batch, *contracting, *output)
    stacked = weight.ndim - len(axes)
    order = (*range(stacked), *(weight.ndim + axis for axis in axes))
    ins, outs = (math.prod(weight.shape[i] for i in x) for x in (contracting, output))
    matrix = weight.transpose(order)
    matrix = matrix.reshape(*matrix.shape[: stacked + len(batch)], ins, outs)
    if kind == "int8":
        codes, absmax = blockwise.quantize8(matrix)
    else:
        codes, absmax = blockwise.quantize4(matrix, kind, block_size)
    nested = blockwise.quantize_nested(jnp.swapaxes(absmax, -1, -2)) if double_quant else None
    return _children(codes, absmax, nested), absmax


def quantize_rows(
    weight: Any,
    *,
    kind: str = QuantConfig.kind,
    block_size: int = QuantConfig.block_size,
    double_quant: bool = QuantConfig.double_quant,
    path: str = "",
) -> QuantArray:
    """Quantise a checkpoint's weight (out, in) to that of a kernel (in, out).

    It works through the rows in chunks, on the CPU whatever JAX's default: the result is the same
    everywhere, and beyond it little memory is needed. Its arrays are NumPy's.

    Args:
        weight: NumPy or JAX array (out, in), in the checkpoint's dtype.
        kind: as for `quantize`, like all that follows.
        block_size: as above.
        double_quant: as above.
        path: as above.

    Raises:
        JloraError: as `quantize`.
    """
    weight = np.asarray(weight)
    checks.options(weight, kind, block_size, double_quant, path)
    if weight.ndim != 2:
        raise JloraError(f"{checks.at(path)}expected a matrix (out, in), got shape {weight.shape}")
    out, size = weight.shape
    if kind == "int8":
        block_size = size
    checks.padding(size, block_size, path)
    blocks = -(-size // block_size)
    int8 = kind == "int8"
    codes = (
        empty((size, out), np.int8) if int8 else empty((blocks * block_size // 2, out), np.uint8)
    )
    absmax = np.empty((out, blocks), np.float32)
    rows = min(out, max(1, _CHUNK // size))
    with jax.default_device(_cpu()):
        for start in range(0, out, rows):
            start = min(start, out - rows)  # the last chunk overlaps: all have one shape
            chunk = slice(start, start + rows)
            own, absmax[chunk] = _quantize_rows(weight[chunk], kind, block_size)
            checks.finite(absmax[chunk], weight[chunk], path)
            transpose_into(codes[:, chunk], np.asarray(own).reshape(rows, -1))
        nested = None
        if double_quant:
            nested = tuple(np.asarray(x) for x in jax.jit(blockwise.quantize_nested)(absmax))
    scales = empty((blocks, out), np.float32)
    transpose_into(scales, absmax)
    children = _children(codes, scales, nested)
    return kernel(*children, kind=kind, block_size=block_size, size=size, dtype=weight.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize_rows(weight: jax.Array, kind: str, block_size: int) -> tuple[jax.Array, jax.Array]:
    if kind == "int8":
        return blockwise.quantize8(weight, axis=-1)
    return blockwise.quantize4_rows(weight, kind, block_size)


def stack(arrays: Iterable[QuantArray], count: int | None = None) -> QuantArray:
    """QuantArrays of layers as one, on a new leading axis.

    Of NumPy arrays it is filled one by one: given an iterator and its length, no two copies of
    all layers are ever held.

    Args:
        arrays: at least one; alike but for their numbers.
        count: how many, where `arrays` has no length.

    Raises:
        JloraError: there are none, or other than `count`, or they are not alike.
    """
    if count is None:
        arrays = list(arrays)
        count = len(arrays)
    parts: list[list[Any]] = []
    first: Any = None
    seen = 0
    for seen, array in enumerate(arrays, 1):
        leaves, structure = jax.tree.flatten(array)
        like = structure, [(x.shape, x.dtype) for x in leaves]
        if first is None:
            first, name = like, repr(array)
            buffered = all(isinstance(x, np.ndarray | np.generic) for x in leaves)
            parts = [[empty((count, *x.shape), x.dtype)] if buffered else [] for x in leaves]
        if like != first:
            raise JloraError(f"cannot stack {array!r}, number {seen}, on the first, {name}")
        if seen > count:
            break
        for part, leaf in zip(parts, leaves, strict=True):
            if buffered:
                part[0][seen - 1] = leaf
            else:
                part.append(leaf)
    if not seen or seen != count:
        raise JloraError(
            f"stack needs as many QuantArrays as said, and one at least: {count=}, got {seen}"
        )
    whole = [part[0] if buffered else jnp.stack(part) for part in parts]
    return jax.tree.unflatten(first[0], whole)


def unstack(array: QuantArray) -> list[QuantArray]:
    """The layers of a QuantArray that stacks them on its first axis; the inverse of `stack`."""
    if array.codes.ndim - len(array.batch) <= 2:
        raise JloraError(f"{array!r} has no axis that stacks layers")
    return [jax.tree.map(lambda x, i=i: x[i], array) for i in range(array.codes.shape[0])]


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that jax.device_put takes over without a copy: on a CPU it wants 64-byte alignment.

    jnp.asarray copies all the same.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def transpose_into(to: np.ndarray, matrix: np.ndarray) -> None:
    """Set `to` to the transpose of `matrix`, converted to its dtype.

    A cache line of `to` at a time: otherwise nearly every number misses the cache.
    """
    step = 64 // to.itemsize
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        to[:, rows] = matrix[rows].astype(to.dtype, copy=False).T


def kernel(
    codes: Any,
    absmax: Any,
    nested_codes: Any,
    nested_absmax: Any,
    offset: Any,
    *,
    kind: str,
    block_size: int,
    size: int,
    dtype: Any,
) -> QuantArray:
    """The QuantArray of a kernel (in, out) from its arrays; `size` is in."""
    arrays = codes, absmax, nested_codes, nested_absmax, offset
    places = (-2,), (-1,), (), (size,), (codes.shape[-1],), jnp.dtype(dtype)
    return QuantArray(*arrays, kind, block_size, *places)


def _children(codes: Any, absmax: Any, nested: tuple[Any, ...] | None) -> tuple[Any, ...]:
    return (codes, None, *nested) if nested else (codes, absmax, None, None, None)


def _cpu() -> Any:
    """The host's own device, or None where JAX was started without."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
