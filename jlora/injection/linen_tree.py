"""Trees of parameters of injected Linen modules: what is planned, added to whole leaves, merged."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict, meta

from jlora import adapter
from jlora.adapter import LORA_A, LORA_ADDED, LORA_B, LORA_TOKENS, Site
from jlora.config import LoraConfig, QuantConfig
from jlora.errors import JloraError
from jlora.injection import registry
from jlora.injection.params import flatten, is_trained, unflatten
from jlora.quant.array import QuantArray
from jlora.targets import Plan, plan, to_quantise


def rows_of(rows: Any, path: str) -> tuple[int, ...]:
    """Of `LoraConfig.trainable_token_indices`, those of the embedding at `path`."""
    if not isinstance(rows, Mapping):
        return tuple(rows)
    dotted = path.replace("/", ".")
    return next((tuple(v) for k, v in rows.items() if f".{dotted}".endswith("." + k)), ())


def planned(model: Any, params: Any, config: LoraConfig | None = None) -> Plan:
    """The plan of an injected module whose layers have been traced.

    Args:
        model: the injected module.
        params: its tree of parameters, with or without factors.
        config: another than the module was injected with.
    """
    injection = model.lora
    flat = flatten(params)
    sites = sites_of(model, flat)
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    biases: dict[str, str] = {}
    for path, leaf in flat.items():
        parent, _, name = path.rpartition("/")
        if not is_trained(path):
            modules.setdefault(parent, {})[name] = meta.unbox(leaf).shape
            if name == injection.biases.get(parent):
                biases[parent] = name
    checked = plan(
        config or injection.config, sites, injection.head, modules=modules, biases=biases
    )
    if differing := [target.site.path for target in checked.targets if target.layers]:
        raise JloraError(
            f"nn.scan stacks the layers of {', '.join(differing[:5])}: they are all adapted alike, "
            "and layers_to_transform and patterns cannot tell them apart"
        )
    return checked


def sites_of(model: Any, flat: Mapping[str, Any]) -> list[Site]:
    """The sites of a module that has been traced, with the stacks that its flat tree shows."""
    return [
        stacked(site, meta.unbox(flat[site.weight_path]).shape)
        for site in model.lora.sites.values()
        if site.weight_path in flat  # else it is of a clone of the module with other fields
    ]


def quantize(model: Any, params: Any, config: QuantConfig) -> Any:
    """The tree of an injected module that has been traced, with quantised weights.

    Boxes (nn.Partitioned) of a weight are put around each array of its quantised form.

    Raises:
        JloraError: what is chosen is no linear layer, multiplies in a way of its own, is trained as
            a whole, or is quantised already.
    """
    _demand_tree(params, "quantize(module, config, params=")
    demand_traced(model)
    flat = flatten(params)
    whole = planned(model, params).whole
    for site in to_quantise(config, sites_of(model, flat), model.lora.head):
        if reason := model.lora.peculiar.get(site.path):
            raise JloraError(reason)
        if site.weight_path in whole:
            raise JloraError(
                f"{site.weight_path} is trained as a whole, which what is quantised cannot be; "
                "leave it out of modules_to_save, or of what is quantised (exclude_modules)"
            )
        box = flat[site.weight_path]
        if isinstance(meta.unbox(box), QuantArray):
            raise JloraError(f"{site.path} is quantised already")
        q = registry.quantize(site, meta.unbox(box), config)
        flat[site.weight_path] = _boxed(q, box) if isinstance(box, meta.AxisMetadata) else q
    tree = unflatten(flat)
    return FrozenDict(tree) if isinstance(params, FrozenDict) else tree


def _demand_tree(params: Any, call: str) -> None:
    if not isinstance(params, Mapping) or isinstance(params.get("params"), Mapping):
        name = call.partition("(")[0]
        raise JloraError(f'{name} needs the tree of parameters: {call}variables["params"])')


def _boxed(q: QuantArray, box: Any) -> QuantArray:
    """Each child in a box like that of the weight, with the names of the axes that it has."""
    if not hasattr(box, "names"):
        return jax.tree.map(box.replace_boxed, q)
    specs = q.specs(box.names)
    return jax.tree.map(
        lambda x, names: dataclasses.replace(box, value=x, names=tuple(names)), q, specs
    )


def _box(q: QuantArray) -> Any:
    """The box that the weight was in, around its codes, or these alone: `_boxed` undone."""
    box = q.codes
    if not hasattr(box, "names"):
        return box
    known = list(box.names) + [None] * (box.value.ndim - len(box.names))
    *leading, ins, outs = known
    stacked = len(leading) - len(q.batch)
    own = dict(zip(q.batch, leading[stacked:], strict=True))
    own |= {q.contracting[0]: ins, q.output[0]: outs}
    ndim = len(q.batch) + len(q.contracting) + len(q.output)
    names = (*leading[:stacked], *(own.get(axis) for axis in range(-ndim, 0)))
    return dataclasses.replace(box, names=names)


def demand_traced(model: Any) -> None:
    """Demand that the layers of an injected module are known.

    Raises:
        JloraError: it has not been traced.
    """
    if not model.lora.sites:
        raise JloraError(
            f"the layers of {type(model).lora_base.__name__} are not known, since it has not been "
            "traced in this process: jax.eval_shape(module.init, key, inputs) does that"
        )


def stacked(site: Site, shape: tuple[int, ...]) -> Site:
    """One layer's site, with the leading axes that nn.scan and nn.vmap have given its weight."""
    extra = len(shape) - len(site.shape)
    if shape[extra:] != site.shape:
        raise JloraError(
            f"{site.path}: layers are stacked on another axis than the first (one layer's weight "
            f"is {site.shape}, the stack's {shape}); let variable_axes say {{'params': 0}}"
        )
    return dataclasses.replace(
        site,
        shape=shape,
        contracting=tuple(i + extra for i in site.contracting),
        output=tuple(i + extra for i in site.output),
        batch=(*range(extra), *(i + extra for i in site.batch)),
        stacked=extra,
        stack=site.path if extra else None,
    )


