"""NNX models whose own code uses weights in plain parameters: found by tracing, updated in use."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
from flax import nnx

from jlora.adapter import LORA_A, LORA_B, Site
from jlora.errors import JloraError
from jlora.injection import plain
from jlora.injection.registry import own_methods
from jlora.paths import join

# Of the models one of whose methods runs, what they know of their adapters.
_INSIDE: ContextVar[tuple] = ContextVar("inside", default=())


def find_sites(
    model: nnx.Module, inputs: Sequence[Any] | Mapping[str, Any], known: set[str]
) -> list[Site]:
    """Sites of the parameters with two axes or more that the model's call uses in its own way.

    Args:
        model: is traced, and computes nothing.
        inputs: arguments of its `__call__`: a tuple, or a mapping for named ones.
        known: paths of layers, whose parameters are their own.
    """
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    weights = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for keys, leaf in flat
        if (path := join(keys)).rpartition("/")[0] not in known and len(leaf.shape) > 1
    }
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    call: Any = type(model).__call__
    function, rest = _functional(model, weights, call)
    uses = plain.find_uses(function, weights, rest, *args, **kwargs)
    sites = (plain.site(path, weights[path].shape, found) for path, found in uses.items())
    return [site for site in sites if site is not None]


def _functional(
    model: nnx.Module, names: Mapping[str, Any], method: Callable[..., Any]
) -> tuple[Callable[..., Any], Any]:
    """(weights, rest, *args, **kwargs) -> (result, what the call changed), and the rest."""
    split: Any = nnx.split
    graphdef, chosen, changing, rest = split(
        model, lambda keys, _: join(keys) in names, nnx.Not(nnx.Param), ...
    )
    order = [(keys, join(keys)) for keys, _ in nnx.to_flat_state(chosen)]

    def function(weights: Mapping[str, Any], given: Any, *args: Any, **kwargs: Any) -> Any:
        flat = nnx.from_flat_state([(keys, weights[path]) for keys, path in order])
        copy = nnx.merge(graphdef, flat, *given, copy=True)
        token = _INSIDE.set((*_INSIDE.get(), getattr(model, "lora_plain", None)))
        try:
            out = method(copy, *args, **kwargs)
        finally:
            _INSIDE.reset(token)
        return out, nnx.state(copy, nnx.Not(nnx.Param))

    return function, (changing, rest)


class PlainModel:
    """What the class of a model with adapted plain parameters has beside the model's own class."""

    __slots__ = ()
    plain_base: type[nnx.Module]


@functools.cache
def model_class(base: Any) -> Any:
    """A subclass of a model's class whose methods see updated weights."""
    own = own_methods(base, nnx.Module) - _NNX
    body: dict[str, Any] = {name: _updated(getattr(base, name)) for name in own}
    body |= {"plain_base": base, "__reduce__": _reduce, "__module__": __name__}
    kind: Any = type(base)
    return kind(f"Lora{base.__name__}", (base, PlainModel), body)


_NNX = {name for name in dir(nnx.Module) if name != "__call__"}


def _updated(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(self.lora_plain is running for running in _INSIDE.get()):
            return own(self, *args, **kwargs)
        stateful = (nnx.Variable, nnx.Module, nnx.Rngs)
        if any(isinstance(x, stateful) for x in (*args, *kwargs.values())):
            raise JloraError(
                f"{type(self).plain_base.__name__} has adapted plain parameters, and is run on "
                "copies: Rngs and modules among its arguments would not be changed"
            )
        leaves = {
            join(keys): leaf.get_value()
            for keys, leaf in nnx.to_flat_state(nnx.state(self, nnx.Param))
        }
        plainly: Sequence[tuple[Site, float]] = self.lora_plain
        weights = {site.path: leaves[site.path] for site, _ in plainly}
        updates = {
            site.path: plain.update(
                site, leaves[site.leaf(LORA_A)], leaves[site.leaf(LORA_B)], scaling
            )
            for site, scaling in plainly
        }
        function, rest = _functional(self, weights, own)
        out, changed = plain.call(function, weights, updates, rest, *args, **kwargs)
        if jax.tree.leaves(changed):
            nnx.update(self, changed)
        return out

    return method


def _reduce(self: Any) -> tuple:
    return _blank, (self.plain_base,), self.__getstate__()


def _blank(base: Any) -> nnx.Module:
    return object.__new__(model_class(base))
