"""The tensors of a Hugging Face directory, quantised or not, read one at a time."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.errors import JloraError
from jlora.quant import bitsandbytes
from jlora.quant.array import QuantArray

# Buffers that old checkpoints carry and that the configuration determines.
_RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Tensors:
    """The open files of a checkpoint; a context manager.

    Raises:
        JloraError: files that are missing, truncated or no safetensors.
    """

    def __init__(self, model_dir: Path):
        self._files = ExitStack()
        try:
            self._of = dict(_open(model_dir, self._files))
        except BaseException:
            self._files.close()
            raise
        state = re.escape(bitsandbytes.STATE)
        marks = (re.fullmatch(rf"(.*\.)(?:{state}\w+|SCB)", name) for name in self._of)
        self.quantised = {f"{mark[1]}weight" for mark in marks if mark}
        """Names of the weights that bitsandbytes quantised."""

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def read(self, name: str) -> np.ndarray:
        """A tensor as it lies on disk."""
        return self._of[name].get_tensor(name)

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
            name: None if name in self.quantised else tuple(file.get_slice(name).get_shape())
            for name, file in self._of.items()
            if name not in parts and not _RECOMPUTED.fullmatch(name)
        }

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as NumPy calls it: "bfloat16"."""
        return _DTYPES.get(self._of[name].get_slice(name).get_dtype(), "float32")

    def _parts(self, name: str) -> set[str]:
        """Names of what lies beside the codes of a quantised weight."""
        module = name.removesuffix("weight")
        beside = {f"{module}SCB", f"{module}weight_format"}
        return {n for n in self._of if n in beside or n.startswith(f"{name}.")}


_DTYPES = {"BF16": "bfloat16", "F16": "float16"}


def _open(model_dir: Path, files: ExitStack) -> Iterator[tuple[str, Any]]:
    """(tensor name, open file) for every tensor of the checkpoint."""
    index = model_dir / "model.safetensors.index.json"
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
    for name in names:
        try:
            file = files.enter_context(safe_open(model_dir / name, framework="np"))
        except (SafetensorError, OSError) as error:
            raise JloraError(
                f"{model_dir / name} is truncated or no safetensors file ({error}); fetch it again"
            ) from None
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            yield key, file
