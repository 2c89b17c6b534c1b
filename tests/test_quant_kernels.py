"""The fused kernels against dequantising by the definition; in interpret mode, on any machine."""

import functools
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jlora.quant import pallas_gpu, pallas_tpu

pytestmark = pytest.mark.usefixtures("strict_promotion")

NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
POSITIVE = (0.0, 0.0052083333, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25)
FP4 = (*POSITIVE, *(-v for v in POSITIVE))
CODEBOOKS = {"nf4": NF4, "fp4": FP4}
KERNELS: dict[str, Callable[..., Array]] = {
    "gpu": pallas_gpu.matmul,
    "tpu": functools.partial(pallas_tpu.matmul, packed=False),
    "tpu, packed": functools.partial(pallas_tpu.matmul, packed=True),
}
CASES = [
    # rows, in, out, block, codebook
    (1, 128, 64, 64, "nf4"),  # the fewest
    (3, 576, 64, 64, "fp4"),  # 9 blocks: a group of 8 and a rest; few columns
    (16, 2176, 320, 128, "nf4"),  # several groups; two tiles, the second with few columns
    (17, 128, 512, 64, "fp4"),
    (64, 512, 128, 64, "nf4"),
]


def quantised(n_in: int, n_out: int, block: int, seed: int = 0) -> tuple[Array, Array]:
    """Any codes, and scales that differ by up to a factor of 1000."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n_in // 2, n_out), dtype=np.uint8)
    absmax = 10 ** rng.uniform(-3, 0, (n_in // block, n_out))
    return jnp.asarray(codes), jnp.asarray(absmax, jnp.float32)


def dequantised(codes: Array, absmax: Array, codebook: tuple[float, ...], block: int) -> Array:
    """The weight (in, out) in float32, as the layout in memory is defined."""
    pairs = codes.reshape(-1, block // 2, codes.shape[1])
    nibbles = jnp.concatenate([pairs & jnp.uint8(15), pairs >> jnp.uint8(4)], axis=1)
    values = jnp.take(jnp.array(codebook, jnp.float32), nibbles.astype(jnp.int32))
    return (values * absmax[:, None, :]).reshape(-1, codes.shape[1])


def check(kernel: str, rows: int, n_in: int, n_out: int, block: int, dtype, codebook: str) -> None:
    """Each output within what rounding allows, given the terms that it is the sum of."""
    codes, absmax = quantised(n_in, n_out, block)
    x = jax.random.normal(jax.random.key(1), (rows, n_in)).astype(dtype)
    values = CODEBOOKS[codebook]
    y = KERNELS[kernel](x, codes, absmax, codebook=values, block_size=block, interpret=True)
    assert y.shape == (rows, n_out)
    assert y.dtype == dtype

    w = np.asarray(dequantised(codes, absmax, values, block), np.float64)
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    expected = wide @ w
    # Each weight is rounded once to the dtype, and the signs of x are random: four standard
    # deviations of the errors' sum. Then the sum is rounded.
    eps = float(jnp.finfo(dtype).eps) / 2
    spread = np.sqrt((wide**2) @ (w**2))
    bound = 4 * eps * spread + eps * abs(expected) + 1e-6 * (abs(wide) @ abs(w))
    assert (abs(np.asarray(y.astype(jnp.float32), np.float64) - expected) <= bound).all()


@pytest.mark.parametrize(("kernel", "dtype"), [
    ("gpu", jnp.float32), ("gpu", jnp.bfloat16), ("tpu", jnp.float32), ("tpu", jnp.bfloat16),
    ("tpu, packed", jnp.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize(("rows", "n_in", "n_out", "block", "codebook"), CASES)
def test_product(
    kernel: str, dtype, rows: int, n_in: int, n_out: int, block: int, codebook: str
) -> None:
    check(kernel, rows, n_in, n_out, block, dtype, codebook)


@pytest.mark.parametrize(("kernel", "block"), [("gpu", 32), ("tpu", 256), ("tpu, packed", 256)])
def test_other_blocks(kernel: str, block: int) -> None:
    check(kernel, 2, 1024, 128, block, jnp.bfloat16, "nf4")


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_code_in_every_place_has_its_value(kernel: str) -> None:
    n = 128  # x is one row of the identity at a time, so each output is one weight
    codes = jnp.arange(n // 2 * n, dtype=jnp.int32).reshape(n // 2, n) * 7 % 256
    codes = codes.astype(jnp.uint8)
    absmax = jnp.array([[0.5], [2.0]]) * jnp.ones((2, n))
    w = KERNELS[kernel](
        jnp.eye(64, n, 32), codes, absmax, codebook=FP4, block_size=64, interpret=True
    )
    np.testing.assert_array_equal(w, dequantised(codes, absmax, FP4, 64)[32:96])


@pytest.mark.parametrize("n_out", [64, 576, 4096])
def test_split_sums_cover_every_block(n_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_gpu, "PROGRAMS", 20)  # now some programs have no full share
    check("gpu", 2, 1088, n_out, 64, jnp.float32, "nf4")


MODEL_SHAPES = [
    (576, 576), (576, 1536), (1536, 576), (2048, 8192), (8192, 2048), (4096, 4096), (4096, 1024),
    (4096, 11008), (11008, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192),
]  # fmt: skip


@pytest.mark.parametrize("module", [pallas_gpu, pallas_tpu])
def test_what_is_supported(module: types.ModuleType) -> None:
    for n_in, n_out in MODEL_SHAPES:
        for rows in (1, 16, 64):
            assert module.supported(rows, n_in, n_out, 64, jnp.bfloat16), (n_in, n_out)
    assert module.supported(1, 4096, 4096, 128, jnp.float32)
    assert not module.supported(65, 4096, 4096, 64, jnp.bfloat16)
    assert not module.supported(0, 4096, 4096, 64, jnp.bfloat16)
    assert not module.supported(1, 4096 + 32, 4096, 64, jnp.bfloat16)
    assert not module.supported(1, 4096, 4096, 96, jnp.bfloat16)
    assert not module.supported(1, 4096, 4096, 64, jnp.float16)


def test_without_triton_nothing_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not pallas_gpu.supported(1, 4096, 4096, 64, jnp.bfloat16)


@pytest.mark.parametrize("n_in", sorted({n for n, _ in MODEL_SHAPES}))
@pytest.mark.parametrize("block", [64, 128, 256])
def test_tiles_fit_into_vmem(n_in: int, block: int) -> None:
    width = pallas_tpu.tile_width(n_in, 8192, block)
    x = pallas_tpu.MAX_ROWS * n_in * 2
    assert width % 128 == 0
    # Each input twice, as the next tile is fetched during the work on one.
    assert 2 * (n_in // 2 * width + n_in // block * width * 4 + x) < 14 * 2**20
