"""Codes, scales and dequantised values against bitsandbytes on the CPU: bit for bit."""

import json
from typing import Any

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from jlora.quant import blockwise, codebooks
from jlora.quant.array import QuantArray
from jlora.quant.bitsandbytes import STATE, from_tensors, to_tensors
from jlora.quant.quantize import quantize, quantize_rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCKS = (32, 64, 64, 64, 128, 256, 512, 1024, 2048, 4096)
FILLS = ("normal", "small", "heavy-tailed", "constant", "zero blocks", "ties")


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def weights(
    rng: np.random.Generator, shape: tuple[int, int], fill: str, book: np.ndarray
) -> np.ndarray:
    """Random weights with something that quantisers get wrong."""
    w = rng.standard_normal(shape).astype(np.float32)
    if fill == "small":
        w *= 1e-6  # subnormal in float16
    elif fill == "heavy-tailed":
        w = np.clip(rng.standard_t(1.5, shape), -6e4, 6e4).astype(np.float32)
    elif fill == "constant":
        w[:] = rng.standard_normal(1)
    elif fill == "zero blocks":
        w[rng.random(shape[0]) < 0.5] = 0
        w[:, : shape[1] // 2] = 0
    elif fill == "ties":  # with absmax 1, values on the midpoints between entries
        middle = np.sort(book)
        w = rng.choice((middle[1:] + middle[:-1]) / np.float32(2), shape)
        w[:, ::16] = 1
    return w


def cases(count: int, seed: int) -> list[tuple[Any, ...]]:
    """(number, kind, dtype, fill, block, out, in)."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        block = BLOCKS[i % len(BLOCKS)]
        size = block * int(rng.integers(1, max(2, 2048 // block)))
        dtype = list(DTYPES)[int(rng.integers(3))]
        kind = ("nf4", "fp4")[int(rng.integers(2))]
        made.append((i, kind, dtype, FILLS[i % len(FILLS)], block, int(rng.integers(1, 80)), size))
    return made


def same_bits(ours: Any, theirs: torch.Tensor) -> None:
    a, b = np.ascontiguousarray(ours), np.ascontiguousarray(to_numpy(theirs))
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes(), f"{(a != b).sum()} of {a.size} differ"


def same_values(ours: Any, theirs: torch.Tensor) -> None:
    """Equal as numbers: bitsandbytes' FP4 has a negative zero on some paths."""
    a, b = np.asarray(ours), to_numpy(theirs)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32))


@pytest.mark.parametrize("case", cases(36, seed=0), ids=str)
def test_4bit(case: tuple[Any, ...]) -> None:
    i, kind, dtype, fill, block, out, size = case
    w = torch.from_numpy(
        weights(np.random.default_rng(i), (out, size), fill, codebooks.CODEBOOKS[kind])
    ).to(DTYPES[dtype])
    packed, state = bnb.quantize_4bit(w, blocksize=block, quant_type=kind)
    ways = [quantize_rows(to_numpy(w), kind=kind, block_size=block)]
    if i % 5 == 0:  # tests/test_quant_blockwise.py has it that the two agree
        ways.append(quantize(to_numpy(w).T, kind=kind, block_size=block))
    for q in ways:
        assert (q.shape, str(q.dtype)) == ((size, out), dtype)
        same_layer(to_tensors(q), packed, state)
        same_values(q.dequantize().T, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("case", cases(36, seed=1), ids=str)
def test_double_quantisation(case: tuple[Any, ...]) -> None:
    i, kind, dtype, fill, block, out, size = case
    w = torch.from_numpy(
        weights(np.random.default_rng(i), (out, size), fill, codebooks.CODEBOOKS[kind])
    ).to(DTYPES[dtype])
    packed, state = bnb.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=True)
    plain = quantize_rows(to_numpy(w), kind=kind, block_size=block)

    absmax = jnp.asarray(plain.absmax).T
    codes, scales, _ = jax.jit(blockwise.quantize_nested)(absmax, jnp.float32(state.offset.item()))
    same_bits(np.asarray(codes).reshape(-1)[: state.absmax.numel()], state.absmax)
    same_bits(scales, state.state2.absmax)

    # The mean is summed in another order: codes within a step of the map, of those ever given.
    q = quantize_rows(to_numpy(w), kind=kind, block_size=block, double_quant=True)
    np.testing.assert_allclose(q.offset, state.offset.item(), rtol=1e-6, atol=0)
    if np.ptp(plain.absmax) > 1e-3 * np.max(
        plain.absmax
    ):  # what is left of constant scales is the rounding of their mean
        own = np.asarray(q.nested_codes).reshape(-1)[: state.absmax.numel()]
        given = np.searchsorted(np.unique(codebooks.dynamic_thresholds()), dynamic(own), "right")
        theirs = np.searchsorted(
            np.unique(codebooks.dynamic_thresholds()), dynamic(state.absmax.numpy()), "right"
        )
        assert np.abs(given - theirs).max() <= 1

    loaded = from_tensors(numpy_layer(packed, state), shape=(out, size))
    same_values(loaded.dequantize().T, bnb.dequantize_4bit(packed, state))
    same_values(loaded.dequantize(jnp.float32).T, dequantize_in_float32(packed, state))
    same_layer(to_tensors(loaded), packed, state)


