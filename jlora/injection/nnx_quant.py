"""Flax NNX: layers whose weight is quantised, which compute with it as their type says."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from jlora.adapter import Site
from jlora.config import QuantConfig
from jlora.errors import JloraError
from jlora.injection import registry
from jlora.injection.nnx_sites import REGISTRY, type_of
from jlora.injection.nnx_tree import modules
from jlora.injection.registry import Contraction
from jlora.quant.array import QuantArray


class QuantLayer:
    """What the class of a layer with a quantised weight has beside the layer's own class."""

    __slots__ = ()
    quant_base: type[nnx.Module]


def quantize(model: nnx.Module, sites: Sequence[Site], config: QuantConfig) -> None:
    """Quantise the weights of some of a model's layers, one after the other, in place."""
    by_path = modules(model)
    for site in sites:
        layer = by_path[site.path]
        mark(layer, site.path)
        weight = getattr(layer, site.weight)
        if isinstance(weight.get_value(), QuantArray):
            raise JloraError(f"{site.path} is quantised already")
        weight.set_value(registry.quantize(site, weight.get_value(), config))


def mark(layer: Any, path: str) -> None:
    """Have a layer compute with a quantised weight, which it is given afterwards; in place.

    Raises:
        JloraError: its type has none, or it computes in a way of its own.
    """
    layer_type = type_of(layer)
    if not isinstance(layer_type, Contraction):
        layer_type.quantised(layer, None, None, (), {})  # type: ignore[arg-type]  # says why
    for name, usual in _USUAL.items():
        if getattr(layer, name, usual) not in (usual, None):
            raise JloraError(
                f"{path}: {name} of this {type(layer).__name__} is one of its own, with which a "
                "quantised weight is not multiplied; leave the layer out (exclude_modules)"
            )
    if not isinstance(layer, QuantLayer):
        base: Any = type(layer)
        object.__setattr__(layer, "__class__", quant_class(base))


# Options of Flax's layers that would change how they multiply, and what they are where they don't.
_USUAL = {
    "dot_general": jax.lax.dot_general,
    "dot_general_cls": None,
    "einsum_op": jax.numpy.einsum,
    "promote_dtype": nnx.nn.dtypes.promote_dtype,
    "preferred_element_type": None,
}


def unmark_arrays(model: nnx.Module) -> None:
    """Give layers whose weights are arrays, by now, their own class back."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, QuantLayer):
            weight = getattr(layer, type_of(layer).weight)
            if not isinstance(weight.get_value(), QuantArray):
                object.__setattr__(layer, "__class__", type(layer).quant_base)


@functools.cache
def quant_class(base: Any) -> Any:
    """The class of layers of class `base` whose weight is quantised."""
    layer_type = registry.find(REGISTRY, base)
    assert layer_type is not None
    own = base.__call__

    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
        q = getattr(self, layer_type.weight).get_value()
        if not isinstance(q, QuantArray):
            raise JloraError(
                f"a quantised {base.__name__} was given an array {q.shape} for its weight; "
                "jlora.quantize makes the weights of a whole model"
            )
        bound = inspect.signature(own).bind(self, *args, **kwargs)
        _, *given = bound.args
        bias = getattr(self, layer_type.bias, None) if layer_type.bias else None
        value = None if bias is None else bias.get_value()
        return layer_type.quantised(self, q, value, tuple(given), bound.kwargs)

    body = {"quant_base": base, "__call__": call, "__reduce__": _reduce, "__module__": __name__}
    metaclass: Any = type(base)
    return metaclass(f"Quant{base.__name__}", (base, QuantLayer), body)


def _reduce(self: Any) -> tuple:
    return _blank, (self.quant_base,), self.__getstate__()


def _blank(base: Any) -> Any:
    return object.__new__(quant_class(base))
