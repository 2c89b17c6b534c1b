"""What is refused before a weight is quantised, or said about it."""

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config import BLOCK_SIZES, QUANT_KINDS
from jlora.errors import JloraError
from jlora.quant.blockwise import LARGEST

_log = logging.getLogger("jlora")


def options(weight: Any, kind: str, block_size: int, double_quant: bool, path: str) -> None:
    """Raise a JloraError that names all that is wrong with `quantize`'s arguments."""
    wrong = []
    if kind not in QUANT_KINDS:
        wrong.append(f"kind {kind!r} is none of {', '.join(QUANT_KINDS)}")
    elif kind == "int8" and double_quant:
        wrong.append("double_quant is for nf4 and fp4: int8 has one scale for each output")
    elif kind != "int8" and block_size not in BLOCK_SIZES:
        wrong.append(f"block_size {block_size} is none of {', '.join(map(str, BLOCK_SIZES))}")
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        wrong.append(f"the weight is {weight.dtype}, and only floats are quantised")
    if not math.prod(weight.shape):
        wrong.append(f"the weight of shape {weight.shape} is empty")
    if wrong:
        raise JloraError(at(path) + "; ".join(wrong))


def finite(absmax: Any, weight: Any, path: str) -> None:
    """Raise a JloraError that counts the weights that no scale can stand for; seen in absmax."""
    if isinstance(absmax, jax.core.Tracer) or bool((np.asarray(absmax) <= LARGEST).all()):
        return
    magnitude = np.abs(np.asarray(weight, np.float32))
    finite = np.isfinite(magnitude)
    large = int((magnitude[finite] > LARGEST).sum())
    raise JloraError(
        f"{at(path)}of {magnitude.size} weights, {int((~finite).sum())} are infinite or not "
        f"numbers and {large} are beyond 2**126: they cannot be quantised. Was the checkpoint "
        "damaged, or written by a run that diverged?"
    )


def padding(size: int, block_size: int, path: str) -> None:
    """Warn where blocks don't divide the inputs; once for each such pair."""
    if size % block_size and (size, block_size) not in _told():
        _told().add((size, block_size))
        _log.warning(
            "%s%d inputs are not a multiple of block_size %d: the last block of each output is "
            "padded with zeros. bitsandbytes lets blocks run on into the next output, so its "
            "codes differ here, and such a weight cannot be written in its layout",
            at(path),
            size,
            block_size,
        )


def whole(packed: Sequence[str]) -> None:
    """Raise a JloraError if there are such paths: of what is quantised and trained as a whole."""
    if packed:
        raise JloraError(
            f"{', '.join(packed[:5])}: what is quantised cannot be trained as a whole; leave it "
            "out of modules_to_save, or of what is quantised (QuantConfig.exclude_modules)"
        )


def at(path: str) -> str:
    """The beginning of a message about the weight at `path`, if it has one."""
    return f"{path}: " if path else ""


@functools.cache
def _told() -> set[tuple[int, int]]:
    return set()