@pytest.mark.parametrize("case", cases(36, seed=2), ids=str)
def test_int8(case: tuple[Any, ...]) -> None:
    i, _, dtype, fill, _, out, size = case
    w = torch.from_numpy(weights(np.random.default_rng(i), (out, size), fill, codebooks.NF4)).to(
        DTYPES[dtype]
    )
    codes, scale, _ = bnb.int8_vectorwise_quant(w)
    ways = [quantize_rows(to_numpy(w), kind="int8")]
    if i % 5 == 0:
        ways.append(quantize(to_numpy(w).T, kind="int8"))
    for q in ways:
        tensors = to_tensors(q)
        same_bits(tensors["weight"], codes)
        same_bits(tensors["SCB"], scale)
        same_values(q.dequantize(jnp.float32).T, bnb.int8_vectorwise_dequant(codes, scale))
        again = from_tensors(tensors, shape=(out, size), dtype=q.dtype)
        same_values(again.dequantize().T, bnb.int8_vectorwise_dequant(codes, scale).to(w.dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_floats_next_to_each_threshold(kind: str) -> None:
    book = np.sort(codebooks.CODEBOOKS[kind])
    middle = (book[1:] + book[:-1]) / np.float32(2)
    near = [middle]
    for direction in (-np.inf, np.inf):
        value = middle
        for _ in range(40):
            value = np.nextafter(value, np.float32(direction))
            near.append(value)
    values = np.concatenate(near)
    values[np.abs(values) < 1e-30] = 0  # FP4 has a threshold there; XLA has no subnormal numbers
    values = np.concatenate([values, np.zeros(-len(values) % 63, np.float32)]).reshape(-1, 63)
    for absmax in (1, 0.7, 3.3, 1e-3):
        rows = np.concatenate([np.ones((len(values), 1), np.float32), values], 1)
        rows = rows * np.float32(absmax)
        packed, state = bnb.quantize_4bit(torch.from_numpy(rows), blocksize=64, quant_type=kind)
        same_layer(to_tensors(quantize_rows(rows, kind=kind)), packed, state)


def test_the_floats_next_to_each_dynamic_threshold() -> None:
    near = [codebooks.dynamic_thresholds()]
    for direction in (-np.inf, np.inf):
        value = near[0]
        for _ in range(40):
            value = np.nextafter(value, np.float32(direction))
            near.append(value)
    values = np.clip(np.concatenate(near), -1, 1)
    values = np.concatenate([values, np.zeros(-len(values) % 255, np.float32)]).reshape(-1, 255)
    rows = np.concatenate([np.ones((len(values), 1), np.float32), values], 1)
    theirs, state = bnb.quantize_blockwise(torch.from_numpy(rows), blocksize=256)
    codes, scales, _ = blockwise.quantize_nested(jnp.asarray(rows), jnp.float32(0))
    same_bits(codes, theirs)
    same_bits(scales, state.absmax)


def test_code_books() -> None:
    for kind, book in codebooks.CODEBOOKS.items():
        same_bits(book, bnb.get_4bit_type(kind, device="cpu"))
    same_bits(codebooks.dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_stored_as_another_dtype(storage: torch.dtype) -> None:
    w = torch.randn(24, 128)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", quant_storage=storage)
    tensors = numpy_layer(packed, state)
    same_values(from_tensors(tensors).dequantize().T, bnb.dequantize_4bit(packed, state))


def dynamic(codes: np.ndarray) -> np.ndarray:
    return codebooks.dynamic_map()[codes]


def dequantize_in_float32(packed: torch.Tensor, state: Any) -> torch.Tensor:
    dtype, state.dtype = state.dtype, torch.float32
    values = bnb.dequantize_4bit(packed, state)
    state.dtype = dtype
    return values


def numpy_layer(packed: torch.Tensor, state: Any) -> dict[str, np.ndarray]:
    """The tensors as a safetensors file has them."""
    tensors = {"weight": packed} | {
        f"weight.{name}": value for name, value in state.as_dict(packed=True).items()
    }
    return {name: to_numpy(value) for name, value in tensors.items()}


def same_layer(ours: dict[str, np.ndarray], packed: torch.Tensor, state: Any) -> None:
    theirs = numpy_layer(packed, state)
    assert set(ours) == set(theirs)
    text = STATE + state.quant_type
    assert json.loads(bytes(ours.pop(text))) == json.loads(bytes(theirs.pop(text)))
    for name, value in theirs.items():
        same_bits(ours[name], torch.from_numpy(value))


def test_bitsandbytes_reads_ours() -> None:
    w = np.random.default_rng(0).standard_normal((48, 256)).astype(np.float32)
    for double in (False, True):
        q: QuantArray = quantize_rows(w, double_quant=double)
        tensors = {name: torch.from_numpy(value) for name, value in to_tensors(q).items()}
        packed = tensors.pop("weight")
        state = bnb.QuantState.from_dict(
            {name.removeprefix("weight."): value for name, value in tensors.items()}, "cpu"
        )
        same_values(q.dequantize().T, bnb.dequantize_4bit(packed, state))
