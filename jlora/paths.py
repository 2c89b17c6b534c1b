"""Trees addressed by path: ``"model/layers/0/self_attn/q_proj/kernel"``.

A *flat tree* is a plain dict from such a path to a leaf. It is a pytree like any other (jit, grad
and optax take it as it is), and every message can name the leaf it is about.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from jlora.errors import JloraError

SHOWN = 10  # lines of each kind in one report; the rest is counted


def join(keys: Iterable[Any]) -> str:
    """The path that keys of a tree (attributes, indices) make."""
    return "/".join(map(str, keys))


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Nested mappings to a flat tree; keys are joined by "/" and turned into strings."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{rest}": leaf for rest, leaf in flatten(value).items()})
        else:
            flat[str(key)] = value
    return flat


def check_same(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    what: str,
    remedy: str,
) -> None:
    """Compare names and shapes in both directions; report every difference in one error.

    Args:
        expected: name -> shape that the reader needs.
        found: name -> shape that the source holds.
        what: the source, for the first line of the message ("model.safetensors").
        remedy: the last line of the message: the next step.

    Raises:
        JloraError: names missing from `found`, names that nothing expects, shapes that differ.
    """
    missing = [f"  missing: {name} {expected[name]}" for name in expected if name not in found]
    extra = [f"  unexpected: {name} {found[name]}" for name in found if name not in expected]
    shapes = [
        f"  shape: {name} is {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    if missing or extra or shapes:
        lines = [line for kind in (missing, extra, shapes) for line in _first(kind)]
        raise JloraError("\n".join([f"{what} does not fit:", *lines, remedy]))


def _first(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    rest = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"  … and {rest} more of this kind"] if rest > 0 else [])
