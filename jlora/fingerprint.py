"""Which base an adapter was trained on: its class, its shapes, and a hash of some of each weight.

Of a model of `jlora.load`, what its outputs depend on beside these too. The same for float32 and
bfloat16, before and after injection, and of an NNX model for stacked and unrolled layers; a Linen
tree's layers have the names that they have there.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora import canonical, conversion, injection
from jlora.config import QuantConfig
from jlora.errors import JloraError
from jlora.matching import dotted
from jlora.models import load
from jlora.models.directory import Directory
from jlora.models.tensors import has_weights
from jlora.models.transformer import CausalLM
from jlora.quant.array import QuantArray

_SAMPLES = 16  # values of a weight that are hashed
_SHOWN = 3  # names of each kind in a message


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What is known of a base."""

    architecture: str
    """Name of the model's class."""
    shapes: dict[str, tuple[int, ...]]
    """Canonical path of each parameter -> its shape."""
    hashes: dict[str, str]
    """The same -> CRC-32 of evenly spaced values in bfloat16; weights in codes have none."""
    quant: dict[str, Any] = dataclasses.field(default_factory=dict)
    """kind, block_size and double_quant of the weights in codes, where there are some."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Names and values of what else its outputs depend on, where known, as of `jlora.load`."""

    def __str__(self) -> str:
        """One line: class, size, a hash of the hashes, and the kind of quantised weights."""
        size = sum(math.prod(shape) for shape in self.shapes.values())
        whole = zlib.crc32("".join(self.hashes[p] for p in sorted(self.hashes)).encode())
        kind = f", {self.quant['kind']}" if self.quant else ""
        return f"{self.architecture}, {size:,d} parameters{kind}, hash {whole:08x}"

    def differences(self, other: "Fingerprint") -> list[str]:
        """Return what another base has otherwise, a line for each kind.

        Hashes and settings count where both have them.

        Args:
            other: the base that is there now.
        """
        lines = []
        if self.architecture != other.architecture:
            lines.append(f"architecture: {self.architecture} then, {other.architecture} now")
        ours, theirs = self.shapes, other.shapes
        both = ours.keys() & theirs.keys()
        gone, new = ([p for p in a if p not in both] for a in (ours, theirs))
        other_shape = [f"{p} {ours[p]} then, {theirs[p]} now"
                       for p in ours if p in both and ours[p] != theirs[p]]  # fmt: skip
        for what, found in (("absent now", gone), ("new", new), ("of another shape", other_shape)):
            if found:
                lines.append(f"{len(found)} parameters {what}: {_few(found)}")
        alike = {p for p in both if ours[p] == theirs[p]}
        hashed = [p for p in self.hashes if p in other.hashes and p in alike]
        if changed := [p for p in hashed if self.hashes[p] != other.hashes[p]]:
            lines.append(f"other values in {len(changed)} of {len(hashed)}: {_few(changed)}")
        for name in self.settings:
            then, now = self.settings[name], other.settings.get(name, self.settings[name])
            if then != now:
                lines.append(f"{name}: {then} then, {now} now")
        return lines

    def quant_config(self) -> QuantConfig | None:
        """How the base's weights were quantised, with the names of those that were."""
        if not self.quant:
            return None
        codes = [path for path in self.shapes if path not in self.hashes]
        names = tuple(dotted(path.rpartition("/")[0]) for path in codes)
        values = self.quant | {"target_modules": names}
        return conversion.from_dict(QuantConfig, values, where="the base's fingerprint")


def of(model: Any, params: Any = None) -> Fingerprint:
    """The fingerprint of a model's base, adapted or not; of an abstract model, without hashes.

    One small gather for each parameter and one transfer; no parameter is copied.

    Args:
        model: an NNX model, or a Linen module.
        params: the Linen module's tree of parameters.
    """
    stacks = injection.stacks(model) if params is None else {}
    leaves = injection.base_leaves(model if params is None else params)
    found = of_leaves(_class(model).__name__, leaves.items(), stacks)
    return dataclasses.replace(found, settings=_settings(model))


