"""x @ W for a W of 4 bits on NVIDIA GPUs: weights are dequantised in registers, by Pallas' Triton.

A weight is looked up in a table of 16 values that the L1 cache holds: one load, where a tree of
selects takes over 20 instructions. Scales are applied to the products of a block, not to its
weights. A program takes some columns and some blocks; where the columns are few, blocks are
divided among so many programs that the GPU is busy, and their sums are added up at the end.
"""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

MAX_ROWS = 64
WIDTH = 64  # columns of a program: its 128 threads load 16 bytes each of a block of 64 rows
ROWS = 256  # of the weight in flight in each program
PROGRAMS = 512  # about four to each multiprocessor of an H100


def supported(rows: int, n_in: int, n_out: int, block_size: int, dtype: Any) -> bool:
    """Whether `matmul` takes x of (rows, n_in) and W of (n_in, n_out), in blocks of `block_size`.

    Beyond `MAX_ROWS` rows it would be slower than to dequantise W once. JAX has announced that
    Pallas' Triton will go; without it, nothing is supported.
    """
    return (
        0 < rows <= MAX_ROWS
        and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)
        and block_size in (32, 64, 128)
        and n_in % block_size == 0
        and n_out % WIDTH == 0
        and importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    )


def matmul(
    x: Array,
    codes: Array,
    absmax: Array,
    *,
    codebook: tuple[float, ...],
    block_size: int,
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
        interpret: Run on any device, for tests.

    The codebook is rounded to x.dtype; products are scaled and summed in float32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, n_in = x.shape
    n_out = codes.shape[1]
    blocks = n_in // block_size
    tiles = n_out // WIDTH
    unroll = ROWS // block_size
    each = pl.cdiv(pl.cdiv(blocks * tiles, PROGRAMS), unroll) * unroll
    parts = pl.pallas_call(
        functools.partial(kernel, blocks=blocks, each=each, unroll=unroll),
        grid=(tiles, pl.cdiv(blocks, each)),
        out_shape=jax.ShapeDtypeStruct((pl.cdiv(blocks, each), rows, n_out), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(jnp.array(codebook, x.dtype), x, codes, absmax)
    return parts.sum(0).astype(x.dtype)


def kernel(
    table: Any, x: Any, codes: Any, absmax: Any, out: Any, *, blocks: int, each: int, unroll: int
) -> None:
    """WIDTH columns and `each` blocks, of which `unroll` a step; out is (parts, rows, out)."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    half = codes.shape[0] // blocks
    columns = pl.ds(pl.program_id(0) * WIDTH, WIDTH)
    first = pl.program_id(1) * each
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    rows = max(16, pl.next_power_of_2(x.shape[0]))  # what a tensor core takes
    # Below the last row of x its last row is read again, and the same sums are written there.
    row = jnp.minimum(lax.broadcasted_iota(jnp.int32, (rows, half), 0), x.shape[0] - 1)
    column = lax.broadcasted_iota(jnp.int32, (rows, half), 1)

    def product(start: Any, nibbles: Array) -> Array:
        """`half` columns of x from `start` on, times the weights of as many rows."""
        return jnp.dot(
            triton.load(x.at[row, start + column]),
            triton.load(table.at[nibbles]),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def step(i: Any, acc: Array) -> Array:
        for u in range(unroll):
            wanted = first + i * unroll + u
            block = jnp.minimum(wanted, blocks - 1)
            words = triton.load(codes.at[pl.ds(block * half, half), columns]).astype(jnp.int32)
            scale = jnp.where(wanted < blocks, triton.load(absmax.at[block, columns]), 0.0)
            start = block * 2 * half
            dot = product(start, words & 15) + product(start + half, words >> 4)
            acc = acc + dot * scale[None, :]
        return acc

    acc = lax.fori_loop(0, each // unroll, step, jnp.zeros((rows, WIDTH), jnp.float32))
    row = lax.broadcasted_iota(jnp.int32, acc.shape, 0)
    column = pl.program_id(0) * WIDTH + lax.broadcasted_iota(jnp.int32, acc.shape, 1)
    triton.store(out.at[pl.program_id(1), jnp.minimum(row, x.shape[0] - 1), column], acc)
