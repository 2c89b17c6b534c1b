"""x @ W for a W of 4 bits on TPU: weights are dequantised in VMEM and never written to HBM.

A weight is looked up along the sublanes: for each block of 64 rows and each column the table of
the 16 values is multiplied by the block's scale once, and then indexed by the codes. Compared by
the compiler's own schedule for v5e and v6e, a tree of selects takes 2.5 times as many cycles.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

MAX_ROWS = 64
LANES = 128
GROUP = 8  # blocks a step: as many rows as a tile of float32 scales has
TILE_BYTES = 2**20  # of codes in VMEM, and as much again for the next tile

# These look up 32-bit values only; on later chips, 16-bit values can be looked up.
WORD_GATHER = ("TPU v2", "TPU v3", "TPU v4", "TPU v5")


def supported(rows: int, n_in: int, n_out: int, block_size: int, dtype: Any) -> bool:
    """Whether `matmul` takes x of (rows, n_in) and W of (n_in, n_out), in blocks of `block_size`.

    Beyond `MAX_ROWS` rows it would be slower than to dequantise W once.
    """
    return (
        0 < rows <= MAX_ROWS
        and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)
        and block_size in (64, 128, 256)
        and n_in % block_size == 0
        and n_out > 0
    )


def matmul(
    x: Array,
    codes: Array,
    absmax: Array,
    *,
    codebook: tuple[float, ...],
    block_size: int,
    packed: bool | None = None,
    interpret: bool = False,
) -> Array:
    """Multiply x by the weight that `codes` and `absmax` hold: (rows, out) in x.dtype.

    Args:
        x: (rows, in), bfloat16 or float32; few rows, see `supported`.
        codes: (in / 2, out) uint8; byte j of a block holds value j in its low nibble and value
            j + block_size / 2 in its high one.
        absmax: (in / block_size, out) float32, the scale of each block.
        codebook: The 16 values.
        block_size: Rows of the weight that share a scale, a power of two.
        packed: Look up bfloat16 values, two to a word, which only v6e and later can do; by
            default, where the present device is one of those.
        interpret: Run on any device, for tests.

    Weights are rounded to x.dtype after scaling; products are summed in float32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, n_in = x.shape
    n_out = codes.shape[1]
    blocks = n_in // block_size
    if packed is None:
        device = jax.devices()[0]
        packed = device.platform == "tpu" and not device.device_kind.startswith(WORD_GATHER)
    packed = packed and x.dtype == jnp.bfloat16

    # Steps on the leading axis, which a loop may index as it likes; what is padded is zero.
    groups = pl.cdiv(blocks, GROUP)
    padded_rows = pl.cdiv(rows, 16) * 16
    x = jnp.pad(x, ((0, padded_rows - rows), (0, groups * GROUP * block_size - n_in)))
    x = x.reshape(padded_rows, groups, GROUP * block_size).swapaxes(0, 1)

    width = tile_width(n_in, n_out, block_size)
    table = jnp.broadcast_to(jnp.array(codebook, jnp.float32)[:, None], (16, LANES))
    out = pl.pallas_call(
        functools.partial(kernel, blocks=blocks, packed=packed),
        grid=(pl.cdiv(n_out, width),),
        in_specs=[
            pl.BlockSpec((16, LANES), lambda j: (0, 0)),
            pl.BlockSpec(x.shape, lambda j: (0, 0, 0)),
            pl.BlockSpec((n_in // 2, width), lambda j: (0, j)),
            pl.BlockSpec((blocks, width), lambda j: (0, j)),
        ],
        out_specs=pl.BlockSpec((padded_rows, width), lambda j: (0, j)),
        out_shape=jax.ShapeDtypeStruct((padded_rows, n_out), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )(table, x, codes, absmax)
    return out[:rows]


def tile_width(n_in: int, n_out: int, block_size: int) -> int:
    """Columns of a tile: all of `in`, and about TILE_BYTES, as copies from HBM should be large."""
    width = 2 ** int(math.log2(max(TILE_BYTES // (n_in // 2), LANES)))
    unrolled = max(4 * LANES * 64 // block_size, LANES)  # what a step of the loop spells out
    return min(width, unrolled, -(-n_out // LANES) * LANES)


def kernel(
    table: Any, x: Any, codes: Any, absmax: Any, out: Any, *, blocks: int, packed: bool
) -> None:
    """All of `in` for some columns; refs as in `matmul`, x as (groups, rows, in of a group)."""
    from jax.experimental import pallas as pl

    half = codes.shape[0] // blocks
    lookup = lookup_packed if packed else lookup_words
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def step(group: Any, count: int, acc: Array) -> Array:
        """Add `count` blocks from the start of a group on."""
        scales = absmax[pl.ds(group * GROUP, count), :]
        rows = []
        for b in range(count):
            bytes_ = codes[pl.ds((group * GROUP + b) * half, half), :]
            columns = [slice(j, j + LANES) for j in range(0, out.shape[1], LANES)]
            tables = [table[...] * scales[b : b + 1, j] for j in columns]
            weights = [lookup(t, bytes_[:, j]) for t, j in zip(tables, columns, strict=True)]
            rows.append(jnp.concatenate(weights, axis=1))
        # Rounded here, all at once: any earlier, the compiler packs registers that are half full.
        w = jnp.concatenate(rows).astype(x.dtype)
        part = x[group][:, : w.shape[0]]
        return acc + jnp.dot(part, w, precision=precision, preferred_element_type=jnp.float32)

    full, rest = divmod(blocks, GROUP)
    acc = jnp.zeros(out.shape, jnp.float32)
    if full:
        acc = lax.fori_loop(0, full, lambda i, acc: step(i, GROUP, acc), acc)
    if rest:
        acc = step(full, rest, acc)
    out[...] = acc.astype(out.dtype)


def lookup_words(table: Array, codes: Array) -> Array:
    """(16, 128) float32 at (n, 128) codes: (2 n, 128). 8 rows of a table fill a register, so look
    up in both halves and select.
    """
    words = lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.int32)

    def look(nibble: Array, upper: Array) -> Array:
        index = nibble & 7
        return jnp.where(upper, take(table[8:], index), take(table[:8], index))

    return jnp.concatenate([look(words, (words & 8) != 0), look(words >> 4, words < 0)])


def lookup_packed(table: Array, codes: Array) -> Array:
    """The same in bfloat16, of which 16 rows fill a register."""
    table = table.astype(jnp.bfloat16)
    codes = lax.bitcast_convert_type(codes, jnp.int8)
    nibbles = codes & jnp.int8(15), lax.shift_right_logical(codes, jnp.int8(4))
    return jnp.concatenate([take(table, nibble.astype(jnp.int16)) for nibble in nibbles])


def take(table: Array, index: Array) -> Array:
    """Rows of a table of one register, for each value's own index."""
    index = index.reshape(-1, *table.shape)
    table = jnp.broadcast_to(table, index.shape)
    taken = jnp.take_along_axis(table, index, axis=1, mode="promise_in_bounds")
    return taken.reshape(-1, table.shape[-1])
