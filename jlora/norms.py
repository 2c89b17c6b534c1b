"""How large stored updates are, and how near to each other, without forming them."""

import math
from typing import Any

import numpy as np

from jlora.checkpoint import StoredAdapter
from jlora.updates import Update, updates

_BLOCK = 2**20  # values that are held in float64


def delta_norms(stored: StoredAdapter) -> dict[str, float]:
    """The Frobenius norm of each update, of all experts together, without forming it.

    Args:
        stored: an adapter, with or without the axes of factored weights.

    Returns:
        Canonical path of each adapted weight's module -> norm; nan or inf where a factor has such
        values.

    Raises:
        JloraError: as for `updates`.
    """
    return {name: norm(update) for name, update in updates(stored).items()}


def norm(update: Update) -> float:
    """The Frobenius norm of scaling * A B."""
    return float(np.sqrt(np.maximum(inner(update, update), 0)))


def inner(x: Update, y: Update) -> float:
    """The sum of the products of the entries of two updates of one weight.

    Through r x r matrices of inner products of rows, in float64, where those of float32 values are
    exact and what is left of like updates' difference, 1e-8 of them, is not noise.
    """
    with np.errstate(all="ignore"):
        products = [
            np.asarray(p, np.float64) @ np.asarray(q, np.float64).swapaxes(-1, -2)
            for p, q in zip(x.matrices(), y.matrices(), strict=True)
        ]
        return float(x.scaling * y.scaling * np.sum(products[0] * products[1]))


def distance(value: Any, base: Any = None) -> float:
    """The Frobenius norm of `value`, or of what it is more than `base`: few rows at a time.

    Args:
        value: any array of floats.
        base: another of its shape.
    """
    rows = np.atleast_1d(np.asarray(value))
    others = None if base is None else np.atleast_1d(np.asarray(base))
    step = max(1, _BLOCK // max(1, math.prod(rows.shape[1:])))
    total = 0.0
    for i in range(0, len(rows), step):
        change = rows[i : i + step].astype(np.float64)
        if others is not None:
            change -= others[i : i + step].astype(np.float64)
        total += float(np.vdot(change, change))
    return math.sqrt(total)
