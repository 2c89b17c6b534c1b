"""Flax NNX: layers whose weight is quantised, which compute with it as their type says."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jlora.adapter import Site
from jlora.config import QuantConfig
from jlora.errors import JloraError
from jlora.injection import plain, registry
from jlora.injection.nnx_sites import REGISTRY, check_own_call, shared_weights, type_of
from jlora.injection.nnx_tree import modules
from jlora.injection.registry import Contraction, LayerType
from jlora.quant.array import QuantArray


class QuantLayer:
    """What the class of a layer with a quantised weight has beside the layer's own class."""

    __slots__ = ()
    quant_base: type[nnx.Module]


def quantize(model: nnx.Module, sites: Sequence[Site], config: QuantConfig) -> None:
    """Quantise the weights of some of a model's layers, one after the other, in place.

    Raises:
        JloraError: a weight that is quantised already, or is used elsewhere too, or is not finite,
            or whose layer computes in a way of its own: nothing is quantised then.
    """
    by_path = modules(model)
    shared = shared_weights(model)
    for site in sites:
        layer = by_path[site.path]
        if isinstance(getattr(layer, site.weight).get_value(), QuantArray):
            raise JloraError(f"{site.path} is quantised already")
        if uses := shared.get(site.path):
            raise JloraError(
                f"{site.path}: its weight is also used by {', '.join(uses)}, which could not "
                "compute with it quantised; leave it out (exclude_modules)"
            )
        _check(layer, site.path)
    for site in sites:
        registry.check_weight(site, getattr(by_path[site.path], site.weight).get_value(), config)
    for site in sites:
        weight = getattr(by_path[site.path], site.weight)
        q = registry.quantize(site, weight.get_value(), config)  # if it fails, all layers work on
        mark(by_path[site.path], site.path)
        weight.set_value(q)


def mark(layer: Any, path: str) -> None:
    """Have a layer compute with a quantised weight, which it is given afterwards; in place.

    Raises:
        JloraError: its type has none, or it computes in a way of its own.
    """
    _check(layer, path)
    if not isinstance(layer, QuantLayer):
        base: Any = type(layer)
        object.__setattr__(layer, "__class__", quant_class(base))


def _check(layer: Any, path: str) -> None:
    layer_type = type_of(layer)
    if not isinstance(layer_type, Contraction):
        layer_type.quantised(layer, None, None, (), {})  # type: ignore[arg-type]  # says why
    check_own_call(layer, path)
    if not layer_type.claimed:  # type: ignore[attr-defined]
        registry.check_options(layer, path, _USUAL)


# Options of Flax's layers that would change how they multiply, and what they are where they don't.
_USUAL = {
    "dot_general": jax.lax.dot_general,
    "einsum_op": jax.numpy.einsum,
    "promote_dtype": nnx.nn.dtypes.promote_dtype,
}


def dequantize(model: nnx.Module) -> None:
    """Make each quantised weight an array again, and give its layer its own class; in place."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, QuantLayer):
            weight = getattr(layer, type_of(layer).weight)
            if isinstance(q := weight.get_value(), QuantArray):
                weight.set_value(q.dequantize())
            object.__setattr__(layer, "__class__", type(layer).quant_base)


@functools.cache
def quant_class(base: Any) -> Any:
    """The class of layers of class `base` whose weight is quantised."""
    layer_type = registry.find(REGISTRY, base)
    assert isinstance(layer_type, Contraction)
    own = base.__call__

    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
        q = getattr(self, layer_type.weight).get_value()
        if not isinstance(q, QuantArray):
            raise JloraError(
                f"a quantised {base.__name__} was given an array {q.shape} for its weight; "
                "jlora.quantize makes the weights of a whole model"
            )
        if layer_type.claimed:
            return _own_code(self, own, q, args, kwargs)
        bound = inspect.signature(own).bind(self, *args, **kwargs)
        if bound.arguments.pop("out_sharding", None) is not None:
            raise JloraError(
                f"out_sharding of a quantised {base.__name__} is not supported: constrain its "
                "output instead"
            )
        _, *given = bound.args
        bias = getattr(self, layer_type.bias, None) if layer_type.bias else None
        value = None if bias is None else bias.get_value()
        return layer_type.quantised(self, q, value, tuple(given), bound.kwargs)

    body = {"quant_base": base, "__call__": call, "__reduce__": _reduce, "__module__": __name__}
    metaclass: Any = type(base)
    return metaclass(f"Quant{base.__name__}", (base, QuantLayer), body)


def _own_code(layer: Any, own: Callable[..., Any], q: QuantArray, args: Any, kwargs: Any) -> Any:
    """What a type of the user's own gives, of which more than the equation may matter."""
    name = type_of(layer).weight
    split: Any = nnx.split
    graphdef, _, parameters, others = split(layer, _at(name), nnx.Param, ...)

    def run(weight: jax.Array) -> Any:
        chosen = nnx.from_flat_state([((name,), weight)])
        copy = nnx.merge(graphdef, chosen, parameters, others, copy=True)
        return own(copy, *args, **kwargs), nnx.state(copy, nnx.Not(nnx.Param))

    y, others = registry.own_code(q, run)
    if jax.tree.leaves(others):  # random streams and the like
        nnx.update(layer, others)
    return y


def check_claim(
    layer: Any, layer_type: LayerType, own: Callable[..., Any], args: Any, kwargs: Any
) -> None:
    """Demand that a layer uses its weight as it was registered to.

    Args:
        layer: of a class that was made at run time.
        layer_type: what was registered.
        own: the call that the user wrote.
        args: of the call.
        kwargs: likewise.

    Raises:
        JloraError: it does not.
    """
    name = layer_type.weight
    split: Any = nnx.split
    graphdef, _, rest = split(layer, _at(name), ...)
    weight = registry.abstract(getattr(layer, name).get_value())
    own_type = type(layer).lora_base
    own_type = getattr(own_type, "quant_base", own_type)
    where = own_type.__name__
    site = layer_type.site(layer, where, weight.shape, *args, **kwargs)

    def call(weights: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = nnx.from_flat_state([((name,), weights[where])])
        return own(nnx.merge(graphdef, chosen, rest, copy=True), *args, **kwargs)

    plain.check_claim(own_type, site, call, weight, (rest, *args), kwargs)


def _at(name: str) -> Callable[..., bool]:
    return lambda keys, _: tuple(keys) == (name,)


def _reduce(self: Any) -> tuple:
    return _blank, (self.quant_base,), self.__getstate__()


def _blank(base: Any) -> Any:
    return object.__new__(quant_class(base))
