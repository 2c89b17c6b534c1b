"""The code books of bitsandbytes, and the exact floats at which its quantisers change code.

NF4 is Appendix E of QLoRA (arXiv:2305.14314); FP4 has a sign bit, two exponent bits and one of
mantissa, scaled to 1; the dynamic map of 256 values is that of 8-bit optimisers (arXiv:1511.04561,
arXiv:2110.02861). A code is bitsandbytes' own, so that none is ever translated.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array

_NF4_BELOW = [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
_NF4_BELOW += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495]
_NF4_ABOVE = [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
_NF4_ABOVE += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1]
NF4 = np.array([*_NF4_BELOW, 0, *_NF4_ABOVE], np.float32)
_FP4_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4 = np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES]) + np.float32(0)  # both zeros are +0
CODEBOOKS = {"nf4": NF4, "fp4": FP4}

# Codes by rising value. Of FP4's two zeros, 0 serves what is just below and at 0, 8 what is above.
_ORDER = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}


def encode4(values: Array, kind: str) -> Array:
    """The 4-bit codes of float32 `values` in [-1, 1], uint8 of the same shape.

    bitsandbytes counts the midpoints (float32) between neighbouring entries that are below a
    value: one that lies on a midpoint gets the smaller entry's code.
    """
    order, book = _ORDER[kind], CODEBOOKS[kind]
    sorted_book = book[list(order)]
    midpoints = (sorted_book[1:] + sorted_book[:-1]) / np.float32(2)
    code = jnp.full(values.shape, order[0], jnp.uint8)
    for midpoint, above in zip(midpoints, order[1:], strict=True):
        code = jnp.where(values > midpoint, jnp.uint8(above), code)
    return code


def decode4(codes: Array, kind: str, unit: int | np.ndarray = 1) -> Array:
    """The entries of the code book, float32, of the codes in uint8 `codes`.

    A tree of selects over the code's bits: a gather is many times slower on CPU and TPU.

    Args:
        codes: bytes that hold a code each, or two.
        kind: "nf4" or "fp4".
        unit: 1 where the code is in the low nibble, 16 where it is in the high one; an array of
            these is broadcast with `codes`.
    """
    return select(codes, CODEBOOKS[kind], unit)


def select(codes: Array, book: np.ndarray, unit: int | np.ndarray = 1) -> Array:
    """The entries of a book whose size is a power of two, as for `decode4`."""
    # Constants that depend on the codes, in name only: differentiating a scan over layers moves
    # what does not out of it, and keeps a book of constants there, each as large as the weight.
    zero = codes & jnp.uint8(0)
    level = [jnp.float32(value) + zero.astype(jnp.float32) for value in book]
    bit = 1
    while len(level) > 1:
        high = (codes & (jnp.asarray(bit * unit, jnp.uint8) + zero)) != 0
        level = [jnp.where(high, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
        bit *= 2
    return level[0]


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 values of bitsandbytes' signed dynamic map, float32, rising; 127 is zero.

    Each of the seven decades from 1e-6 up to 1 has twice the values of the one below. The bits are
    those that torch gives: interpolated with a fused multiply-add, from the nearer end.
    """
    start, stop = np.float32(0.1), np.float32(1)
    values = [np.array([0, 1], np.float32)]
    for decade in range(7):
        count = 2**decade
        step, k = np.float64((stop - start) / np.float32(count)), np.arange(count + 1)
        up, down = start + step * k, stop - step * (count - k)
        edges = np.where(k < (count + 1) // 2, up, down).astype(np.float32)
        means = (edges[1:] + edges[:-1]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [means, -means]
    return np.sort(np.concatenate(values))


@functools.cache
def dynamic_thresholds() -> np.ndarray:
    """At the k-th of these 255 float32 values, and above it, the dynamic code is at least k + 1.

    bitsandbytes 0.50 on a CPU rounds a value to one of 65,536 and looks up that one's code. Codes
    near zero that no such value has are never given: their thresholds are their successors'.
    """
    book = dynamic_map()
    midpoints = np.float32(0.5) * (book[1:] + book[:-1])
    grid = np.float32(-1) + np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535)
    first = np.searchsorted(grid, midpoints, side="right")  # of the grid with a code above each
    low, high = np.full(255, -1, np.float32), np.full(255, 1, np.float32)
    low, high = _ordinal(low), _ordinal(high)
    while (low < high).any():  # the least float whose place on the grid is `first`
        middle = (low + high) // 2
        value = _from_ordinal(middle)
        half = (value + np.float32(1)) * np.float32(0.5)
        place = np.float32(half.astype(np.float64) * 65535 + 0.5).astype(np.int64)
        low, high = (
            np.where(place >= first, low, middle + 1),
            np.where(place >= first, middle, high),
        )
    return _from_ordinal(low)


def encode8(values: Array) -> Array:
    """The codes in the dynamic map of float32 `values` in [-1, 1], uint8 of the same shape."""
    thresholds = jnp.asarray(dynamic_thresholds())
    return jnp.searchsorted(thresholds, values, side="right").astype(jnp.uint8)


def _ordinal(values: np.ndarray) -> np.ndarray:
    """Integers in the order of the floats, neighbours to neighbours; both zeros are 0."""
    bits = values.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _from_ordinal(ordinals: np.ndarray) -> np.ndarray:
    """The inverse of `_ordinal`."""
    magnitude = np.abs(ordinals).astype(np.int32).view(np.float32)
    return np.where(ordinals < 0, -magnitude, magnitude)
