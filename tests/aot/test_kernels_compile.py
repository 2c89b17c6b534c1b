"""The fused kernels compile for chips that are not there, and hold no dequantised weight.

    make aot

Nothing is run: the numbers are compared in interpret mode, in tests/test_quant_kernels.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import topologies
from jax import Array

from jlora.quant import pallas_gpu, pallas_tpu

CODEBOOK = tuple(i / 8 - 1 for i in range(16))
SHAPES = [
    # (in, out) of projections: SmolLM2, Llama 3.2 1B, Llama 2 7B, Llama 3 8B, Llama 3 70B
    (576, 1536), (1536, 576), (2048, 8192), (4096, 4096), (4096, 11008), (11008, 4096),
    (14336, 4096), (28672, 8192),
]  # fmt: skip


def kernel(chip: str) -> Any:
    """The module of a chip's kernel, and its product."""
    if topologies.CHIPS[chip].platform == "cuda":
        return pallas_gpu, pallas_gpu.matmul
    return pallas_tpu, functools.partial(pallas_tpu.matmul, packed=chip == "v6e")


def arguments(rows: int, n_in: int, n_out: int, block: int, dtype: Any) -> tuple[Any, ...]:
    """Shapes of x, codes and absmax."""
    return (
        jax.ShapeDtypeStruct((rows, n_in), dtype),
        jax.ShapeDtypeStruct((n_in // 2, n_out), jnp.uint8),
        jax.ShapeDtypeStruct((n_in // block, n_out), jnp.float32),
    )


def through_xla(x: Array, codes: Array, absmax: Array) -> Array:
    """What the kernel replaces: the weight is dequantised, then multiplied."""
    pairs = codes.reshape(absmax.shape[0], -1, codes.shape[1])
    nibbles = jnp.concatenate([pairs & 15, pairs >> 4], axis=1)
    values = jnp.take(jnp.array(CODEBOOK), nibbles.astype(jnp.int32))
    w = (values * absmax[:, None]).astype(x.dtype).reshape(-1, codes.shape[1])
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def text(compiled: Any) -> str | None:
    """The compiled program, where JAX can print it: for some targets it fails."""
    try:
        return compiled.as_text()
    except Exception:
        return None


def compiles(chip: str, rows: int, n_in: int, n_out: int, block: int, dtype: Any) -> int:
    """Compile, check, and return the bytes of temporary memory."""
    module, matmul = kernel(chip)
    assert module.supported(rows, n_in, n_out, block, dtype)
    compiled = topologies.compile_for(
        topologies.CHIPS[chip],
        functools.partial(matmul, codebook=CODEBOOK, block_size=block),
        *arguments(rows, n_in, n_out, block, dtype),
    )
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes >= n_in * n_out // 2
    program = text(compiled)
    assert program is None or "custom-call" in program
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("chip", ["v5e", "v6e", "h100"])
@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
@pytest.mark.parametrize("rows", [1, 16])
def test_compiles_without_the_weight(chip: str, n_in: int, n_out: int, rows: int) -> None:
    temp = compiles(chip, rows, n_in, n_out, 64, jnp.bfloat16)
    # Partial sums (GPU) and reordered inputs are smaller than an eighth of a bfloat16 weight,
    # except beside the smallest weights.
    assert temp < max(n_in * n_out * 2 // 8, 2**20)


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "h100", "h200"])
@pytest.mark.parametrize(("rows", "block", "dtype"), [
    (1, 128, jnp.bfloat16), (3, 64, jnp.float32), (64, 64, jnp.bfloat16), (64, 128, jnp.float32)
])  # fmt: skip
def test_other_dtypes_blocks_and_rows(chip: str, rows: int, block: int, dtype: Any) -> None:
    assert compiles(chip, rows, 11008, 4096, block, dtype) < 11008 * 4096 * 2 // 8


@pytest.mark.parametrize("rows", [1, 64])
def test_compiles_with_the_largest_input(rows: int) -> None:
    for chip in ("v5e", "v6e"):  # all of `in` has its place in VMEM
        compiles(chip, rows, 28672, 8192, 64, jnp.float32)


@pytest.mark.parametrize(("chip", "block"), [("h100", 32), ("v5e", 256), ("v6e", 256)])
def test_blocks_of_one_kernel(chip: str, block: int) -> None:
    compiles(chip, 1, 4096, 4096, block, jnp.bfloat16)


@pytest.mark.parametrize("chip", ["v5e", "v6e", "h100"])
def test_xla_writes_the_weight(chip: str) -> None:
    # Why there is a kernel; where XLA has learnt to fuse this, it has no reason left.
    n = 4096
    compiled = topologies.compile_for(
        topologies.CHIPS[chip], through_xla, *arguments(1, n, n, 64, jnp.bfloat16)
    )
    assert compiled.memory_analysis().temp_size_in_bytes >= n * n * 2
