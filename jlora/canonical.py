"""The canonical form of a tree: per-layer paths and leaves, whatever the model's layout.

A *stack* is a module whose parameters have a leading layer axis: the stack "layers" of two layers
holds at "layers/up/kernel" what the unrolled model has at "layers/0/up/kernel" and
"layers/1/up/kernel". Files hold the latter.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.errors import JloraError

Ranks = Mapping[str, tuple[int, ...]]


def layer_path(path: str, stack: str | None, index: int) -> str:
    """The path of layer `index` of a stacked path: ("a/b/c", "a", 2) -> "a/2/b/c"."""
    if stack is None:
        return path
    rest = path.removeprefix(stack).removeprefix("/")
    return "/".join(part for part in (stack, str(index), rest) if part)


def layer_paths(path: str, stacks: Mapping[str, int]) -> list[str]:
    """The canonical paths of a leaf: one for each layer of its stack, or just itself."""
    stack = _stack_of(path, stacks)
    if stack is None:
        return [path]
    return [layer_path(path, stack, i) for i in range(stacks[stack])]


def unstack(
    flat: Mapping[str, Any], stacks: Mapping[str, int], ranks: Ranks | None = None
) -> dict[str, Any]:
    """To the canonical form: per-layer paths and leaves, whatever the model's layout.

    Args:
        flat: path -> leaf (numpy, JAX or anything with indexing), in the model's shape.
        stacks: path of each stacked module -> number of its layers.
        ranks: path of a leaf -> its layers' own ranks, where the leaf is padded: its layers are cut
            to these, and those of rank 0 left out.
    """
    result = {}
    for path, leaf in flat.items():
        layers = layer_paths(path, stacks)
        if layers == [path]:
            result[path] = leaf
        elif ranks and path in ranks:
            own = zip(layers, leaf, ranks[path], strict=True)
            result |= {layer: part[:r] for layer, part, r in own if r}
        else:
            # A quantised weight is a tree of its own, each of whose arrays is stacked.
            each = (jax.tree.map(lambda x, i=i: x[i], leaf) for i in range(leaf.shape[0]))
            result |= dict(zip(layers, each, strict=True))
    return result


def restack(
    canonical: Mapping[str, Any], stacks: Mapping[str, int], ranks: Ranks | None = None
) -> dict[str, Any]:
    """From the canonical form to the model's shape; the inverse of `unstack`, bit for bit.

    Raises:
        JloraError: some layer of a stacked leaf is absent.
    """
    result: dict[str, Any] = {}
    groups: dict[str, dict[int, tuple[Any, int]]] = {}
    for path, leaf in canonical.items():
        stack = _stack_of(path, stacks)
        if stack is None:
            result[path] = leaf
        else:
            index, _, rest = path.removeprefix(stack + "/").partition("/")
            groups.setdefault(f"{stack}/{rest}", {})[int(index)] = (leaf, stacks[stack])
    for path, layers in groups.items():
        count = next(iter(layers.values()))[1]
        own = (ranks or {}).get(path)
        missing = [i for i in range(count) if i not in layers and (own is None or own[i])]
        if missing:
            raise JloraError(f"{path}: layers {missing} of {count} are absent")
        parts = {i: leaf for i, (leaf, _) in layers.items()}
        if own is not None:
            like = next(iter(parts.values()))
            empty = jnp.zeros((max(own), *like.shape[1:]), like.dtype)
            parts = {i: empty.at[: own[i]].set(parts[i]) if own[i] else empty for i in range(count)}
        result[path] = jnp.stack([parts[i] for i in range(count)])
    return result


def layer_lists(flat: Mapping[str, Any]) -> dict[str, int]:
    """Path of each list of layers with like leaves -> number of layers: `restack` can stack them.

    {"layers/0/up/lora_a": (8, 4), "layers/1/up/lora_a": (8, 4), ...} -> {"layers": 2}; a list whose
    layers differ, in rank for instance, is not among them.
    """
    lists: dict[str, dict[str, dict[str, Any]]] = {}
    for path, leaf in flat.items():
        parts = path.split("/")
        index = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if index is not None:
            layers = lists.setdefault("/".join(parts[:index]), {})
            rest = "/".join(parts[index + 1 :])
            layers.setdefault(parts[index], {})[rest] = (leaf.shape, leaf.dtype)
    return {
        path: len(layers)
        for path, layers in lists.items()
        if path
        and set(layers) == {str(i) for i in range(len(layers))}
        and all(leaves == layers["0"] for leaves in layers.values())
        and sum(p.startswith(path + "/") for p in flat) == len(layers) * len(layers["0"])
    }


def _stack_of(path: str, stacks: Iterable[str]) -> str | None:
    return next((s for s in stacks if path.startswith(s + "/")), None)
