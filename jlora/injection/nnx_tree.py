"""NNX models as trees: what in them is trained, and all the rest."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jlora.paths import join
from jlora.selection import Selection, gathered

KEPT = "lora_kept_"
"""Before the name of an attribute that is trained as a whole: where its first values are kept."""


class TrainedParam(nnx.LoRAParam):
    """A parameter of the base that is trained as a whole; its first values stay beside it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NnxBase:
    """All of a model but its trained leaves, as a pytree that passes through jit."""

    rest: Any
    graphdef: Any = dataclasses.field(metadata={"static": True})
    paths: tuple = dataclasses.field(metadata={"static": True})


def partition(model: nnx.Module, everything: bool) -> tuple[dict[str, Any], NnxBase]:
    """Split into (trained leaves by path, everything else); `combine` is the inverse."""
    trainable: Any = nnx.Param if everything else nnx.LoRAParam
    graphdef, chosen, rest = nnx.split(model, trainable, ...)  # type: ignore[misc]
    flat = nnx.to_flat_state(chosen)
    paths = tuple(path for path, _ in flat)
    leaves = {join(path): leaf.get_value() for path, leaf in flat}
    return leaves, NnxBase(rest=rest, graphdef=graphdef, paths=paths)


def base_leaves(model: nnx.Module) -> dict[str, Any]:
    """Path -> value of each parameter of the base, of trained ones the value that was kept."""
    return {
        join((*keys[:-1], str(keys[-1]).removeprefix(KEPT))): leaf.get_value()
        for keys, leaf in variables(model, nnx.Param)
        if not isinstance(leaf, nnx.LoRAParam)
    }


def combine(adapters: Mapping[str, Any] | Selection, base: NnxBase) -> nnx.Module:
    """A new model that holds the given leaves; no array is copied, but those chosen of a bank's."""
    adapters = gathered(adapters)
    flat = [(path, adapters[join(path)]) for path in base.paths]
    # copy: new Variables (not arrays), or NNX refuses to update a random stream under jax.grad.
    return nnx.merge(base.graphdef, nnx.from_flat_state(flat), base.rest, copy=True)


def update(model: nnx.Module, adapters: Mapping[str, Any]) -> None:
    """Set the values of the model's leaves by path, in place, in each leaf's own dtype."""
    for path, leaf in variables(model, nnx.Param):
        if (value := adapters.get(join(path))) is not None:
            leaf.set_value(jnp.asarray(value, leaf.dtype))


def train_mode(model: nnx.Module, key: jax.Array) -> None:
    """Turn dropout on, in place, with draws that follow from `key`."""
    model.train()
    # A model injected with a bare key, or nnx.Rngs(key), has its streams under the name "default".
    default = jax.random.fold_in(key, 1)
    nnx.reseed(model, policy="match_shape", dropout=key, default=default)


def eval_mode(model: nnx.Module) -> None:
    """Turn dropout off, in place."""
    model.eval()


def count(model: nnx.Module) -> tuple[int, int]:
    """(trained, all) parameters; a shared weight counts once, padding not at all."""
    sizes = [(isinstance(v, nnx.LoRAParam), v.size) for _, v in variables(model, nnx.Param)]
    padding = 0
    for _, module in nnx.iter_modules(model):
        if layers := getattr(module, "lora_layers", ()):
            width = max(r for r, _, _ in layers)
            used = sum(r for r, _, _ in layers)
            holder: Any = module
            size = holder.lora_a.size + holder.lora_b.size
            padding += size - size * used // (width * len(layers))
    # As PEFT counts: of a saved module both copies are there, a bias is the same parameter.
    kept = sum(v.size for path, v in variables(model, nnx.Param) if path[-1] == f"{KEPT}bias")
    trained = sum(size for trains, size in sizes if trains)
    return trained - padding, sum(size for _, size in sizes) - padding - kept


def variables(model: nnx.Module, kind: Any) -> list[tuple[tuple, Any]]:
    """(path, variable) of each variable of a kind."""
    return list(nnx.to_flat_state(nnx.state(model, kind)))


def modules(model: nnx.Module) -> dict[str, Any]:
    """Path -> module, of each."""
    return {join(path): module for path, module in nnx.iter_modules(model)}


def holder(model: Any, path: str) -> Any:
    """Return what holds the parameters under a path: a module, or a dictionary as of ToNNX."""
    found = model
    for key in path.split("/") if path else ():
        if isinstance(found, Mapping):
            found = found[key] if key in found else found[int(key)]
        elif key.isdecimal() and not hasattr(found, key):
            found = found[int(key)]
        else:
            found = getattr(found, key)
    return found


def trained_wholly(model: Any) -> list[tuple[Any, str]]:
    """Return (module or dictionary, name) of each parameter that is trained as a whole."""
    return [
        (holder(model, join(keys[:-1])), str(keys[-1]).removeprefix(KEPT))
        for keys, _ in variables(model, nnx.Param)
        if str(keys[-1]).startswith(KEPT)
    ]


def get(held_by: Any, name: str) -> Any:
    """Return a variable of a module or a dictionary."""
    return held_by[name] if isinstance(held_by, Mapping) else getattr(held_by, name)


def put(held_by: Any, name: str, variable: Any) -> None:
    """Set a variable of a module or a dictionary."""
    if isinstance(held_by, Mapping):
        held_by[name] = variable  # type: ignore[index]
    else:
        setattr(held_by, name, variable)


def drop(held_by: Any, name: str) -> None:
    """Delete a variable of a module or a dictionary."""
    if isinstance(held_by, Mapping):
        del held_by[name]  # type: ignore[attr-defined]
    else:
        delattr(held_by, name)
