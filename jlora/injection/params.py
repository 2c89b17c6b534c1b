"""Trees of parameters as Flax Linen has them: what in them is an adapter's."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import FrozenDict, meta

from jlora.adapter import LORA_A, LORA_ADDED, LORA_B, LORA_TOKENS
from jlora.errors import JloraError


def flatten(params: Any) -> dict[str, Any]:
    """Nested mappings to path -> leaf; boxes (nn.Partitioned) are leaves."""
    return {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(dict(params)).items()}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict({tuple(path.split("/")): v for path, v in flat.items()})


def is_trained(path: str) -> bool:
    """Tell whether a leaf of a tree of parameters is an adapter's, by its name.

    `init` of an injected module refuses a module whose own parameters have such names.
    """
    name = path.rpartition("/")[2]
    own = name in (LORA_A, LORA_B, LORA_TOKENS) or name.startswith(LORA_ADDED)
    return own or name.endswith((f"_{LORA_A}", f"_{LORA_B}"))


def check_names(tree: Any, known: Iterable[str]) -> None:
    """Demand that each leaf of a module's tree that is called like an adapter's is one.

    Args:
        tree: the module's parameters.
        known: paths of the leaves that its plan has.

    Raises:
        JloraError: the module has parameters of its own with such names.
    """
    known = set(known)
    if own := [path for path in flatten(tree) if is_trained(path) and path not in known]:
        raise JloraError(
            f"{', '.join(own[:5])}: parameters of the module itself with names that adapters "
            f"have ({LORA_A}, {LORA_B}, {LORA_TOKENS}, {LORA_ADDED}…, …_{LORA_A}, …_{LORA_B}), "
            "where neither could be told from the other; rename them in the module"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinenBase:
    """All of a tree of parameters but its trained leaves."""

    rest: dict[str, Any]
    order: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    frozen: bool = dataclasses.field(metadata={"static": True})


def partition(params: Any) -> tuple[dict[str, Any], LinenBase]:
    """Split into (trained leaves by path, everything else); `combine` is the inverse."""
    _demand_params(params)
    flat = flatten(params)
    trained = {path: leaf for path, leaf in flat.items() if is_trained(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in trained}
    return trained, LinenBase(rest, tuple(flat), isinstance(params, FrozenDict))


def base_leaves(params: Any) -> dict[str, Any]:
    """Path -> leaf of the base, out of its box, the codes of quantised weights too."""
    flat = flatten(params)
    leaves = {path: leaf for path, leaf in flat.items() if not is_trained(path)}
    is_box = lambda leaf: isinstance(leaf, meta.AxisMetadata)  # noqa: E731
    return {p: jax.tree.map(meta.unbox, leaf, is_leaf=is_box) for p, leaf in leaves.items()}


def combine(adapters: Mapping[str, Any], base: LinenBase | Mapping[str, Any]) -> Any:
    """The tree that `partition` split; or another tree of the same module with these adapters."""
    if not isinstance(base, LinenBase):
        own = {path: leaf for path, leaf in flatten(base).items() if not is_trained(path)}
        modules = {path.rpartition("/")[0] for path in own}
        if strays := [path for path in adapters if path.rpartition("/")[0] not in modules]:
            raise JloraError(f"the tree has no place for {', '.join(strays[:5])}")
        whole = unflatten(own | dict(adapters))
        return FrozenDict(whole) if isinstance(base, FrozenDict) else whole
    flat = {p: adapters[p] if p in adapters else base.rest[p] for p in base.order}
    tree = unflatten(flat)
    return FrozenDict(tree) if base.frozen else tree


def count(params: Any) -> tuple[int, int]:
    """(trained, all) parameters; a trained bias counts once among all."""
    _demand_params(params)
    sizes = {path: meta.unbox(leaf).size for path, leaf in flatten(params).items()}
    trained = {path: size for path, size in sizes.items() if is_trained(path)}
    added = f"{LORA_ADDED}bias"
    biases = sum(n for path, n in trained.items() if path.rpartition("/")[2] == added)
    return sum(trained.values()), sum(sizes.values()) - biases


def no_updates(gradients: Any, params: Any) -> Any:
    """For each gradient, what optax.apply_updates adds to its parameter without changing a bit.

    Raises:
        JloraError: a gradient of integers (float0), which don't say what these are, and no params.
    """
    integers = any(x.dtype == jax.dtypes.float0 for x in jax.tree.leaves(gradients))
    if integers and params is None:
        raise JloraError(
            "the tree holds integers, such as the codes of quantised weights: give the optimiser's "
            "update the parameters too, update(gradients, state, params)"
        )

    def zero(gradient: Any, like: Any) -> jax.Array:
        # Not +0: that would turn a weight of -0 into +0.
        return -jnp.zeros_like(like if gradient.dtype == jax.dtypes.float0 else gradient)

    return jax.tree.map(zero, gradients, params if integers else gradients)


def _demand_params(tree: Any) -> None:
    if isinstance(tree.get("params"), Mapping):
        raise JloraError('these are all of a module\'s variables: give variables["params"]')


def boxed_like(leaves: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` in the boxes that `leaves` of the same paths are in."""
    return {path: meta.replace_boxed(leaf, values[path]) for path, leaf in leaves.items()}


def unboxed(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays in boxes."""
    return {path: meta.unbox(leaf) for path, leaf in leaves.items()}
