"""Flax Linen: how its layer types use their weights, and what an adapted layer's call gives."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.core.scope import subtract_filters
from flax.errors import ScopeParamShapeError

from jlora import adapter
from jlora.adapter import LORA_A, LORA_B, LORA_TOKENS, Site, Target
from jlora.config import LoraConfig
from jlora.errors import JloraError
from jlora.injection import plain, registry
from jlora.injection.linen_tree import rows_of
from jlora.injection.registry import Contraction, Convolution, LayerType, Lookup, general
from jlora.matching import Choice
from jlora.quant.array import QuantArray


def _tuple(value: int | Iterable[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _general(layer: nn.DenseGeneral, x: Any = None) -> str:
    axis, batch, features = (_tuple(v) for v in (layer.axis, layer.batch_dims, layer.features))
    return general(None if x is None else x.ndim, axis, batch, len(features))


def _einsum(layer: nn.Einsum, x: Any = None, einsum_str: str | None = None) -> str:
    return einsum_str or layer.einsum_str  # type: ignore[return-value]


def _convolve(layer: nn.Conv, x: jax.Array, kernel: jax.Array, features: int) -> jax.Array:
    # The layer's own code on other numbers, so that padding and strides are what it makes of them.
    other = layer.clone(parent=None, name=None, features=features, use_bias=False, mask=None)
    return other.apply({"params": {"kernel": kernel}}, x)  # type: ignore[return-value]


REGISTRY: dict[type, LayerType] = {
    nn.Dense: Contraction(),
    nn.DenseGeneral: Contraction(form=_general),
    nn.Einsum: Contraction(form=_einsum),
    nn.Embed: Lookup(),
    nn.Conv: Convolution(run=_convolve),
}


@dataclasses.dataclass(eq=False)
class Injection:
    """What an injected module knows of its adapters. Clones of the module share it."""

    config: LoraConfig
    head: str | None
    sites: dict[str, Site] = dataclasses.field(default_factory=dict)
    """Those met so far, by path; a trace meets all. Of a stack, one layer's."""

    biases: dict[str, str] = dataclasses.field(default_factory=dict)
    """Path of each of these that is a layer -> what its type calls its bias."""

    attended: set[str] = dataclasses.field(default_factory=set)
    """Paths of embeddings whose transpose is used by their own `attend`."""

    direct: set[str] = dataclasses.field(default_factory=set)
    """Paths of layers whose weight is used outside of them too: all its uses are adapted there."""

    forms: set[Any] = dataclasses.field(default_factory=set)
    """Forms of calls, in which such uses have been looked for."""

    said: set[str] = dataclasses.field(default_factory=set)
    """Paths of weights with adapters that a call did not use, which has been said."""

    peculiar: dict[str, str] = dataclasses.field(default_factory=dict)
    """Path of each layer that could not compute with a quantised weight -> why."""

    def note_options(self, layer: Any, path: str) -> None:
        """Note whether a layer of Flax's could compute with a quantised weight."""
        try:
            _check_options(layer, path)
        except JloraError as error:
            self.peculiar[path] = str(error)

    def __post_init__(self) -> None:
        self.choice = Choice(self.config, self.head)

    def target(self, site: Site) -> Target | None:
        """How the site is adapted, or None."""
        return self.choice.target(site)


def _check_options(layer: Any, path: str) -> None:
    registry.check_options(layer, path, {"promote_dtype": nn.dtypes.promote_dtype})


# Calls of layers that have not returned.
_CALLS: ContextVar[tuple] = ContextVar("calls", default=())


# Whether calls of layers mark the weight that they read: once, for `linen_plain.find`.
WATCHED: ContextVar[tuple] = ContextVar("watched", default=())


@contextmanager
def within(stack: ContextVar[tuple], entry: Any) -> Iterator[None]:
    """Have `entry` on a stack for the length of a block."""
    token = stack.set((*stack.get(), entry))
    try:
        yield
    finally:
        stack.reset(token)