def of_directory(model_dir: Path | Directory, model: CausalLM) -> Fingerprint:
    """Return the fingerprint of the model in a directory, of which few values are read.

    Of a directory without weights it has no hashes.

    Args:
        model_dir: the directory.
        model: its model with its layers unrolled, abstract.

    Raises:
        JloraError: files that are missing or truncated, or of several models.
    """
    if not isinstance(model_dir, Directory) and not has_weights(model_dir):
        return of(model)
    leaves = load.views(Directory.open(model_dir), model)
    found = of_leaves(type(model).__name__, leaves, {})
    return dataclasses.replace(found, settings=_settings(model))


def of_leaves(
    architecture: str, leaves: Iterable[tuple[str, Any]], stacks: Mapping[str, int]
) -> Fingerprint:
    """The fingerprint of a model with these parameters.

    Args:
        architecture: name of its class.
        leaves: (path, JAX, NumPy or QuantArray, or jax.ShapeDtypeStruct), in the model's shape.
        stacks: path of each stacked module -> number of its layers.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    sampled: dict[str, Any] = {}
    quant: dict[str, Any] = {}
    for path, leaf in leaves:
        layers = canonical.layer_paths(path, stacks)
        stacked = layers != [path]
        shapes |= dict.fromkeys(layers, tuple(leaf.shape[stacked:]))
        if isinstance(leaf, QuantArray):
            quant = quant_of(leaf)
        elif isinstance(leaf, jax.Array):
            sampled[path] = _sample_jit(leaf, stacked)
        elif isinstance(leaf, np.ndarray):
            sampled[path] = _sample(leaf, stacked)
    hashes: dict[str, str] = {}
    for path, values in jax.device_get(sampled).items():
        layers = canonical.layer_paths(path, stacks)
        rows = [values] if layers == [path] else values
        for layer, row in zip(layers, rows, strict=True):
            hashes[layer] = f"{zlib.crc32(np.ascontiguousarray(row).tobytes()):08x}"
    return Fingerprint(architecture, shapes, hashes, quant)


def quant_of(leaf: QuantArray) -> dict[str, Any]:
    """How a weight is quantised, as `Fingerprint.quant` says it."""
    if leaf.kind == "int8":
        return {"kind": leaf.kind}
    double = leaf.nested_codes is not None
    return {"kind": leaf.kind, "block_size": leaf.block_size, "double_quant": double}


def check(known: Fingerprint | None, now: Fingerprint, where: str) -> list[str]:
    """What to say of an adapter at `where` that was trained on another base; nothing if on this."""
    differences = [] if known is None else known.differences(now)
    title = f"the adapter in {where} was trained on another base than this:"
    return [title, *(f"  {line}" for line in differences)] if differences else []


def to_json(known: Fingerprint) -> dict[str, Any]:
    """What is written of a base."""
    return conversion.to_dict(known)


def from_json(values: Any, *, where: str) -> Fingerprint:
    """What `to_json` gave.

    Raises:
        JloraError: something else.
    """
    if not isinstance(values, Mapping):
        raise JloraError(f"{where}: the base's fingerprint is no table; copy the adapter again")
    return conversion.from_dict(Fingerprint, values, where=where)


def _sample(leaf: Any, stacked: bool) -> Any:
    """bfloat16 (samples,) of a leaf, or (layers, samples)."""
    if leaf.ndim == stacked:
        leaf = leaf[..., None]
    shape = leaf.shape[stacked:]
    size = math.prod(shape)
    flat = np.linspace(0, size - 1, _SAMPLES if size else 0).round().astype(np.int64)
    index = np.unravel_index(flat, shape) if size else (np.zeros(0, np.int64),) * len(shape)
    where = (slice(None),) * stacked + tuple(index)
    if isinstance(leaf, np.ndarray):
        return leaf[where].astype(jnp.bfloat16)
    mesh = jax.typeof(leaf).sharding.mesh  # one whose axes are explicit wants to be told
    out = NamedSharding(mesh, PartitionSpec()) if mesh.explicit_axes else None
    return leaf.at[where].get(out_sharding=out).astype(jnp.bfloat16)


_sample_jit = functools.partial(jax.jit, static_argnums=1)(_sample)


def _settings(model: Any) -> dict[str, Any]:
    return model.config.beside_shapes() if isinstance(model, CausalLM) else {}


def _class(model: Any) -> type:
    """The model's own class, below those that injection made of it."""
    cls = type(model)
    for name in ("lora_base", "plain_base", "quant_base"):
        cls = getattr(cls, name, cls)
    return cls


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
