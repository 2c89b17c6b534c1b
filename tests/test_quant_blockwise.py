"""Quantising and dequantising matrices; equality with bitsandbytes is tests/parity's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.quant import blockwise, codebooks
from jlora.quant.quantize import quantize, quantize_rows

pytestmark = pytest.mark.usefixtures("strict_promotion")

KINDS = ("nf4", "fp4")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def codes_by_value(q) -> np.ndarray:
    """The 4-bit code of each weight (in, out), read off the documented layout one by one."""
    half, (rows, out) = q.block_size // 2, q.codes.shape
    codes = np.zeros((2 * rows, out), np.uint8)
    for row in range(2 * rows):
        block, j = divmod(row, q.block_size)
        byte = np.asarray(q.codes)[block * half + j % half]
        codes[row] = byte & 15 if j < half else byte >> 4
    return codes


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_is_the_nearest_entry(kind: str) -> None:
    w = normal(0, 128, 7)
    q = quantize(w, kind=kind)
    scaled = w.reshape(2, 64, 7) / np.asarray(q.absmax)[:, None]
    book = codebooks.CODEBOOKS[kind]
    given = book[codes_by_value(q)].reshape(2, 64, 7)
    nearest = np.abs(scaled[..., None] - book).min(-1)
    np.testing.assert_allclose(np.abs(scaled - given), nearest, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(q.absmax), np.abs(w.reshape(2, 64, 7)).max(1))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_values_are_entry_times_absmax(kind: str) -> None:
    q = quantize(normal(1, 192, 5), kind=kind)
    entries = codebooks.CODEBOOKS[kind][codes_by_value(q)].reshape(3, 64, 5)
    wanted = (entries * np.asarray(q.absmax)[:, None]).reshape(192, 5)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), wanted)


def test_ties_get_the_smaller_entry_and_small_values_fp4s_zeros() -> None:
    book = codebooks.NF4
    middle = (book[1:] + book[:-1]) / np.float32(2)
    codes = np.asarray(codebooks.encode4(jnp.asarray(middle), "nf4"))
    np.testing.assert_array_equal(codes, np.arange(15))
    above = np.nextafter(middle, np.float32(2))
    np.testing.assert_array_equal(codebooks.encode4(jnp.asarray(above), "nf4"), np.arange(1, 16))
    around = jnp.asarray([-0.003, -0.002, 0, 0.002, 0.003], jnp.float32)
    np.testing.assert_array_equal(codebooks.encode4(around, "fp4"), [9, 0, 0, 8, 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", [1, 16])
def test_decode4_is_the_code_book(kind: str, unit: int) -> None:
    other = np.random.default_rng(0).integers(0, 16, 16) * (16 if unit == 1 else 1)
    codes = jnp.asarray(np.arange(16) * unit + other, jnp.uint8)
    np.testing.assert_array_equal(codebooks.decode4(codes, kind, unit), codebooks.CODEBOOKS[kind])


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from([*KINDS, "int8"]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_the_error_is_bounded_by_block(kind: str, dtype: str, scale: float, seed: int) -> None:
    w = jnp.asarray(normal(seed, 128, 24) * np.float32(scale)).astype(dtype)
    q = quantize(w, kind=kind)
    error = np.abs(np.asarray(q.dequantize(jnp.float32)) - np.asarray(w, np.float32))
    blocks = error.reshape(len(q.absmax), -1, 24).max(1)
    book = np.sort(codebooks.CODEBOOKS.get(kind, np.zeros(2)))
    half_gap = np.diff(book).max() / 2 if kind != "int8" else 0.5 / 127
    assert (blocks <= np.asarray(q.absmax) * (half_gap + 1e-5)).all()
    assert blocks.max() > 0


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from([*KINDS, "int8"]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 99),
)
def test_quantising_what_was_dequantised_changes_nothing(kind: str, dtype: str, seed: int) -> None:
    w = normal(seed, 128, 12)
    w[:64, 3] = 0
    once = quantize(jnp.asarray(w).astype(dtype), kind=kind).dequantize()
    twice = quantize(once, kind=kind).dequantize()
    assert once.dtype == dtype
    if kind == "int8" and dtype == "float32":  # its scale is rounded: an ulp can come and go
        np.testing.assert_allclose(once, twice, rtol=1e-6)
    else:
        np.testing.assert_array_equal(once.astype(jnp.float32), twice.astype(jnp.float32))


def test_dynamic_map() -> None:
    book = codebooks.dynamic_map()
    assert book.shape == (256,)
    assert (np.diff(book) > 0).all()
    assert (book[127], book[255]) == (0, 1)
    np.testing.assert_array_equal(book[:127], -book[128:255][::-1])
    np.testing.assert_allclose(book[[128, 254]], [5.5e-7, 0.9 + 0.1 - 0.9 / 128], rtol=1e-6)


def test_nested_codes_are_within_a_step_of_the_grid() -> None:
    values = normal(0, 4, 256)
    values /= np.abs(values).max(1, keepdims=True)
    codes, scales, _ = blockwise.quantize_nested(jnp.asarray(values), jnp.float32(0))
    book = codebooks.dynamic_map()
    nearest = np.abs(values[..., None] - book).min(-1)
    error = np.abs(book[np.asarray(codes)] - values)
    np.testing.assert_array_equal(scales, 1)
    assert (error <= nearest + 2 / 65535).all()


@pytest.mark.parametrize("jit", [True, False])
def test_nested_scales_are_rounded_before_they_are_added(jit: bool) -> None:
    absmax = np.abs(normal(0, 300, 40)) + 1
    codes, scales, offset = blockwise.quantize_nested(jnp.asarray(absmax))
    np.testing.assert_allclose(offset, absmax.mean(dtype=np.float64), rtol=1e-6)
    product = codebooks.dynamic_map()[np.asarray(codes)] * np.asarray(scales)[:, None]
    wanted = (product + np.asarray(offset)).reshape(-1)[: absmax.size].reshape(300, 40).T
    back = blockwise.dequantize_nested
    back = jax.jit(back, static_argnums=(3, 4)) if jit else back
    np.testing.assert_array_equal(back(codes, scales, offset, 40, 300), wanted)
    assert np.abs(wanted.T - absmax).max() < 0.02 * absmax.max()


def test_nested_padding_is_harmless() -> None:
    codes, scales, offset = blockwise.quantize_nested(jnp.full((3, 5), 2.5, jnp.float32))
    assert codes.shape == (1, 256)
    np.testing.assert_array_equal(codes[0, 15:], 127)
    assert np.isfinite(scales).all()
    np.testing.assert_array_equal(blockwise.dequantize_nested(codes, scales, offset, 5, 3), 2.5)


@pytest.mark.parametrize("kind", [*KINDS, "int8"])
def test_rows_in_chunks_are_the_matrix_at_once(kind: str, monkeypatch) -> None:
    w = normal(3, 50, 192)
    monkeypatch.setattr("jlora.quant.quantize._CHUNK", 192 * 16)  # 4 chunks; the last overlaps
    double = kind != "int8"
    rows = quantize_rows(w, kind=kind, double_quant=double)
    whole = quantize(w.T, kind=kind, double_quant=double)
    leaves = zip(jax.tree.leaves(rows), jax.tree.leaves(whole), strict=True)
    for ours, theirs in leaves:
        np.testing.assert_array_equal(ours, theirs)
    assert jax.tree.structure(rows) == jax.tree.structure(whole)


def test_subnormal_blocks_are_zero() -> None:
    w = np.full((64, 2), 1e-39, np.float32)
    w[:, 1] = 1
    np.testing.assert_array_equal(quantize(w).dequantize(), [[0, 1]] * 64)
