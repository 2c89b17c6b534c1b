"""Flax NNX: which weights of a model can be adapted, and what a plan needs to know of it."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import jax
from flax import nnx

from jlora.adapter import Site
from jlora.errors import JloraError
from jlora.injection import nnx_plain, plain, registry
from jlora.injection.nnx_tree import KEPT, TrainedParam, variables
from jlora.injection.registry import Contraction, Convolution, LayerType, Lookup, general
from jlora.paths import join


def _general(layer: nnx.LinearGeneral, x: Any = None, **kwargs: Any) -> str:
    ndim = None if x is None else x.ndim
    return general(ndim, layer.axis, layer.batch_axis, len(layer.out_features))


def _einsum(layer: nnx.Einsum, x: Any = None, einsum_str: str | None = None, **kw: Any) -> str:
    equation = einsum_str or layer.einsum_str
    if equation is None:
        raise JloraError(
            "an nnx.Einsum whose equation is given with each call cannot be planned: give "
            "einsum_str to its constructor"
        )
    return equation


def _convolve(layer: nnx.Conv, x: jax.Array, kernel: jax.Array, features: int) -> jax.Array:
    # The layer's own code on other numbers, so that padding and strides are what it makes of them.
    other: dict[str, Any] = {
        "kernel": nnx.Param(kernel),
        "bias": None,
        "mask": None,
        "use_bias": False,
    }
    other |= {"out_features": features, "kernel_shape": kernel.shape}
    convolution: Any = nnx.Conv.__call__
    return convolution(SimpleNamespace(**(vars(layer) | other)), x)


REGISTRY: dict[type, LayerType] = {
    nnx.Linear: Contraction(),
    nnx.LinearGeneral: Contraction(form=_general),
    nnx.Einsum: Contraction(form=_einsum),
    nnx.Embed: Lookup(),
    nnx.Conv: Convolution(run=_convolve),
}


def find_sites(model: nnx.Module, inputs: Any = None) -> list[Site]:
    """Every weight of `model` that can be adapted, in the order of the model's attributes.

    With `inputs` of its call, also those in plain parameters.

    Axes of a weight beyond those of its layer type stack layers. A module names the attributes of
    its own that hold such stacks in `stacked_layers`, so that the names of layers on disk are those
    of the unrolled model: with ("layers",), "layers/mlp" holds "layers/0/mlp" and so on. Where no
    module does, the layer itself is the stack: "layers/mlp/0".
    """
    declared = {
        (*path, name)
        for path, module in nnx.iter_modules(model)
        for name in getattr(type(module), "stacked_layers", ())
    }
    sites = []
    for path, module, layer_type in layers(model):
        weight = getattr(module, layer_type.weight, None)
        if weight is None:
            raise JloraError(
                f"{join(path)}: {type(module).__name__} is registered with the weight "
                f"{layer_type.weight!r}, which it does not have; it has: "
                f"{', '.join(n for n, v in vars(module).items() if isinstance(v, nnx.Variable))}"
            )
        shape = weight.shape
        site = layer_type.site(module, join(path), shape)
        if site.stacked:
            stack = _stack(path, shape[: site.stacked], declared)
            site = dataclasses.replace(site, stack=stack)
        sites.append(site)
    if hasattr(model, "lora_uses"):
        reasons = model.lora_uses.peculiar
        sites = [
            dataclasses.replace(site, peculiar=site.peculiar or reasons.get(site.path, ""))
            for site in sites
        ]
        sites += [site for site, _ in plain_sites(model)]
    elif inputs is not None:
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
        uses = nnx_plain.find_uses(model, type(model).__call__, args, kwargs, watch)
        shapes = {join(keys): leaf.shape for keys, leaf in variables(model, nnx.Param)}
        sites += nnx_plain.sites(uses, shapes, {site.path for site in sites})
    return sites


def site_of(layer: Any, path: str) -> Site:
    """Return the site of a layer."""
    layer_type = type_of(layer)
    return layer_type.site(layer, path, getattr(layer, layer_type.weight).shape)


def watch(model: nnx.Module) -> None:
    """Have each layer of a model mark the weight that its own call reads, for tracing; in place."""
    for _, layer, _ in list(layers(model)):
        base: Any = type(layer)
        object.__setattr__(layer, "__class__", _watched(base))


@functools.cache
def _watched(base: Any) -> Any:
    layer_type = registry.find(REGISTRY, base)
    assert layer_type is not None

    def watching(own: Any) -> Any:
        @functools.wraps(own)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            twin = object.__new__(base)  # a layer must not be changed within a trace of the model's
            vars(twin).update(vars(self))
            weight = getattr(self, layer_type.weight)
            if isinstance(value := weight.get_value(), jax.Array):
                vars(twin)[layer_type.weight] = weight.replace(plain.in_own_call(value))
            return own(twin, *args, **kwargs)

        return call

    body = {name: watching(getattr(base, name)) for name in layer_type.methods}
    kind: Any = type(base)
    return kind(base.__name__, (base,), body | {"__module__": base.__module__})


def plain_sites(model: Any) -> tuple[tuple[Site, float], ...]:
    """(site, scaling) of each adapted plain parameter."""
    uses = getattr(model, "lora_uses", None)
    return () if uses is None else uses.plain


def shared_weights(model: nnx.Module) -> dict[str, list[str]]:
    """Path of a layer whose weight is used elsewhere too -> where: modules that hold the same
    variable, and what the model's `tied_weights` says (path of a layer -> its other use).
    """
    tied = {path: [use] for path, use in getattr(model, "tied_weights", {}).items()}
    held = holders(model)
    for path, module, layer_type in layers(model):
        uses = held.get(id(getattr(module, layer_type.weight)), [])
        if len(uses) > 1:
            tied.setdefault(join(path), []).extend(uses)
    return tied


def holders(model: nnx.Module) -> dict[int, list[str]]:
    """Id of each parameter -> the paths at which modules hold it."""
    found: dict[int, list[str]] = {}
    for path, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, nnx.Param):
                found.setdefault(id(value), []).append(join((*path, name)))
    return found


def output_head(model: nnx.Module) -> str | None:
    """Path of the output projection where the model says it: its `output_head`."""
    named = getattr(model, "output_head", None)
    return named if isinstance(named, str) else None


def modules(model: nnx.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """Path of each module that holds parameters itself -> their names and shapes."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, variable in variables(model, nnx.Param):
        *parents, name = map(str, path)
        if isinstance(variable, TrainedParam) or not (
            isinstance(variable, nnx.LoRAParam) or name.startswith(KEPT)
        ):
            found.setdefault("/".join(parents), {})[name] = variable.shape
    return found


