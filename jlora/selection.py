"""Factors of many adapters stacked into slots, and which of them a step uses."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """Slots of stacked factors: a pytree whose shapes are the same whichever slots are chosen.

    Passed to jit in place of a tree of factors, it is gathered in there (`gathered`).
    """

    slots: dict[str, Array]
    """Path -> (*stack, slots, r, ...)."""
    index: Any
    """int32 (): the slot of all rows; or (B,): that of each row."""
    axes: tuple[tuple[str, int], ...] = dataclasses.field(metadata={"static": True})
    """(path, axis of its slots), for each."""


def gathered(adapters: Mapping[str, Any] | Selection) -> Mapping[str, Any]:
    """The factors of the chosen slots: path -> (*stack, r, ...), or (*stack, B, r, ...) by row.

    A tree of factors is given back as it is.
    """
    if not isinstance(adapters, Selection):
        return adapters
    return {
        path: jnp.take(adapters.slots[path], adapters.index, axis=axis, mode="clip")
        for path, axis in adapters.axes
    }
