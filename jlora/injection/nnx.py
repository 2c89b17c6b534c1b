"""Flax NNX: put factors beside weights, take them out, merge them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jlora import adapter
from jlora.adapter import LORA_A, LORA_B, Site, Target
from jlora.config import LoraConfig
from jlora.errors import JloraError
from jlora.injection import nnx_quant
from jlora.injection.nnx_layer import LoraLayer, LoraScaling, lora_class, scaling_of, set_class
from jlora.injection.nnx_model import PlainModel, Uses, adopt, bare
from jlora.injection.nnx_sites import check_own_call, holders, plain_sites, type_of
from jlora.injection.nnx_tree import (
    KEPT,
    TrainedParam,
    drop,
    get,
    holder,
    modules,
    put,
    trained_wholly,
    variables,
)  # fmt: skip
from jlora.injection.registry import float32
from jlora.paths import join
from jlora.quant import checks
from jlora.quant.array import QuantArray


def attach(
    model: nnx.Module,
    targets: Sequence[Target],
    config: LoraConfig,
    rngs: Any,
    training: bool,
    whole: Iterable[str],
    tokens: Mapping[str, Sequence[int]],
    head: str | None = None,
) -> None:
    """Add factors to the targeted layers, in place; paths, sharing and isinstance stay.

    Args:
        model: holds the targets.
        targets: which layers.
        config: says how factors are initialised, and their dropout.
        rngs: nnx.Rngs, or a random key.
        training: whether dropout is on; `model.train()` and `model.eval()` change it.
        whole: paths of parameters that are trained as a whole.
        tokens: path of an embedding -> its rows that are trained.
        head: path of the output projection.

    Raises:
        JloraError: the model holds adapters already.
    """
    inside = (module for _, module in nnx.iter_modules(model))
    if any(isinstance(module, LoraLayer | PlainModel) for module in inside):
        raise JloraError(
            "the model holds adapters already: jlora.eject(model) takes them out, "
            "jlora.load_adapter replaces their values"
        )
    if rngs is None:
        raise JloraError("inject needs rngs=nnx.Rngs(...) or a key, to draw the factors of A")
    rngs = rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs)
    key = rngs.params()
    streams: Any = rngs.dropout if config.lora_dropout else None  # an error here changes nothing
    by_path = modules(model)
    for target in targets:
        if target.site.weight:
            check_own_call(by_path[target.site.path], target.site.path)
    _check_whole(model, whole)
    plainly = [target for target in targets if not target.site.weight]
    if plainly and config.lora_dropout:
        raise JloraError(
            "lora_dropout is not supported at weights in plain parameters, whose inputs are the "
            f"model's own: {', '.join(t.site.path for t in plainly[:5])}"
        )
    if bare := [t.site.path for t in plainly if t.site.path.rpartition("/")[2].isdecimal()]:
        raise JloraError(
            f"{', '.join(bare[:5])}: factors stand beside their weight as attributes of its "
            "module, and a list has none; keep each parameter in a module"
        )
    if differing := [t.site.path for t in plainly if t.layers]:
        raise JloraError(
            f"{', '.join(differing[:5])}: layers of a stack in a plain parameter are all adapted "
            "alike, and layers_to_transform and patterns cannot tell them apart"
        )
    for target in plainly:
        path, _, name = target.site.path.rpartition("/")
        factors = adapter.init_factors(key, target, config.init_lora_weights)
        held_by = holder(model, path)
        metadata = _sharding(get(held_by, name), target.site)
        for factor, value in factors.items():
            parameter = nnx.LoRAParam(value, **metadata[factor])
            put(held_by, f"{name}_{factor}", parameter)
    uses = Uses(config, head, tuple((t.site, t.scaling) for t in plainly))
    adopt(model, uses, [*(target.site.path for target in targets), *tokens])
    for target in targets:
        if not target.site.weight:
            continue
        module: Any = by_path[target.site.path]
        factors = adapter.init_factors(key, target, config.init_lora_weights)
        metadata = _sharding(getattr(module, target.site.weight), target.site)
        with _Added(module):
            module.lora_a = nnx.LoRAParam(factors[LORA_A], **metadata[LORA_A])
            module.lora_b = nnx.LoRAParam(factors[LORA_B], **metadata[LORA_B])
            if target.layers:
                module.lora_scaling = LoraScaling(jnp.asarray(target.scaling, jnp.float32))
                module.lora_layers = target.layers
            else:
                module.lora_scaling = target.scaling
            module.lora_dropout = config.lora_dropout
            if streams is not None:
                # One stream a stacked layer, so that a scan over layers slices it with the kernel.
                shape = target.site.shape[: target.site.stacked]
                module.lora_rngs = streams.split(shape) if shape else streams.fork()
                if not hasattr(module, "deterministic"):  # that of the layer itself is its own
                    module.deterministic = not training
    for path, rows in tokens.items():
        module = by_path[path]
        with _Added(module):
            size = getattr(module, type_of(module).weight).shape[-1]
            module.lora_tokens = nnx.LoRAParam(jnp.zeros((len(rows), size), jnp.float32))
            module.lora_token_indices = tuple(rows)
    for path in whole:
        parent, _, name = path.rpartition("/")
        held_by = holder(model, parent)
        kept = get(held_by, name)
        value = jnp.copy(kept.get_value()) if isinstance(kept.get_value(), jax.Array) else (
            kept.get_value()
        )  # fmt: skip
        put(held_by, KEPT + name, kept)
        put(held_by, name, TrainedParam(value, **_annotations(kept)))


def _check_whole(model: nnx.Module, whole: Iterable[str]) -> None:
    """Demand that parameters that are trained as a whole are arrays, held by one module alone.

    Raises:
        JloraError: some are not.
    """
    leaves = {join(keys): leaf.get_value() for keys, leaf in variables(model, nnx.Param)}
    checks.whole([path for path in whole if isinstance(leaves.get(path), QuantArray)])
    for places in holders(model).values():
        if len(places) > 1 and set(places) & set(whole):
            raise JloraError(
                f"{' and '.join(places)} are one parameter, which cannot be trained at one of them "
                "as a whole; leave it out of modules_to_save and bias"
            )


class _Added:
    """Swaps a layer's class on the way in, and notes what the block added to it."""

    def __init__(self, module: Any):
        self.module, self.before = module, set(vars(module))

    def __enter__(self) -> None:
        if not isinstance(self.module, LoraLayer):
            base: Any = type(self.module)
            set_class(self.module, lora_class(base))

    def __exit__(self, *error: Any) -> None:
        added = set(vars(self.module)) - self.before - {"lora_attributes"}
        earlier = getattr(self.module, "lora_attributes", ())
        self.module.lora_attributes = tuple(sorted({*added, *earlier}))


