"""Linen modules that use weights in plain parameters: found by tracing, updated in use."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta

from jlora import adapter
from jlora.adapter import LORA_A, LORA_B
from jlora.errors import JloraError
from jlora.injection import plain
from jlora.injection.params import flatten, is_trained, unflatten
from jlora.targets import Plan


def find(
    injection: Any, call: Callable[..., Any], variables: Mapping[str, Any], args: Sequence[Any]
) -> None:
    """Add the sites of parameters that the module's call uses in its own way to those known.

    Args:
        injection: what the injected module knows of its adapters.
        call: (variables, *args) -> the module's result, with its weights as they are.
        variables: of the module.
        args: of the call.

    Raises:
        JloraError: an embedding is to be adapted that is used in more ways than its layer sees.
    """
    flat = flatten(variables.get("params", {}))
    layers = {site.weight_path: site for site in injection.sites.values() if site.weight}
    shapes = {path: meta.unbox(leaf).shape for path, leaf in flat.items()}
    embeddings = [
        path
        for path, site in layers.items()
        if site.kind == "embedding" and path in flat and injection.choice.takes(site, site.path)
    ]
    weights = {
        path: meta.unbox(flat[path]) for path in [*embeddings, *candidates(injection, shapes)]
    }
    if not weights:
        return
    uses = plain.find_uses(_function(call, flat, weights), weights, variables, *args)
    for path, found in uses.items():
        if (layer := layers.get(path)) is not None:
            ways = [use for use in found if use != "gather"]
            if ways and layer.path not in injection.attended:
                raise JloraError(
                    f"{layer.path}: its weight is also used outside of the layer ({ways[0]}), as a "
                    "tied output head does, where an adapter would change nothing; leave it out "
                    "(exclude_modules)"
                )
        elif (site := plain.site(path, weights[path].shape, found)) is not None:
            injection.sites[path] = site


def candidates(injection: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Paths of targeted parameters with two axes or more that no layer's are."""
    return [
        path
        for path, shape in shapes.items()
        if len(shape) > 1
        and not is_trained(path)
        and path.rpartition("/")[0] not in injection.sites
        and injection.choice.takes(adapter.Site(path, shape, (0,), (1,), weight=""), path)
    ]


def _function(call: Callable[..., Any], flat: Mapping[str, Any], names: Any) -> Callable[..., Any]:
    """(weights, variables, *args) -> the call's result with those weights put in."""
    boxes = {path: flat[path] for path in names if isinstance(flat[path], meta.AxisMetadata)}

    def function(weights: Mapping[str, Any], variables: Any, *args: Any) -> Any:
        inner = flatten(variables["params"])
        inner |= {
            path: boxes[path].replace_boxed(x) if path in boxes else x
            for path, x in weights.items()
        }
        return call({**variables, "params": unflatten(inner)}, *args)

    return function


def factors(injection: Any, checked: Plan, rngs: Any, params: Any) -> dict[str, Any]:
    """Fresh factors of the targeted sites in plain parameters, by path."""
    key = rngs["params"] if isinstance(rngs, Mapping) else rngs
    if isinstance(key, int):
        key = jax.random.key(key)
    made: dict[str, Any] = {}
    for target in checked.targets:
        site = target.site
        if site.weight:
            continue
        if injection.config.lora_dropout:
            raise JloraError(
                "lora_dropout is not supported at weights in plain parameters, whose inputs are "
                f"the module's own: {site.path}"
            )
        fresh = adapter.init_factors(key, target, injection.config.init_lora_weights)
        made |= {site.leaf(name): value for name, value in fresh.items()}
    return made


def call(
    injection: Any, own: Callable[..., Any], variables: Mapping[str, Any], args: Sequence[Any]
) -> Any:
    """The module's result, with the updates that `variables` has of plain parameters."""
    flat = flatten(variables.get("params", {}))
    adapted = {
        path.removesuffix("_" + LORA_A): path
        for path in flat
        if path.endswith("_" + LORA_A) and path.removesuffix("_" + LORA_A) in flat
    }
    if not adapted:
        return own(variables, *args)
    base = {path: leaf for path, leaf in flat.items() if path[:-1] + "a" not in adapted.values()}
    variables = {**variables, "params": unflatten(base)}
    if not all(path in injection.sites for path in adapted):
        find(injection, own, variables, args)
    weights = {path: meta.unbox(flat[path]) for path in adapted}
    updates = {}
    for path in adapted:
        site = injection.sites[path]
        target = injection.target(site)
        a, b = (meta.unbox(flat[site.leaf(name)]) for name in (LORA_A, LORA_B))
        updates[path] = plain.update(site, a, b, target.scaling)
    return plain.call(_function(own, flat, weights), weights, updates, variables, *args)
