"""Rotary frequencies from what a config.json says of them, as transformers 5 reads it."""

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

KINDS = ("default", "linear", "llama3")
_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_LONGEST = "original_max_position_embeddings"
_LARGEST = sys.float_info.max
THETA = 10000.0
"""The base of the frequencies where a configuration gives none, in each of our families."""


def inverse_frequencies(
    config: Mapping[str, Any], head_dim: int, max_positions: int
) -> tuple[tuple[float, ...], list[str]]:
    """Return the rotary frequencies of a configuration, and what is wrong with its fields.

    `rope_scaling` beats `rope_parameters`, and what these say beats the top level, but for the
    original length, where the top level's beats theirs.

    Args:
        config: what config.json holds.
        head_dim: even.
        max_positions: the original length of "llama3" where the configuration gives none.

    Returns:
        Radians a position, (head_dim / 2,), and one line for each field that cannot be used; where
        there are such lines, no frequencies.
    """
    source = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = {} if config.get(source) is None else config[source]
    if not isinstance(rope, Mapping):
        return (), [f"{source} {rope!r} (only an object of settings)"]
    if nested := sorted(key for key, value in rope.items() if isinstance(value, Mapping)):
        return (), [f"{source} for each kind of layer, {', '.join(nested)} (only one for all)"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in KINDS:
        return (), [f"rotary scaling: {source} of kind {kind!r} (only {', '.join(KINDS)})"]
    problems = []

    def positive(key: str, value: Any) -> float:
        if not is_number(value) or value <= 0:
            problems.append(f"{key} {value!r} (only a positive number)")
            return 1.0
        return float(value)

    own = "rope_theta" in rope
    name = f"{source}.rope_theta" if own else "rope_theta"
    theta = positive(name, rope["rope_theta"] if own else config.get("rope_theta", THETA))
    for where, given, neutral in ((f"{source}.", rope, (1,)), ("", config, (1, None))):
        if (partial := given.get("partial_rotary_factor", 1)) not in neutral:
            problems.append(f"{where}partial_rotary_factor {partial!r} (only 1)")
    lacking = [f"{source}.{key}" for key in _FIELDS[kind] if key not in rope]
    problems += [f"rotary scaling {kind!r} lacks {key}" for key in lacking]
    values = {key: positive(f"{source}.{key}", rope[key]) for key in _FIELDS[kind] if key in rope}
    if kind == "llama3":
        top = _LONGEST in config
        longest = config[_LONGEST] if top else rope.get(_LONGEST, max_positions)
        values[_LONGEST] = positive(_LONGEST if top else f"{source}.{_LONGEST}", longest)
        low, high = (values.get(f"{end}_freq_factor", 0.0) for end in ("low", "high"))
        if not problems and low >= high:
            problems.append(f"{source}.high_freq_factor {high:g} (only above low_freq_factor)")
    if problems:
        return (), problems
    freq = _plain(theta, head_dim)
    if kind == "linear":
        freq = freq / np.float32(values["factor"])
    elif kind == "llama3":
        freq = _llama3(freq, values)
    if not np.isfinite(freq).all():
        return (), [f"{name} {theta!r} (only what frequencies in float32 can be made of)"]
    return tuple(float(f) for f in freq), []


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number, and one that a float can be."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _plain(theta: float, head_dim: int) -> np.ndarray:
    # In float32 as models were trained, each operation rounded to the nearest: NumPy's own float32
    # power is off by 2 ulp, which at a position in the thousands is an angle 1e-3 away.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    with np.errstate(over="ignore", divide="ignore"):
        powers = np.float64(np.float32(theta)) ** exponents.astype(np.float64)
        return np.float32(1) / powers.astype(np.float32)


def _llama3(freq: np.ndarray, rope: Mapping[str, float]) -> np.ndarray:
    """Divide long wavelengths by `factor` and keep short ones, as Llama 3.1 does."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / freq
    smooth = np.clip((rope[_LONGEST] / wavelength - low) / (high - low), 0, 1)
    return ((1 - smooth) * freq / rope["factor"] + smooth * freq).astype(np.float32)
