"""The tensors of a Hugging Face directory, quantised or not, read one at a time."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.errors import JloraError
from jlora.files import DTYPES
from jlora.quant import bitsandbytes
from jlora.quant.array import QuantArray

# Buffers that old checkpoints carry and that the configuration determines.
_RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


INDEX = "model.safetensors.index.json"
"""Says which file each tensor of a checkpoint of several is in."""


class _Place(NamedTuple):
    """Where a tensor lies."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


class Tensors:
    """The tensors of a checkpoint.

    They are read, not mapped: what a process has mapped counts as its memory once it was touched.

    Raises:
        JloraError: files that are missing, truncated or no safetensors.
    """

    def __init__(self, model_dir: Path):
        self._of = dict(_places(model_dir))
        state = re.escape(bitsandbytes.STATE)
        marks = (re.fullmatch(rf"(.*\.)(?:{state}\w+|SCB)", name) for name in self._of)
        self.quantised = {f"{mark[1]}weight" for mark in marks if mark}
        """Names of the weights that bitsandbytes quantised."""

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor as it lies on disk, or some of its rows.

        Raises:
            JloraError: its file has become shorter, or its dtype is not known.
        """
        file, start, _, shape = self._of[name]
        dtype = jnp.dtype(self.dtype(name))
        if shape:
            first, last, _ = rows.indices(shape[0])
            start += first * math.prod(shape[1:]) * dtype.itemsize
            shape = (last - first, *shape[1:])
        array = np.fromfile(file, dtype, count=math.prod(shape), offset=start)
        if array.size != math.prod(shape):
            raise JloraError(f"{file} was cut short while it was read; fetch it again")
        return array.reshape(shape)

    def view(self, name: str) -> np.ndarray:
        """A tensor of which values are read as they are looked at, for where few are."""
        file, start, _, shape = self._of[name]
        return np.memmap(file, jnp.dtype(self.dtype(name)), "r", start, shape)

    def files(self) -> dict[str, list[str]]:
        """Name of each file -> those of its tensors, the parts of quantised weights left out."""
        parts = {part for name in self.quantised for part in self._parts(name)}
        found: dict[str, list[str]] = {}
        for name, place in self._of.items():
            if name not in parts:
                found.setdefault(place.file.name, []).append(name)
        return found

    def read_quantised(self, name: str, shape: tuple[int, int], dtype: Any) -> QuantArray:
        """A quantised weight (out, in), as that of a kernel (in, out).

        Raises:
            JloraError: its tensors do not fit each other, or the shape.
        """
        prefix = name.removesuffix("weight")
        own = {n.removeprefix(prefix): self.read(n) for n in self._parts(name) | {name}}
        return bitsandbytes.from_tensors(own, shape=shape, dtype=dtype, path=name)

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Name -> shape of every weight; None for what is quantised, which says so itself."""
        parts = {part for name in self.quantised for part in self._parts(name)}
        return {
            name: None if name in self.quantised else place.shape
            for name, place in self._of.items()
            if name not in parts and not _RECOMPUTED.fullmatch(name)
        }

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as NumPy calls it: "bfloat16"."""
        place = self._of[name]
        if place.dtype not in DTYPES:
            raise JloraError(
                f"{place.file}: {name} is {place.dtype}, and only {', '.join(DTYPES)} are read"
            )
        return DTYPES[place.dtype]

    def _parts(self, name: str) -> set[str]:
        """Names of what lies beside the codes of a quantised weight."""
        module = name.removesuffix("weight")
        beside = {f"{module}SCB", f"{module}weight_format"}
        return {n for n in self._of if n in beside or n.startswith(f"{name}.")}


def _places(model_dir: Path) -> Iterator[tuple[str, _Place]]:
    """(name, place) for every tensor of the checkpoint."""
    index = model_dir / INDEX
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise JloraError(f"{index} is not a safetensors index; fetch it again") from None
    if absent := [name for name in names if not (model_dir / name).is_file()]:
        raise JloraError(
            f"{model_dir} lacks {', '.join(absent)}; weights must be safetensors: fetch or convert "
            "the model again"
        )
    for file in (model_dir / name for name in names):
        try:
            with safe_open(file, framework="np"):  # refuses what is truncated
                pass
        except (SafetensorError, OSError) as error:
            raise JloraError(
                f"{file} is truncated or no safetensors file ({error}); fetch it again"
            ) from None
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        for name, about in header.items():
            if name != "__metadata__":
                start, _ = about["data_offsets"]
                yield name, _Place(file, 8 + size + start, about["dtype"], tuple(about["shape"]))