def intercept(
    root: Any, following: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
) -> Any:
    """One call of one layer: its own output and the terms of its adapters."""
    layer = context.module
    layer_type = registry.find(REGISTRY, type(layer))
    following = _tells_of_quantised(layer, following)
    if layer_type is None or context.method_name not in layer_type.methods:
        return following(*args, **kwargs)
    # nn.remat(nn.Dense), nn.vmap(nn.Dense)... are layers around a layer: the inner one is adapted.
    call = {"path": layer.path, "adapted": False}
    outer = next((c for c in _CALLS.get() if c["path"] == layer.path), None)
    with within(_CALLS, call):
        y = _quantised(layer, layer_type, context.orig_method, args, kwargs)
        if y is None and _is_in(root, layer):
            y = _watched(layer, layer_type, context, args, kwargs)
        y = following(*args, **kwargs) if y is None else y
    if outer is not None:
        outer["adapted"] = True
    weight = layer.get_variable("params", layer_type.weight)
    if call["adapted"]:
        return y
    claimed = isinstance(layer_type, Contraction) and layer_type.claimed
    if weight is None:
        if claimed:
            raise JloraError(
                f"{'/'.join(layer.path)}: {type(layer).__name__} is registered with the weight "
                f"{layer_type.weight!r}, which it does not declare itself; its parameters are: "
                f"{', '.join(layer.variables.get('params', {})) or 'none'}"
            )
        return y
    if not args:
        bound = inspect.signature(context.orig_method).bind(**kwargs)
        args, kwargs = bound.args, bound.kwargs
    injection: Injection = root.lora
    if not _is_in(root, layer):
        return y
    path = "/".join(layer.path[len(root.path) :])
    shape = meta.unbox(weight).shape
    site = layer_type.site(layer, path, shape, *args, **kwargs)
    if claimed:
        _check_claim(layer, site, weight, args, kwargs)
    else:
        injection.note_options(layer, path)
    if path in injection.direct:
        site = dataclasses.replace(site, peculiar=injection.sites[path].peculiar)
    injection.sites[path] = site
    if layer_type.bias:
        injection.biases[path] = layer_type.bias
    if context.method_name == "attend":
        injection.attended.add(path)
    target = injection.target(site)
    if target is not None:
        box = weight if isinstance(weight, meta.AxisMetadata) else None
        factors = _factors(layer, target, injection.config, box)
        x, *rest = args
        drops = injection.config.lora_dropout and not root.lora_deterministic
        if path in injection.direct:
            if drops:
                raise JloraError(
                    f"{path}: the module's own code uses the weight of this layer outside of it, "
                    "and lora_dropout is not supported there; leave the layer out (exclude_modules)"
                )
            return y  # the term is that of all uses of the weight
        if drops and site.kind != "embedding":
            x = _dropout(injection.config.lora_dropout, layer, x)
        y = y + layer_type.delta(
            layer, context.method_name, (x, *rest), kwargs, factors, target.scaling, y.dtype
        )
    rows = injection.choice.config.trainable_token_indices
    if rows and site.kind == "embedding":
        indices = rows_of(rows, path)
        if indices and path in injection.direct:
            _param(layer, LORA_TOKENS, lambda key: jnp.zeros((len(indices), shape[-1])))
        elif indices:
            size = (len(indices), shape[-1])
            trained = _param(layer, LORA_TOKENS, lambda key: jnp.zeros(size, jnp.float32))
            y = y + registry.token_term(context.method_name, args[0], indices, trained, y)
    return y


def _is_in(root: Any, layer: Any) -> bool:
    """Tell whether a layer is in a module's tree: not if that runs it by `apply` of its own."""
    return layer.path[: len(root.path)] == root.path and layer.path != root.path


def _quantised(
    layer: Any, layer_type: LayerType, own: Callable[..., Any], args: Any, kwargs: Any
) -> jax.Array | None:
    """The layer's output if its weight is quantised and the call is its type's own.

    It is not that of a layer around another, or of a subclass, which will call its type's.

    Raises:
        JloraError: a layer of Flax's that multiplies in a way of its own.
    """
    q = layer.get_variable("params", layer_type.weight)
    known: Any = next(cls for cls in type(layer).__mro__ if REGISTRY.get(cls) is layer_type)
    if not isinstance(q, QuantArray) or own.func is not known.__call__.__wrapped__:  # type: ignore[attr-defined]
        return None
    q = meta.unbox(q)
    if isinstance(layer_type, Contraction) and layer_type.claimed:
        alone = layer.clone(parent=None, name=None)
        rngs = {name: layer.make_rng(name) for name in layer.scope.rngs}
        mutable = subtract_filters(layer.scope.mutable, "params") or ()

        def run(weight: jax.Array) -> Any:
            given = _with(layer.variables, layer_type.weight, weight)
            return alone.apply(given, *args, rngs=rngs, mutable=mutable, **kwargs)

        y, changed = registry.own_code(q, run)
        for collection, variables in changed.items():  # what it sows, its statistics...
            for name, value in variables.items():
                layer.scope.put_variable(collection, name, value)
        return y
    _check_options(layer, "/".join(layer.path))
    bound = inspect.signature(own).bind(*args, **kwargs)
    bias = layer.get_variable("params", layer_type.bias) if layer_type.bias else None
    return layer_type.quantised(layer, q, meta.unbox(bias), bound.args, bound.kwargs)


