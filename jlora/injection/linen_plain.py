"""Linen modules that use weights in plain parameters: found by tracing, updated in use."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta

from jlora import adapter
from jlora.adapter import LORA_A, LORA_B, LORA_TOKENS
from jlora.errors import JloraError
from jlora.injection import plain
from jlora.injection.linen_layer import WATCHED, within
from jlora.injection.linen_tree import rows_of, stacked
from jlora.injection.params import flatten, is_trained, unflatten
from jlora.quant.array import QuantArray
from jlora.targets import Plan


def find(
    injection: Any,
    call: Callable[..., Any],
    variables: Mapping[str, Any],
    args: Sequence[Any],
    method: Any = None,
) -> None:
    """Add what the module's own code uses to what is known: parameters, and layers' weights.

    Adapters whose weight a call of the module itself does not use are warned of, once each.

    Args:
        injection: what the injected module knows of its adapters.
        call: (variables, *args) -> the module's result, with its weights as they are.
        variables: of the module.
        args: of the call.
        method: that of the call.

    Raises:
        JloraError: it uses the weight of a layer that has not been met.
    """
    flat = flatten(variables.get("params", {}))
    layers = {site.weight_path: site for site in injection.sites.values() if site.weight}
    shapes = {path: meta.unbox(leaf).shape for path, leaf in flat.items()}
    adapted = [
        path
        for path, site in layers.items()
        if path in flat and any(f"{site.path}/{name}" in flat for name in (LORA_A, LORA_TOKENS))
    ]
    unmet = {
        path
        for path, shape in shapes.items()
        if path not in layers and len(shape) > 1 and not is_trained(path)
        and f"{path.rpartition('/')[0]}/{LORA_A}" in flat
        and path.rpartition("/")[0] not in injection.sites
    }  # fmt: skip
    weights = {
        path: meta.unbox(flat[path])
        for path in {*adapted, *candidates(injection, shapes), *unmet}
        if not isinstance(meta.unbox(flat[path]), QuantArray)
    }
    if not weights:
        return
    with within(WATCHED, True):
        uses = plain.find_uses(_function(call, flat, weights), weights, variables, *args)
    if is_own_call(method):
        _tell(injection, [path for path in adapted if path in uses and not uses[path]])
    for path, found in uses.items():
        if (layer := layers.get(path)) is not None:
            if plain.direct(found):
                injection.direct.add(layer.path)
                peculiar = layer.peculiar or plain.tied(layer, found)
                injection.sites[layer.path] = dataclasses.replace(layer, peculiar=peculiar)
        elif path in unmet:
            if plain.direct(found):
                raise JloraError(
                    f"{path}: the module's own code uses this weight, whose layer has not been met "
                    "in this process: trace all of the module first, as "
                    "jax.eval_shape(module.init, key, inputs) does"
                )
        elif (site := plain.site(path, weights[path].shape, found)) is not None:
            injection.sites[path] = site


def _tell(injection: Any, unused: Sequence[str]) -> None:
    for path in unused:
        if path not in injection.said:
            injection.said.add(path)
            warnings.warn(
                f"{path}: the weight is not used by this call, in which its adapter does nothing "
                "and gets no gradient",
                stacklevel=2,
            )


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
    injection: Any,
    own: Callable[..., Any],
    variables: Mapping[str, Any],
    args: Sequence[Any],
    method: Any = None,
) -> Any:
    """The module's result, with the updates of weights that its own code uses."""
    flat = flatten(variables.get("params", {}))
    adapted = {
        path.removesuffix("_" + LORA_A): path
        for path in flat
        if path.endswith("_" + LORA_A) and path.removesuffix("_" + LORA_A) in flat
    }
    base = {path: leaf for path, leaf in flat.items() if path[:-1] + "a" not in adapted.values()}
    variables = {**variables, "params": unflatten(base)}
    form = form_of(method, args)
    if form not in injection.forms or not all(path in injection.sites for path in adapted):
        if not injection.sites:  # a tree that this process has not made: the layers are met first
            some = {
                p: meta.unbox(x) for p, x in flat.items() if isinstance(meta.unbox(x), jax.Array)
            }
            plain.find_uses(_function(own, flat, some), some, variables, *args)
        find(injection, own, variables, args, method)
        injection.forms.add(form)
    sites = [injection.sites[path] for path in adapted]
    layers = [stacked_site(injection, flat, path) for path in injection.direct]
    sites += [site for site in layers if site is not None]
    if not sites:
        return own(variables, *args)
    weights, updates = {}, {}
    for site in sites:
        update: plain.LowRank | None = None
        if site.leaf(LORA_A) in flat:
            a, b = (meta.unbox(flat[site.leaf(name)]) for name in (LORA_A, LORA_B))
            update = plain.update(site, a, b, injection.target(site).scaling)
        if site.weight and site.leaf(LORA_TOKENS) in flat:
            rows = meta.unbox(flat[site.leaf(LORA_TOKENS)])
            indices = rows_of(injection.config.trainable_token_indices, site.path)
            update = plain.with_rows(site, update, rows, indices)
        assert update is not None
        weights[site.weight_path] = meta.unbox(flat[site.weight_path])
        updates[site.weight_path] = update
    return plain.call(_function(own, flat, weights), weights, updates, variables, *args)


def form_of(method: Any, args: Sequence[Any]) -> Any:
    """Return what tells one form of call from another: which method, and which arguments."""
    name = "__call__" if is_own_call(method) else getattr(method, "__name__", method)
    return str(name), jax.tree.structure(tuple(args))


def is_own_call(method: Any) -> bool:
    """Tell whether a `method` as init and apply take it is the module's own call."""
    return method is None or getattr(method, "__name__", method) == "__call__"


def stacked_site(injection: Any, flat: Mapping[str, Any], path: str) -> adapter.Site | None:
    """Return the site of a layer as a tree has it; None where the tree has no such adapter."""
    site = injection.sites[path]
    held = any(site.leaf(name) in flat for name in (LORA_A, LORA_TOKENS))
    return stacked(site, meta.unbox(flat[site.weight_path]).shape) if held else None
