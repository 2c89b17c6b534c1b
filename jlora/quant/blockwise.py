"""Quantising matrices block by block, and back: arrays only, in the layout that jlora keeps.

A kernel in matrix form is (*batch, in, out). Its 4-bit codes are uint8 (*batch, in_padded / 2,
out): byte row b * (block / 2) + j of a column holds value j of its block b in the low nibble, and
value j + block / 2 in the high one. Both halves of a block are then runs of whole rows, and
dequantising is elementwise; neighbours in a byte would have to be interleaved. On a CPU the codes
and scales are, bit for bit, those of bitsandbytes 0.50 (only there does division round alike).
Subnormal numbers count as zero, as XLA has it.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jlora.quant.codebooks import decode4, dynamic_map, encode4, encode8, select

NESTED_BLOCK = 256
LARGEST = 2.0**126
"""Weights beyond this have scales whose reciprocal is subnormal."""
NESTED_ZERO = 127  # its code in the dynamic map
_NIBBLES = np.array([1, 16]).reshape(2, 1, 1)  # by plane: the low nibbles, then the high ones
_FINITE = jnp.finfo(jnp.float32).max
_INT8_STEP = 7.874015718698502e-3  # what bitsandbytes multiplies by, for 1 / 127


def quantize4(w: Array, kind: str, block: int) -> tuple[Array, Array]:
    """Codes and absmax of a matrix, in blocks along its inputs; padded with zeros.

    Args:
        w: (*batch, in, out), any float dtype.
        kind: "nf4" or "fp4".
        block: values in a block, even.

    Returns:
        codes uint8 (*batch, in_padded / 2, out) and absmax float32 (*batch, blocks, out).
    """
    *batch, rows, out = w.shape
    count = -(-rows // block)
    w = jnp.pad(w, [(0, 0)] * len(batch) + [(0, count * block - rows), (0, 0)])
    codes, absmax = _encode_blocks(w.reshape(*batch, count, block, out), kind, axis=-2)
    return codes.reshape(*batch, -1, out), absmax


def quantize4_rows(w: Array, kind: str, block: int) -> tuple[Array, Array]:
    """As `quantize4`, of w (out, in), a row for each output.

    Returns:
        codes uint8 (out, blocks, block / 2) and absmax float32 (out, blocks). They are left as they
        lie: XLA:CPU takes ten times as long where it flattens or transposes them in the same loop.
    """
    out, size = w.shape
    count = -(-size // block)
    w = jnp.pad(w, [(0, 0), (0, count * block - size)])
    return _encode_blocks(w.reshape(out, count, block), kind, axis=-1)


def dequantize4(codes: Array, absmax: Array, kind: str, rows: int, dtype: jnp.dtype) -> Array:
    """The matrix (*batch, rows, out): multiplied in float32 and rounded once, as bitsandbytes does.

    Args:
        codes: uint8 (*batch, in_padded / 2, out).
        absmax: float32 (*batch, blocks, out).
        kind: "nf4" or "fp4".
        rows: inputs, padding not counted.
        dtype: of the result.
    """
    *batch, blocks, out = absmax.shape
    planes = codes.reshape(*batch, blocks, 1, -1, out)
    w = (decode4(planes, kind, _NIBBLES) * absmax[..., None, None, :]).astype(dtype)
    return w.reshape(*batch, -1, out)[..., :rows, :]


def quantize8(w: Array, axis: int = -2) -> tuple[Array, Array]:
    """LLM.int8()'s codes and absmax (SCB) by output: arXiv:2208.07339.

    Args:
        w: any float dtype.
        axis: that of the inputs.

    Returns:
        codes int8 of w's shape and absmax float32, of size 1 along `axis`.
    """
    w = w.astype(jnp.float32)
    absmax = _absmax(w, axis, keepdims=True)
    scale = _reciprocal(absmax) * jnp.float32(127)  # rounded twice, as torch has it
    return jnp.round(w * scale).astype(jnp.int8), absmax


def dequantize8(codes: Array, absmax: Array, dtype: jnp.dtype) -> Array:
    """The matrix: codes * absmax / 127, as bitsandbytes rounds it."""
    return (codes.astype(jnp.float32) * absmax * jnp.float32(_INT8_STEP)).astype(dtype)


def quantize_nested(absmax: Array, offset: Array | None = None) -> tuple[Array, Array, Array]:
    """Double quantisation: absmax less its mean in 8 bits, blocks of 256 in bitsandbytes' order.

    Args:
        absmax: float32 (*batch, out, blocks).
        offset: float32 (*batch,), if not the mean.

    Returns:
        codes uint8 (*batch, rows, 256), absmax float32 (*batch, rows) and offset. What the last
        row is padded with dequantises to `offset`.
    """
    *batch, out, blocks = absmax.shape
    flat = absmax.reshape(*batch, out * blocks)
    if offset is None:
        offset = absmax.mean(-1).mean(-1)  # in two steps, since float32 sums of many lose bits
    padding = -flat.shape[-1] % NESTED_BLOCK
    centred = jnp.pad(flat - offset[..., None], [(0, 0)] * len(batch) + [(0, padding)])
    rows = centred.reshape(*batch, -1, NESTED_BLOCK)
    scale = jnp.max(jnp.abs(rows), axis=-1)
    codes = encode8(jnp.clip(rows * _reciprocal(scale)[..., None], -1, 1))
    codes = jnp.where(scale[..., None] > 0, codes, jnp.uint8(0))  # as bitsandbytes has it
    used = jnp.arange(flat.shape[-1] + padding).reshape(-1, NESTED_BLOCK) < flat.shape[-1]
    return jnp.where(used, codes, jnp.uint8(NESTED_ZERO)), scale, offset


def dequantize_nested(codes: Array, absmax: Array, offset: Array, blocks: int, out: int) -> Array:
    """The absmax, float32 (*batch, blocks, out), of what `quantize_nested` gives."""
    # TPUs gather one number after another, and would spend more time here than on all products.
    ways = {"tpu": _nested_by_selects, "default": _nested_by_lookup}
    ways = {platform: functools.partial(way, blocks, out) for platform, way in ways.items()}
    return lax.platform_dependent(codes, absmax, offset, **ways)


def _nested_by_lookup(blocks: int, out: int, codes: Array, absmax: Array, offset: Array) -> Array:
    batch, size = offset.shape, math.prod(codes.shape[-2:])
    table = _nested_value(jnp.asarray(dynamic_map()), absmax, offset)  # of what rows may hold
    row = 256 * jnp.arange(codes.shape[-2], dtype=jnp.int32)[:, None]
    index = (codes.astype(jnp.int32) + row).reshape(*batch, size)[..., : out * blocks]
    index = jnp.swapaxes(index.reshape(*batch, out, blocks), -1, -2).reshape(*batch, -1)
    # A gather last, since XLA does not repeat it for each weight of a block, as it does a product.
    table = table.reshape(*batch, size)
    found = jnp.take_along_axis(table, index, axis=-1, mode="promise_in_bounds")
    return found.reshape(*batch, blocks, out)


def _nested_by_selects(blocks: int, out: int, codes: Array, absmax: Array, offset: Array) -> Array:
    batch, size = offset.shape, math.prod(codes.shape[-2:])
    flat = _nested_value(select(codes, dynamic_map()), absmax, offset).reshape(*batch, size)
    return jnp.swapaxes(flat[..., : out * blocks].reshape(*batch, out, blocks), -1, -2)


def _nested_value(values: Array, absmax: Array, offset: Array) -> Array:
    """(*batch, rows, 256), with values of the dynamic map that broadcast with that.

    bitsandbytes rounds the product before it adds. XLA may fuse the two and round once, and drops
    optimization_barrier before it does; clipping changes no finite number and stands between.
    """
    return jnp.clip(values * absmax[..., None], -_FINITE, _FINITE) + offset[..., None, None]


def _encode_blocks(w: Array, kind: str, axis: int) -> tuple[Array, Array]:
    """Bytes, and absmax without `axis`, of blocks that lie along it."""
    w = w.astype(jnp.float32)
    absmax = _absmax(w, axis)
    scaled = w * jnp.expand_dims(_reciprocal(absmax), axis)
    codes = encode4(jnp.clip(scaled, -1, 1), kind)
    low, high = jnp.split(codes, 2, axis=axis)
    return low | (high << 4), absmax


def _absmax(w: Array, axis: int, keepdims: bool = False) -> Array:
    """The largest magnitude along `axis`; infinite where a value is not a number.

    XLA:CPU's maximum passes over what is not a number.
    """
    return jnp.max(jnp.where(jnp.isnan(w), jnp.inf, jnp.abs(w)), axis, keepdims=keepdims)


def _reciprocal(absmax: Array) -> Array:
    """1 / absmax, and 0 for blocks of zeros."""
    return jnp.where(absmax >= jnp.finfo(jnp.float32).tiny, jnp.float32(1) / absmax, 0)
