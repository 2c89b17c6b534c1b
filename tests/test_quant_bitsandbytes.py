"""bitsandbytes' tensors: round trips, and what is refused. Files of its own are in tests/parity."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.errors import JloraError
from jlora.quant.bitsandbytes import STATE, from_tensors, to_tensors
from jlora.quant.codebooks import CODEBOOKS
from jlora.quant.quantize import quantize, quantize_rows, stack

NF4_STATE = STATE + "nf4"


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def layer(double: bool = True) -> dict[str, np.ndarray]:
    return to_tensors(quantize_rows(normal(24, 128), double_quant=double))


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(kind: str, double: bool, dtype: str, block: int, monkeypatch) -> None:
    monkeypatch.setattr("jlora.quant.bitsandbytes._CHUNK", 700)  # several chunks, the last shorter
    w = jnp.asarray(normal(21, 384)).astype(dtype)
    q = quantize_rows(w, kind=kind, double_quant=double and kind != "int8", block_size=block)
    tensors = to_tensors(q)
    again = from_tensors(tensors, shape=(21, 384), dtype=dtype if kind == "int8" else None)
    assert jax.tree.structure(again) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, again, q)
    twice = to_tensors(again)
    assert twice.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (value.dtype, value.shape) == (twice[name].dtype, twice[name].shape)
        assert value.tobytes() == twice[name].tobytes()


def test_neighbours_share_a_byte_the_first_in_the_high_nibble() -> None:
    w = normal(3, 64)
    tensors = to_tensors(quantize_rows(w))
    assert tensors["weight"].shape == (96, 1)
    codes = np.stack([tensors["weight"] >> 4, tensors["weight"] & 15], 1).reshape(3, 64)
    absmax = tensors["weight.absmax"].reshape(3, 1)
    nearest = np.abs(w[..., None] / absmax[..., None] - CODEBOOKS["nf4"]).argmin(-1)
    np.testing.assert_array_equal(codes, nearest)


def test_names_and_text() -> None:
    tensors = layer()
    scales = {f"weight.{n}" for n in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    assert tensors.keys() == {"weight", NF4_STATE, *scales}
    state = json.loads(bytes(tensors[NF4_STATE]))
    offset = state.pop("nested_offset")
    assert isinstance(offset, float)
    assert list(state.items()) == [
        ("quant_type", "nf4"),
        ("blocksize", 64),
        ("dtype", "float32"),
        ("shape", [24, 128]),
        ("nested_blocksize", 256),
        ("nested_dtype", "float32"),
    ]
    int8 = to_tensors(quantize_rows(normal(24, 100), kind="int8"))
    shapes = {name: (str(value.dtype), value.shape) for name, value in int8.items()}
    assert shapes == {
        "weight": ("int8", (24, 100)),
        "SCB": ("float32", (24,)),
        "weight_format": ("uint8", ()),
    }


def test_other_axes_and_dtypes() -> None:
    q = quantize(normal(128, 4, 6), contracting=(-3,), output=(-2, -1))
    loaded = from_tensors(to_tensors(q))
    np.testing.assert_array_equal(loaded.dequantize(), q.dequantize().reshape(128, 24))
    assert from_tensors(to_tensors(q), dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert from_tensors(to_tensors(quantize_rows(normal(4, 8), kind="int8"))).dtype == jnp.float16


def test_what_has_no_form_there() -> None:
    one = quantize(normal(128, 8))
    with pytest.raises(JloraError, match=r"^up: QuantArray.* it stacks several"):
        to_tensors(stack([one, one]), "up")
    with pytest.raises(JloraError, match="96 inputs are not a multiple of block_size 64"):
        to_tensors(quantize(normal(96, 8)))
    with pytest.raises(JloraError, match="dtype float8_e4m3fn is none of float32"):
        to_tensors(quantize(jnp.ones((64, 8), jnp.float8_e4m3fn)))


def change_state(**changes) -> dict[str, np.ndarray]:
    tensors = layer()
    state = json.loads(bytes(tensors[NF4_STATE])) | changes
    tensors[NF4_STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


def changed(**changes) -> dict[str, np.ndarray]:
    """A layer with tensors replaced, or removed where None; "__" stands for a point."""
    tensors = layer()
    for name, value in changes.items():
        name = name.replace("__", ".", 1)
        tensors[name] = value
    return {name: value for name, value in tensors.items() if value is not None}


INT8 = {"weight": np.zeros((4, 8), np.int8), "SCB": np.ones(4, np.float32)}
NAN = np.full(24 * 128 // 64 // 256 + 1, np.nan, np.float32)
BROKEN = {
    "nothing": ({}, "one of weight.quant_state.bitsandbytes__nf4 and .* expected, and none there"),
    "no weight": (changed(weight=None), "weight is missing, and 1536 bytes are expected"),
    "short weight": (
        changed(weight=np.zeros((9, 1), np.uint8)),
        r"weight is uint8 \(9, 1\), and 15",
    ),
    "no absmax": (changed(weight__absmax=None), r"weight.absmax is missing, and uint8 \(48,\) is"),
    "float absmax": (
        changed(weight__absmax=np.ones(48, np.float32)),
        r"weight.absmax is float32 \(48,\), and uint8 \(48,\) is expected",
    ),
    "no nested map": (changed(weight__nested_quant_map=None), "weight.nested_quant_map is missing"),
    "no nested scales": (changed(weight__nested_absmax=None), "weight.nested_absmax is missing"),
    "nested nan": (
        changed(weight__nested_absmax=NAN),
        "nested_absmax has values that are infinite",
    ),
    "other map": (
        changed(weight__quant_map=CODEBOOKS["fp4"]),
        "weight.quant_map is not the code book of nf4",
    ),
    "other nested map": (
        changed(weight__nested_quant_map=np.linspace(-1, 1, 256).astype(np.float32)),
        "weight.nested_quant_map is not the code book",
    ),
    "bad text": (
        layer() | {NF4_STATE: np.frombuffer(b'{"quant', np.uint8)},
        "bitsandbytes__nf4 is not JSON",
    ),
    "not utf-8": (layer() | {NF4_STATE: np.array([255, 254], np.uint8)}, "is not JSON"),
    "a list": (layer() | {NF4_STATE: np.frombuffer(b"[1]", np.uint8)}, r"is \[1\], and not an obj"),
    "unknown type": (
        {"weight": np.zeros((9, 1), np.uint8), STATE + "af4": np.zeros(2, np.uint8)},
        "quant_type 'af4' is neither nf4 nor fp4",
    ),
    "types disagree": (change_state(quant_type="fp4"), "has quant_type 'fp4'"),
    "block": (change_state(blocksize=48), "has blocksize 48"),
    "dtype": (change_state(dtype="int8"), "has dtype 'int8'"),
    "vector": (change_state(shape=[24]), r"has shape \[24\]"),
    "two": (change_state(dtype="x", shape=None), "has dtype 'x', shape None"),
    "nested block": (change_state(nested_blocksize=128), "has nested_blocksize 128"),
    "offset": (change_state(nested_offset=None), "has nested_offset None"),
    "flat blocks": (change_state(shape=[32, 96]), "96 inputs are not a multiple of blocksize 64"),
    "int8 weight": ({"SCB": np.ones(4, np.float32)}, "weight is missing, and int8"),
    "int8 scales": (
        INT8 | {"SCB": np.ones(5, np.float32)},
        r"SCB is float32 \(5,\), and float32 \(4",
    ),
    "int8 nan": (
        INT8 | {"SCB": np.full(4, np.nan, np.float32)},
        "SCB has values that are infinite",
    ),
    "int8 format": (
        INT8 | {"weight_format": np.array(2, np.uint8)},
        "weight_format is 2, and only 0",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_state(case: str) -> None:
    tensors, message = BROKEN[case]
    with pytest.raises(JloraError, match=f"^layers.0.up: not a weight as bitsandbytes.*{message}"):
        from_tensors(tensors, path="layers.0.up")


def test_all_problems_are_named_at_once() -> None:
    tensors = changed(weight=None, weight__absmax=None)
    with pytest.raises(
        JloraError, match=r"model has \(3, 4\).*weight.absmax is.*; weight is missing"
    ):
        from_tensors(tensors, shape=(3, 4))
    with pytest.raises(JloraError, match=r"weight_format is 1.*the model has \(8, 4\)"):
        from_tensors(INT8 | {"weight_format": np.array(1, np.uint8)}, shape=(8, 4))
