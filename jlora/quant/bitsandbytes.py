"""The tensors that transformers and bitsandbytes write for a quantised layer, and back.

For `X.weight` (out, in) with 4-bit codes a safetensors file has `X.weight`, uint8 (out * in / 2,
1), whose bytes hold neighbours, the first in the high nibble; `X.weight.absmax` by block;
`X.weight.quant_map`; with double quantisation `X.weight.nested_absmax` and `.nested_quant_map`,
absmax then being uint8; and as text `X.weight.quant_state.bitsandbytes__nf4`. For int8 it has
`X.weight` (out, in), `X.SCB` and `X.weight_format`. Codes and scales are those of a QuantArray:
only their order differs, so that nothing is quantised anew either way. NumPy only.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.config import BLOCK_SIZES
from jlora.errors import JloraError
from jlora.quant.array import QuantArray
from jlora.quant.blockwise import NESTED_BLOCK, NESTED_ZERO
from jlora.quant.checks import at
from jlora.quant.codebooks import CODEBOOKS, dynamic_map
from jlora.quant.quantize import empty, kernel

STATE = "weight.quant_state.bitsandbytes__"
_DTYPES = ("float32", "bfloat16", "float16")
_CHUNK = 4_000_000  # bytes that are put into another order at a time


def to_tensors(q: QuantArray, path: str = "") -> dict[str, np.ndarray]:
    """The tensors of one layer's kernel by name: "weight", "weight.absmax", ...

    Args:
        q: a kernel's, (in, out) as a matrix.
        path: for messages.

    Raises:
        JloraError: the layout has no place for it: its rows are padded, it stacks layers or
            experts, or its dtype is none that bitsandbytes knows.
    """
    size, out = math.prod(q.in_shape), math.prod(q.out_shape)
    wrong = []
    if q.codes.ndim != 2:
        wrong.append("it stacks several; write them one by one, as from `unstack`")
    if size % q.block_size:
        wrong.append(
            f"its {size} inputs are not a multiple of block_size {q.block_size}: bitsandbytes' "
            "blocks would run on into the next output, and have other scales"
        )
    if str(q.dtype) not in _DTYPES:
        wrong.append(f"its dtype {q.dtype} is none of {', '.join(_DTYPES)}")
    if wrong:
        raise JloraError(f"{at(path)}{q!r} has no form in bitsandbytes: {'; '.join(wrong)}")
    codes = np.asarray(q.codes)
    if q.kind == "int8":
        scale = np.array(q.absmax, np.float32).reshape(out)
        return {
            "weight": np.ascontiguousarray(codes.T),
            "SCB": scale,
            "weight_format": np.array(0, np.uint8),
        }
    state: dict[str, Any] = {
        "quant_type": q.kind,
        "blocksize": q.block_size,
        "dtype": str(q.dtype),
        "shape": [out, size],
    }
    tensors = {
        "weight": _to_neighbours(codes, q.block_size).reshape(-1, 1),
        "weight.quant_map": CODEBOOKS[q.kind].copy(),
    }
    if q.nested_codes is None:
        tensors["weight.absmax"] = np.array(np.asarray(q.absmax).T, order="C").reshape(-1)
    else:
        blocks = out * size // q.block_size
        tensors["weight.absmax"] = np.array(q.nested_codes).reshape(-1)[:blocks]
        tensors["weight.nested_absmax"] = np.array(q.nested_absmax)
        tensors["weight.nested_quant_map"] = dynamic_map().copy()
        state["nested_blocksize"] = NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(q.offset)
    text = json.dumps(state).encode()
    tensors[STATE + q.kind] = np.frombuffer(text, np.uint8).copy()
    return tensors


def from_tensors(
    tensors: Mapping[str, Any],
    *,
    shape: tuple[int, int] | None = None,
    dtype: Any = None,
    path: str = "",
) -> QuantArray:
    """The kernel (in, out) that a layer's tensors hold; the inverse of `to_tensors`.

    Args:
        tensors: by name, as `to_tensors` gives them; others may be among them.
        shape: (out, in) of the weight that the model wants, if that is to be checked.
        dtype: of the weight; by default that which the tensors name, and for int8, where they name
            none, float16 (what bitsandbytes makes of a weight before).
        path: for messages.

    Returns:
        A QuantArray of NumPy arrays.

    Raises:
        JloraError: something is missing, does not fit, or is not known; it names all of that.
    """
    found = {name: np.asarray(value) for name, value in tensors.items()}
    problems: list[str] = []
    q = (_from_int8 if "SCB" in found else _from_4bit)(found, shape, dtype, problems)
    if q is None or problems:
        raise JloraError(
            f"{at(path)}not a weight as bitsandbytes writes it: {'; '.join(problems)}. "
            "Is the checkpoint complete, and of the model that its configuration says?"
        )
    return q


def _from_int8(
    found: dict[str, np.ndarray], shape: Any, dtype: Any, problems: list[str]
) -> QuantArray | None:
    weight, scale = found.get("weight"), found["SCB"]
    if weight is None or weight.dtype != np.int8 or weight.ndim != 2:
        problems.append(f"weight is {_what(weight)}, and int8 (out, in) is expected beside SCB")
    elif scale.size != weight.shape[0] or scale.dtype != np.float32:
        problems.append(f"SCB is {_what(scale)}, and float32 ({weight.shape[0]},) is expected")
    elif not np.isfinite(scale).all():
        problems.append("SCB has values that are infinite or not numbers")
    if np.any(found.get("weight_format", 0)):
        problems.append(f"weight_format is {found['weight_format']}, and only 0, by row, is known")
    if weight is not None and shape is not None and weight.shape != tuple(shape):
        problems.append(f"weight is {_what(weight)}, and the model has {tuple(shape)}")
    if problems or weight is None:
        return None
    out, size = weight.shape
    codes = empty((size, out), np.int8)
    codes[:] = weight.T
    dtype = np.float16 if dtype is None else dtype
    nothing = None, None, None
    scale = scale.reshape(1, out).copy()
    return kernel(codes, scale, *nothing, kind="int8", block_size=size, size=size, dtype=dtype)


def _from_4bit(
    found: dict[str, np.ndarray], shape: Any, dtype: Any, problems: list[str]
) -> QuantArray | None:
    state = _state(found, problems)
    if state is None:
        return None
    kind, block, (out, size) = state["quant_type"], state["blocksize"], state["shape"]
    if shape is not None and tuple(shape) != (out, size):
        problems.append(f"the state says shape {(out, size)}, and the model has {tuple(shape)}")
    if size % block:
        problems.append(
            f"its {size} inputs are not a multiple of blocksize {block}: blocks run on from one "
            "output into the next, which jlora does not represent. Quantise the original weights"
        )
        return None
    blocks = out * size // block
    nested = "nested_absmax" in found or "nested_offset" in state
    expected = {"weight.absmax": (np.uint8 if nested else np.float32, blocks)}
    maps = {"weight.quant_map": CODEBOOKS[kind]}
    if nested:
        rows = -(-blocks // NESTED_BLOCK)
        expected["weight.nested_absmax"] = np.float32, rows
        maps["weight.nested_quant_map"] = dynamic_map()
    for name, (like, count) in expected.items():
        _check(found, name, like, count, problems)
    for name, book in maps.items():
        value = _check(found, name, np.float32, book.size, problems)
        if value is not None and not np.allclose(value, book, rtol=1e-6, atol=1e-7):
            problems.append(f"{name} is not the code book of {kind} that bitsandbytes has")
    packed = found.get("weight")
    # Another dtype is but a container for the bytes: bnb_4bit_quant_storage.
    if packed is None or packed.nbytes != out * size // 2:
        problems.append(f"weight is {_what(packed)}, and {out * size // 2} bytes are expected")
    if problems or packed is None:
        return None
    data = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
    codes = _to_planes(data.reshape(out, -1), block)
    absmax = found["weight.absmax"].reshape(-1)
    scales: tuple[Any, ...]
    if nested:
        nested_codes = np.full(rows * NESTED_BLOCK, NESTED_ZERO, np.uint8)
        nested_codes[:blocks] = absmax
        nested_absmax = found["weight.nested_absmax"].reshape(-1).copy()
        offset = np.array(state["nested_offset"], np.float32)
        scales = None, nested_codes.reshape(rows, NESTED_BLOCK), nested_absmax, offset
    else:
        scales = absmax.reshape(out, -1).T.copy(), None, None, None
    dtype = jnp.dtype(state["dtype"]) if dtype is None else dtype
    return kernel(codes, *scales, kind=kind, block_size=block, size=size, dtype=dtype)


def _state(found: dict[str, np.ndarray], problems: list[str]) -> dict[str, Any] | None:
    """What the text beside the tensors says, or None after naming what is wrong."""
    names = [name for name in found if name.startswith(STATE)]
    if len(names) != 1:
        problems.append(
            f"one of {STATE}nf4 and {STATE}fp4 is expected, and {names or 'none'} there"
        )
        return None
    name, kind = names[0], names[0].removeprefix(STATE)
    if kind not in CODEBOOKS:
        problems.append(f"quant_type {kind!r} is neither nf4 nor fp4")
        return None
    try:
        state = json.loads(found[name].astype(np.uint8).tobytes())
    except ValueError as error:
        problems.append(f"{name} is not JSON: {error}")
        return None
    wanted = {
        "quant_type": lambda v: v == kind,
        "blocksize": lambda v: isinstance(v, int) and v in BLOCK_SIZES,
        "dtype": lambda v: v in _DTYPES,
        "shape": lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_size, v)),
    }
    if "weight.nested_absmax" in found or (isinstance(state, dict) and "nested_offset" in state):
        wanted["nested_blocksize"] = lambda v: v == NESTED_BLOCK
        wanted["nested_dtype"] = lambda v: v == "float32"
        wanted["nested_offset"] = lambda v: isinstance(v, float | int) and math.isfinite(v)
    if not isinstance(state, dict):
        problems.append(f"{name} is {state!r}, and not an object")
        return None
    wrong = [
        f"{key} {state.get(key)!r}" for key, fits in wanted.items() if not fits(state.get(key))
    ]
    if wrong:
        problems.append(f"{name} has {', '.join(wrong)}")
        return None
    return state


def _check(
    found: dict[str, np.ndarray], name: str, dtype: Any, size: int, problems: list[str]
) -> np.ndarray | None:
    value = found.get(name)
    if value is None or value.size != size or value.dtype != dtype:
        problems.append(f"{name} is {_what(value)}, and {np.dtype(dtype)} ({size},) is expected")
        return None
    if value.dtype == np.float32 and not np.isfinite(value).all():
        problems.append(f"{name} has values that are infinite or not numbers")
    return value


def _what(value: np.ndarray | None) -> str:
    return "missing" if value is None else f"{value.dtype} {value.shape}"


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _to_planes(packed: np.ndarray, block: int) -> np.ndarray:
    """Codes (in / 2, out) of bitsandbytes' (out, in / 2)."""
    out, size = packed.shape
    codes = empty((size, out), np.uint8)
    rows = max(1, _CHUNK // size)
    for start in range(0, out, rows):
        pairs = packed[start : start + rows].reshape(-1, 2, block // 4)
        first, second = pairs[:, 0], pairs[:, 1]  # halves of a block: their values are neighbours
        planes = np.empty((*first.shape, 2), np.uint8)
        planes[..., 0] = (first >> 4) | (second & 0xF0)
        planes[..., 1] = (first & 0x0F) | (second << 4)
        codes[:, start : start + rows] = planes.reshape(-1, size).T
    return codes


def _to_neighbours(codes: np.ndarray, block: int) -> np.ndarray:
    """The inverse of `_to_planes`."""
    size, out = codes.shape
    packed = np.empty((out, size), np.uint8)
    rows = max(1, _CHUNK // size)
    for start in range(0, out, rows):
        planes = np.ascontiguousarray(codes[:, start : start + rows].T)
        planes = planes.reshape(-1, block // 4, 2)
        even, odd = planes[..., 0], planes[..., 1]
        pairs = np.empty((len(planes), 2, block // 4), np.uint8)
        pairs[:, 0] = (even << 4) | (odd & 0x0F)
        pairs[:, 1] = (even & 0xF0) | (odd >> 4)
        packed[start : start + rows] = pairs.reshape(-1, size)
    return packed