def biases(model: nnx.Module) -> dict[str, str]:
    """Path of each layer that can be adapted -> the name of its bias, where it has one."""
    return {
        join(path): layer_type.bias
        for path, module, layer_type in layers(model)
        if layer_type.bias and getattr(module, layer_type.bias, None) is not None
    }


def layers(model: nnx.Module) -> Iterator[tuple[tuple, nnx.Module, LayerType]]:
    """(path, module, type) of each layer that can be adapted."""
    for path, module in nnx.iter_modules(model):
        if (layer_type := registry.find(REGISTRY, type(module))) is not None:
            yield path, module, layer_type


def type_of(module: nnx.Module) -> LayerType:
    """What is registered of a layer's type."""
    layer_type = registry.find(REGISTRY, type(module))
    assert layer_type is not None, type(module)
    return layer_type


def check_own_call(module: Any, path: str) -> None:
    """Demand that a layer's output is what its registered type computes.

    Raises:
        JloraError: its class has a call of its own, of which only the type's is known.
    """
    layer_type = type_of(module)
    known: Any = next(cls for cls in type(module).__mro__ if REGISTRY.get(cls) is layer_type)
    own: Any = getattr(type(module), "quant_base", type(module))
    for method in layer_type.methods:
        if getattr(own, method) is not getattr(known, method):
            raise JloraError(
                f"{path}: {type(module).__name__} overrides {method} of {known.__name__}; say how "
                "it uses its weight with jlora.register, or exclude it"
            )


def _stack(path: tuple, sizes: tuple[int, ...], declared: set[tuple]) -> str:
    """The module above or at `path` whose layers are stacked."""
    name = join(path)
    if len(sizes) > 1:
        raise JloraError(f"{name} has {len(sizes)} stacked axes {sizes}; one is supported")
    prefixes = (path[:depth] for depth in range(1, len(path)))
    return next((join(p) for p in prefixes if p in declared), name)
