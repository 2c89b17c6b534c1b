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

from jlora.errors import JloraError, warn_once
from jlora.files import DTYPES
from jlora.quant import bitsandbytes
from jlora.quant.array import QuantArray

# Buffers that old checkpoints carry, which the configuration determines.
_RECOMPUTED = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|self_attn\.(masked_bias|causal_mask)|position_ids)"
)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
WEIGHTS = "model.safetensors"

INDEX = "model.safetensors.index.json"
"""Says which file each tensor of a checkpoint of several is in."""


class _Place(NamedTuple):
    """Where a tensor lies."""

    name: str
    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


class Tensors:
    """The tensors of a checkpoint.

    The files' headers are parsed here and never again. Tensors are read, not mapped: what a process
    has mapped counts as its memory once it was touched.

    Raises:
        JloraError: files that are missing, truncated or no safetensors; one name with different
            tensors in two of them.
    """

    def __init__(self, model_dir: Path):
        names, self.indexed = _files(model_dir)
        self._of: dict[str, _Place] = {}
        for file in (model_dir / name for name in names):
            for name, place in _places(file):
                if name in self._of and not self._alike(self._of[name], place):
                    raise JloraError(
                        f"{name} is in {self._of[name].file} and, otherwise, in {file}: two saves "
                        "were mixed; fetch or convert the model again"
                    )
                self._of[name] = place
        state = re.escape(bitsandbytes.STATE)
        marks = (re.fullmatch(rf"(.*\.)(?:{state}\w+|SCB)", name) for name in self._of)
        self.quantised = {f"{mark[1]}weight" for mark in marks if mark}
        """Names of the weights that bitsandbytes quantised."""

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def equal(self, one: str, other: str) -> bool:
        """Return whether two tensors hold the same values."""
        return self._alike(self._of[one], self._of[other])

    def _alike(self, one: _Place, other: _Place) -> bool:
        """Return whether two places hold the same values, of which few are in memory at a time."""
        if one.shape != other.shape:
            return False
        size, step = math.prod(one.shape), 2**22
        for start in range(0, size, step):
            a, b = (_read(place, start, min(step, size - start)) for place in (one, other))
            if not np.array_equal(a, b):
                return False
        return True

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor as it lies on disk, or some of its rows.

        Raises:
            JloraError: its file has become shorter, or its dtype is not known.
        """
        place = self._of[name]
        start, shape = 0, place.shape
        if shape:
            first, last, _ = rows.indices(shape[0])
            start = first * math.prod(shape[1:])
            shape = (last - first, *shape[1:])
        return _read(place, start, math.prod(shape)).reshape(shape)

    def view(self, name: str) -> np.ndarray:
        """A tensor of which values are read as they are looked at, for where few are."""
        place = self._of[name]
        return np.memmap(place.file, jnp.dtype(self.dtype(name)), "r", place.start, place.shape)

    def size(self) -> int:
        """Return how many bytes the files have."""
        return sum(file.stat().st_size for file in {place.file for place in self._of.values()})

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
        return _dtype(self._of[name])

    def _parts(self, name: str) -> set[str]:
        """Names of what lies beside the codes of a quantised weight."""
        module = name.removesuffix("weight")
        beside = {f"{module}SCB", f"{module}weight_format"}
        return {n for n in self._of if n in beside or n.startswith(f"{name}.")}


def _dtype(place: _Place) -> str:
    if place.dtype not in DTYPES:
        raise JloraError(
            f"{place.file}: {place.name} is {place.dtype}, and only {', '.join(DTYPES)} are read"
        )
    return DTYPES[place.dtype]


def _read(place: _Place, start: int, count: int) -> np.ndarray:
    """Read `count` values of a tensor from value `start` on, (count,)."""
    dtype = jnp.dtype(_dtype(place))
    offset = place.start + start * dtype.itemsize
    array = np.fromfile(place.file, dtype, count=count, offset=offset)
    if array.size != count:
        raise JloraError(f"{place.file} was cut short while it was read; fetch it again")
    return array


def has_weights(model_dir: Path) -> bool:
    """Return whether a directory holds safetensors, or an index of such."""
    return (model_dir / INDEX).is_file() or any(model_dir.glob("*.safetensors"))


def _files(model_dir: Path) -> tuple[list[str], bool]:
    """Return the names of a checkpoint's files, and whether they are an index's.

    As transformers does: model.safetensors if there is one, else what the index names. Of other
    shards, and of an index that is not used, the log has a warning.

    Raises:
        JloraError: there are no weights that can be read; files that the index names are absent.
    """
    index, single = model_dir / INDEX, (model_dir / WEIGHTS).is_file()
    shards = sorted(file.name for file in model_dir.glob("*") if _SHARD.fullmatch(file.name))
    listed: list[str] = []
    if index.is_file():
        try:
            listed = _listed(index)
        except JloraError:
            if not single:  # beside which any index is left unread
                raise
    if not single and not listed:
        raise JloraError(_without_weights(model_dir, shards))
    names = [WEIGHTS] if single else listed
    if absent := [name for name in names if not (model_dir / name).is_file()]:
        raise JloraError(
            f"{model_dir} lacks {', '.join(absent)}; {INDEX} names it: fetch or convert the model "
            "again"
        )
    unread = [name for name in shards if name not in names]
    if single and index.is_file() and listed != [WEIGHTS]:
        unread = [INDEX, *unread]
    if unread:
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        warn_once(
            f"{model_dir}: the weights are read from {WEIGHTS if single else INDEX}, as "
            f"transformers does, and {', '.join(unread[:5])}{more} beside it left unread: remove "
            "what is of an older save"
        )
    return names, not single


def _listed(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(Path(name)) for name in names})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise JloraError(f"{index} is not a safetensors index; fetch it again") from None


def _without_weights(model_dir: Path, shards: list[str]) -> str:
    """Return what to say of a directory without weights, or with such as are not read."""
    lacks = f"{model_dir} lacks {WEIGHTS}"
    if (link := model_dir / WEIGHTS).is_symlink():
        return f"{lacks}: it is a link to {link.readlink()}, which is not there; fetch it again"
    if shards:
        return f"{lacks}, and {INDEX}, which says what {shards[0]} is part of: fetch that too"
    pickled = sorted(file.name for file in model_dir.glob("*.bin"))
    if pickled:
        return (
            f"{lacks}; weights must be safetensors, and {pickled[0]} is pickled, which can run any "
            "code: where torch is, convert it with transformers' AutoModelForCausalLM"
            f".from_pretrained({str(model_dir)!r}).save_pretrained(...)"
        )
    others = sorted(file.name for file in model_dir.glob("*.safetensors") if file.is_file())
    there = f" ({', '.join(others[:3])} is there, and is not it)" if others else ""
    return f"{lacks}{there}; weights must be safetensors: fetch or convert the model again"


def _places(file: Path) -> Iterator[tuple[str, _Place]]:
    """Yield (name, place) for every tensor of a file."""
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
            yield name, _Place(name, file, 8 + size + start, about["dtype"], tuple(about["shape"]))