def _watched(
    layer: Any, layer_type: LayerType, context: Any, args: Any, kwargs: Any
) -> jax.Array | None:
    """The layer's output, with a mark on the weight that it reads, where such uses are looked for.

    It is not that of a layer around another, or of a subclass, which will call its type's.
    """
    weight = layer.get_variable("params", layer_type.weight)
    known: Any = next(cls for cls in type(layer).__mro__ if REGISTRY.get(cls) is layer_type)
    own = getattr(known, context.method_name)
    if not WATCHED.get() or weight is None or context.orig_method.func is not own.__wrapped__:
        return None
    if isinstance(meta.unbox(weight), QuantArray):
        return None
    marked = meta.replace_boxed(weight, plain.in_own_call(meta.unbox(weight)))
    alone = layer.clone(parent=None, name=None)
    rngs = {name: layer.make_rng(name) for name in layer.scope.rngs}
    given = _with(layer.variables, layer_type.weight, marked)
    token = WATCHED.set(())
    try:
        y, _ = alone.apply(
            given, *args, rngs=rngs, mutable=True, method=context.method_name, **kwargs
        )
    finally:
        WATCHED.reset(token)
    return y


def _tells_of_quantised(layer: Any, following: Callable[..., Any]) -> Callable[..., Any]:
    """`following`, with an error that names the layer if its own code was given such a weight."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return following(*args, **kwargs)
        except (JloraError, TypeError, ScopeParamShapeError) as error:
            own = layer.variables.get("params", {}) if layer.scope is not None else {}
            names = [name for name, leaf in own.items() if isinstance(leaf, QuantArray)]
            if not names or isinstance(error, _OwnCodeError):
                raise
            raise _OwnCodeError(
                f"{'/'.join((*layer.path, names[0]))} is quantised, and the code of "
                f"{type(layer).__name__} could not compute with it: {error}\nLeave the layer out "
                "of what is quantised (QuantConfig.exclude_modules), or say how it uses its weight "
                "with jlora.register"
            ) from error

    return call


class _OwnCodeError(JloraError):
    """Of the innermost module that holds the weight."""


def _check_claim(layer: Any, site: Site, weight: Any, args: Any, kwargs: Any) -> None:
    """Demand that a layer uses its weight as it was registered to.

    Raises:
        JloraError: it does not.
    """
    alone = layer.clone(parent=None, name=None)
    rngs = {name: jax.random.key(0) for name in layer.scope.rngs}
    bare = registry.abstract(weight)

    def call(weights: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
        value = weights[site.path]
        value = meta.replace_boxed(weight, value) if bare is weight else value
        given = _with(variables, site.weight, value)
        return alone.apply(given, *args, rngs=rngs, mutable=True, **kwargs)[0]

    given = layer.variables, *args
    token = WATCHED.set(())
    try:
        plain.check_claim(type(layer), site, call, meta.unbox(bare), given, kwargs)
    finally:
        WATCHED.reset(token)


def _with(variables: Any, name: str, weight: Any) -> dict[str, Any]:
    return {**variables, "params": {**variables["params"], name: weight}}


def _factors(layer: Any, target: Target, config: LoraConfig, box: Any) -> tuple[Any, ...]:
    """The layer's own factors; `init` makes them."""
    site = target.site

    def first(name: str) -> Callable[..., Any]:
        def init(key: jax.Array) -> Any:
            value = adapter.init_factors(key, target, config.init_lora_weights)[name]
            if box is None or not hasattr(box, "names"):
                return value
            own = site.contracting if name == LORA_A else site.output
            # Flax lets a box name fewer axes than there are: the last ones have no name.
            names = (*box.names, *[None] * len(site.shape))
            picked = (*(names[i] for i in site.batch), None, *(names[i] for i in own))
            return dataclasses.replace(box, value=value, names=picked)

        return init

    return tuple(_param(layer, name, first(name)) for name in (LORA_A, LORA_B))


def _param(layer: Any, name: str, init: Callable[..., Any]) -> jax.Array:
    """A layer's `param` that may be asked for twice, and outside of compact methods (Embed's)."""
    if not layer.scope.has_variable("params", name):
        if not layer.scope.is_mutable_collection("params"):
            raise JloraError(
                f"{'/'.join(layer.path)} has no {name}: init of the injected module makes factors, "
                "and jlora.combine(adapters, params) puts them into other parameters"
            )
        return layer.scope.param(name, init)
    value = meta.unbox(layer.scope.get_variable("params", name))
    wanted = meta.unbox(jax.eval_shape(init, jax.random.key(0))).shape
    if value.shape != wanted:
        raise JloraError(
            f"{'/'.join(layer.path)}/{name} is {value.shape}, where the configuration that the "
            f"module was injected with has {wanted}"
        )
    return value


def _dropout(rate: float, layer: Any, x: jax.Array) -> jax.Array:
    if not layer.has_rng("dropout"):
        if layer.is_initializing():
            return x
        raise JloraError(
            f"lora_dropout is {rate}: apply needs rngs={{'dropout': key}}; to evaluate, "
            "module.clone(lora_deterministic=True)"
        )
    return adapter.dropout(x, rate, layer.make_rng("dropout"))