def _annotations(variable: Any) -> dict[str, Any]:
    """A variable's sharding annotations, to be noted and not applied yet."""
    metadata = {k: v for k, v in variable.get_metadata().items() if k in _AXES}
    return metadata | {"eager_sharding": False} if metadata else {}


_AXES = ("out_sharding", "sharding_names", "sharding")


def _sharding(weight: Any, site: Site) -> dict[str, dict[str, Any]]:
    """Annotations of the factors: A has those of the contracted axes, B those of the output's."""
    annotations = _annotations(weight)
    axes = {LORA_A: site.contracting, LORA_B: site.output}
    result: dict[str, dict[str, Any]] = {}
    for factor, own in axes.items():
        result[factor] = dict(annotations)
        for name in _AXES:
            if (spec := annotations.get(name)) is not None:
                spec = tuple(spec) + (None,) * (len(site.shape) - len(spec))
                picked = (*(spec[i] for i in site.batch), None, *(spec[i] for i in own))
                result[factor][name] = picked
    return result


def eject(model: nnx.Module) -> None:
    """Take all factors out, in place, and give every layer its own class back."""
    for _, module in adapted(model):
        for name in (*module.lora_attributes, "lora_attributes"):
            delattr(module, name)
        set_class(module, type(module).lora_base)
    for held_by, name in trained_wholly(model):
        put(held_by, name, get(held_by, KEPT + name))
        drop(held_by, KEPT + name)
    bare(model)


def adapted(model: nnx.Module) -> list[tuple[tuple, Any]]:
    """(path, module) of every layer that holds factors."""
    return [(p, m) for p, m in nnx.iter_modules(model) if isinstance(m, LoraLayer)]


def scalings(model: nnx.Module) -> dict[str, float | tuple[float, ...]]:
    """Path of each adapted layer -> the factor on its low-rank product."""
    return {
        join(path): scaling_of(module) for path, module in adapted(model) if hasattr(module, LORA_A)
    } | {site.path: scaling for site, scaling in plain_sites(model)}


def merge(model: nnx.Module) -> nnx.Module:
    """A new model with W + scaling * A B in place of W, and no adapters; `model` stays as it is."""
    merged = nnx.clone(model)
    for path, module in adapted(merged):
        layer_type = type_of(module)
        weight = getattr(module, layer_type.weight)
        value, dtype = float32(weight.get_value()), weight.get_value().dtype
        if hasattr(module, LORA_A):
            site = layer_type.site(module, join(path), value.shape)
            factors = module.lora_a.get_value(), module.lora_b.get_value()
            value = value + adapter.delta_weight(site, *factors, scaling_of(module))
        if hasattr(module, "lora_tokens"):
            value = value.at[jnp.asarray(module.lora_token_indices)].add(module.lora_tokens[...])
        weight.set_value(value.astype(dtype))
    leaves = {join(keys): leaf for keys, leaf in variables(merged, nnx.Param)}
    for site, scaling in plain_sites(merged):
        a, b = (leaves[site.leaf(name)].get_value() for name in (LORA_A, LORA_B))
        weight = leaves[site.path]
        value = weight.get_value().astype(jnp.float32) + adapter.delta_weight(site, a, b, scaling)
        weight.set_value(value.astype(weight.get_value().dtype))
    for held_by, name in trained_wholly(merged):
        get(held_by, KEPT + name).set_value(get(held_by, name).get_value())
    eject(merged)
    nnx_quant.dequantize(merged)
    return merged