def added(checked: Plan, params: Any) -> dict[str, Any]:
    """Fresh leaves for parameters that are trained as a whole: zeros, float32, boxed alike."""
    flat = flatten(params)
    fresh = {}
    for path in checked.whole:
        parent, _, name = path.rpartition("/")
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), flat[path])
        fresh[f"{parent}/{LORA_ADDED}{name}".lstrip("/")] = zeros
    return fresh


def effective(params: Any) -> Any:
    """The parameters with what is added to whole leaves added, and those leaves gone."""
    flat = flatten(params)
    added = {p: v for p, v in flat.items() if p.rpartition("/")[2].startswith(LORA_ADDED)}
    if not added:
        return params
    for path, more in added.items():
        del flat[path]
        parent, _, name = path.rpartition("/")
        whole = f"{parent}/{name.removeprefix(LORA_ADDED)}".lstrip("/")
        flat[whole] = jax.tree.map(_plus, flat[whole], more)
    return unflatten(flat)


def _plus(weight: jax.Array, update: jax.Array) -> jax.Array:
    return (weight.astype(jnp.float32) + update).astype(weight.dtype)


def merge(model: Any, params: Any) -> Any:
    """The base's tree with W + scaling * A B in place of W; `params` stays as it is.

    Each weight is rounded once. Those that were quantised are in the boxes that they had.
    """
    _demand_tree(params, "merge(module, ")
    demand_traced(model)
    flat = flatten(effective(params))
    checked = planned(model, params)
    targets = checked.targets
    known = {target.site.leaf(name) for target in targets for name in target.shapes}
    if unknown := [p for p in flat if p.endswith(LORA_A) and p not in known]:
        raise JloraError(
            f"the layers of {', '.join(unknown[:5])} have not been met in this process: trace all "
            "of the module, as jax.eval_shape(module.init, key, inputs) does"
        )
    by_weight = {target.site.weight_path: target for target in targets}
    modules = (p.rpartition("/")[0] for p in flat if p.rpartition("/")[2] == LORA_TOKENS)
    embeddings = {f"{parent}/{model.lora.sites[parent].weight}": parent for parent in modules}
    merged = {}
    for path, leaf in flat.items():
        if is_trained(path):
            continue
        merged[path] = leaf
        quantised = isinstance(leaf, QuantArray)
        if not (quantised or path in by_weight or path in embeddings):
            continue
        weight = meta.unbox(leaf)
        value = registry.float32(weight)
        if target := by_weight.get(path):
            a, b = (meta.unbox(flat[target.site.leaf(name)]) for name in (LORA_A, LORA_B))
            value = value + adapter.delta_weight(target.site, a, b, target.scaling)
        if path in embeddings:
            parent = embeddings[path]
            indices = jnp.asarray(rows_of(model.lora.config.trainable_token_indices, parent))
            value = value.at[..., indices, :].add(meta.unbox(flat[f"{parent}/{LORA_TOKENS}"]))
        box = _box(leaf) if quantised else leaf
        merged[path] = meta.replace_boxed(box, value.astype(weight.dtype))
    tree = unflatten(merged)
    return FrozenDict(tree) if isinstance(params, FrozenDict) else tree
