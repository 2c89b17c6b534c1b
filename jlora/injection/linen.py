"""Flax Linen: a module whose layers get factors beside their weights, and trees of parameters.

An injected module is of a subclass of its own class, made at run time, that runs each method under
an interceptor of layer calls. The interceptor makes the factors with the layer's own `param`, so
that they land beside its weight and nn.scan and nn.remat lift them with the rest. What is trained
as a whole (biases, saved modules) is a leaf that is added to the base's own, so that weights which
are loaded after `init` count.
"""

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import DenyList, FrozenDict, meta
from flax.core.scope import in_filter

from jlora import adapter
from jlora.adapter import LORA_A, LORA_B, LORA_TOKENS, Site, Target
from jlora.config import LoraConfig
from jlora.errors import JloraError
from jlora.injection import linen_plain, registry
from jlora.injection.linen_tree import added, effective, planned, rows_of
from jlora.injection.params import flatten, is_trained, unflatten
from jlora.injection.registry import Contraction, Convolution, LayerType, Lookup, general
from jlora.targets import Choice


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


_log = logging.getLogger("jlora")


@dataclasses.dataclass(eq=False)
class Injection:
    """What an injected module knows of its adapters. Clones of the module share it."""

    config: LoraConfig
    head: str | None
    sites: dict[str, Site] = dataclasses.field(default_factory=dict)
    """Those met so far, by path; a trace meets all. Of a stack, one layer's."""

    attended: set[str] = dataclasses.field(default_factory=set)
    """Paths of embeddings whose transpose is used by their own `attend`."""

    def __post_init__(self) -> None:
        self.choice = Choice(self.config, self.head)

    def target(self, site: Site) -> Target | None:
        """How the site is adapted, or None."""
        return self.choice.target(site)


def inject(model: nn.Module, config: LoraConfig, training: bool) -> nn.Module:
    """An injected module that computes what `model` does, until its factors are trained."""
    if isinstance(model, LoraModule):
        raise JloraError("the module holds adapters already: jlora.eject(module) takes them out")
    if registry.find(REGISTRY, type(model)):
        raise JloraError(
            f"the model is itself a {type(model).__name__} layer: put it in a module, since "
            "adapters are named by the path of their layer"
        )
    injection = Injection(config, _head(model))
    fields = _fields(model)
    base: Any = type(model)
    return _class(base)(**fields, lora=injection, lora_deterministic=not training)


def _head(model: nn.Module) -> str:
    named = getattr(model, "output_head", None)
    return named if isinstance(named, str) else "lm_head"


def eject(model: nn.Module) -> nn.Module:
    """The module that was injected."""
    if not isinstance(model, LoraModule):
        return model
    return type(model).lora_base(**_fields(model))


def _fields(model: nn.Module) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(model) if f.init and f.name not in _OWN_FIELDS]
    return {name: getattr(model, name) for name in names}


_OWN_FIELDS = ("lora", "lora_deterministic")


class LoraModule:
    """What the class of an injected module has beside the module's own class."""

    lora_base: type[nn.Module]
    lora: Injection
    lora_deterministic: bool
    """Whether the adapters' dropout is off."""


@functools.cache
def _class(base: Any) -> Any:
    own = {
        name
        for cls in base.__mro__
        if issubclass(cls, nn.Module) and cls is not nn.Module
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and (name == "__call__" or not name.startswith("_"))
    }
    body: dict[str, Any] = {
        name: _intercepted(getattr(base, name)) for name in own if name != "setup"
    }
    body |= {name: _outermost(base, name) for name in ("init_with_output", "apply")}
    body |= {"__annotations__": {"lora": Any, "lora_deterministic": bool}}
    body |= {"lora": None, "lora_deterministic": True, "lora_base": base}
    body |= {"__module__": base.__module__, "__reduce__": _reduce}
    kind: Any = type(base)
    return kind(f"Lora{base.__name__}", (base, LoraModule), body)


def _reduce(self: Any) -> tuple:
    return _rebuild, (self.lora_base, _fields(self), self.lora.config, not self.lora_deterministic)


def _rebuild(base: Any, fields: dict[str, Any], config: LoraConfig, training: bool) -> Any:
    return inject(base(**fields), config, training)


def _intercepted(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.scope is None or self.lora in _RUNNING.get():  # unbound, or within another method
            return own(self, *args, **kwargs)
        intercept = functools.partial(_intercept, self)
        with _within(_RUNNING, self.lora), nn.intercept_methods(intercept):
            out = own(self, *args, **kwargs)
        if self.lora not in _OUTERMOST.get():
            _check_alone(self)
        return out

    for mark in ("compact", "nowrap"):  # Linen's own marks, which `wraps` copies: it wraps again
        method.__dict__.pop(mark, None)
    method.__dict__.pop("method_handler_wrapped", None)
    return method


# Injections one of whose methods runs; calls of layers that have not returned.
_RUNNING: ContextVar[tuple] = ContextVar("running", default=())
_CALLS: ContextVar[tuple] = ContextVar("calls", default=())
# Injections whose module's own init or apply runs, rather than those of a module around it.
_OUTERMOST: ContextVar[tuple] = ContextVar("outermost", default=())


@contextmanager
def _within(stack: ContextVar[tuple], entry: Any) -> Iterator[None]:
    token = stack.set((*stack.get(), entry))
    try:
        yield
    finally:
        stack.reset(token)


def _check_alone(model: Any) -> None:
    """Of a module whose own init and apply do not run: it is bound, or within another module.

    Raises:
        JloraError: its adapters need them, or a pattern matches no layer.
    """
    config = model.lora.config
    leaves = flatten(model.variables.get("params", {}))
    apart = [p for p in leaves if is_trained(p) and not p.rpartition("/")[2].startswith(_BESIDE)]
    if apart or config.bias != "none" or config.modules_to_save:
        raise JloraError(
            "bias, modules_to_save and weights in plain parameters need the injected module's own "
            "init and apply: inject the outermost module, and use apply rather than bind"
        )
    if model.is_initializing():
        model.lora.choice.check(list(model.lora.sites.values()))
        shapes = {path: meta.unbox(leaf).shape for path, leaf in leaves.items()}
        if plainly := linen_plain.candidates(model.lora, shapes):
            _log.warning(
                "%s: weights in plain parameters are not adapted in a module within another: "
                "inject the outermost one",
                ", ".join(plainly),
            )


_BESIDE = (LORA_A, LORA_B, LORA_TOKENS)  # leaves that the interceptor itself makes and reads


def _intercept(
    root: Any, following: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
) -> Any:
    """One call of one layer: its own output and the terms of its adapters."""
    layer = context.module
    layer_type = registry.find(REGISTRY, type(layer))
    if layer_type is None or context.method_name not in layer_type.methods:
        return following(*args, **kwargs)
    # nn.remat(nn.Dense), nn.vmap(nn.Dense)... are layers around a layer: the inner one is adapted.
    call = {"path": layer.path, "adapted": False}
    outer = next((c for c in _CALLS.get() if c["path"] == layer.path), None)
    with _within(_CALLS, call):
        y = following(*args, **kwargs)
    if outer is not None:
        outer["adapted"] = True
    weight = layer.get_variable("params", layer_type.weight)
    if weight is None or call["adapted"]:
        return y
    if not args:
        bound = inspect.signature(context.orig_method).bind(**kwargs)
        args, kwargs = bound.args, bound.kwargs
    injection: Injection = root.lora
    if layer.path[: len(root.path)] != root.path or layer.path == root.path:
        return y  # a module that runs another by `apply` of its own: not in this one's tree
    path = "/".join(layer.path[len(root.path) :])
    shape = meta.unbox(weight).shape
    site = layer_type.site(layer, path, shape, *args, **kwargs)
    injection.sites[path] = site
    if context.method_name == "attend":
        injection.attended.add(path)
    target = injection.target(site)
    if target is not None:
        box = weight if isinstance(weight, meta.AxisMetadata) else None
        factors = _factors(layer, target, injection.config, box)
        x, *rest = args
        if (
            injection.config.lora_dropout
            and not root.lora_deterministic
            and site.kind != "embedding"
        ):
            x = _dropout(injection.config.lora_dropout, layer, x)
        y = y + layer_type.delta(
            layer, context.method_name, (x, *rest), kwargs, factors, target.scaling, y.dtype
        )
    rows = injection.choice.config.trainable_token_indices
    if rows and site.kind == "embedding":
        indices = rows_of(rows, path)
        if indices:
            size = (len(indices), shape[-1])
            trained = _param(layer, LORA_TOKENS, lambda key: jnp.zeros(size, jnp.float32))
            y = y + registry.token_term(context.method_name, args[0], indices, trained, y)
    return y


def _factors(layer: Any, target: Target, config: LoraConfig, box: Any) -> tuple[Any, ...]:
    """The layer's own factors; `init` makes them."""
    site = target.site

    def first(name: str) -> Callable[..., Any]:
        def init(key: jax.Array) -> Any:
            value = adapter.init_factors(key, target, config.init_lora_weights)[name]
            if box is None or not hasattr(box, "names"):
                return value
            own = site.contracting if name == LORA_A else site.output
            picked = (*(box.names[i] for i in site.batch), None, *(box.names[i] for i in own))
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


def _outermost(base: type[nn.Module], name: str) -> Callable[..., Any]:
    """`init` and `apply`: where whole trees of parameters pass."""
    own = getattr(base, name)

    @nn.nowrap
    @functools.wraps(own)
    def init(self: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        with _within(_OUTERMOST, self.lora):
            out, variables = own(self, rngs, *args, **_with_method(kwargs))
        params = variables.get("params", {})
        call = functools.partial(_own_apply, self, base.apply, **_as_apply(rngs, kwargs))
        linen_plain.find(self.lora, call, variables, args)
        checked = planned(self, params)
        extra = added(checked, params) | linen_plain.factors(self.lora, checked, rngs, params)
        if not extra:
            return out, variables
        frozen = isinstance(variables, FrozenDict)
        variables = {**variables, "params": unflatten({**flatten(params), **extra})}
        return out, FrozenDict(variables) if frozen else variables

    @nn.nowrap
    @functools.wraps(own)
    def apply(self: Any, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "params" in variables:
            whole = effective(variables["params"])
            if whole is not variables["params"] and in_filter(
                kwargs.get("mutable", False), "params"
            ):
                raise JloraError(
                    "apply with mutable parameters would give back biases and saved modules with "
                    "what was trained already added; name other collections in `mutable`"
                )
            variables = {**variables, "params": whole}
        call = functools.partial(_own_apply, self, own, **kwargs)
        return linen_plain.call(self.lora, call, variables, args)

    return init if name.startswith("init") else apply


def _own_apply(
    self: Any, own: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any
) -> Any:
    if "method" in kwargs and kwargs["method"] in (None, "__call__"):
        kwargs.pop("method")
    with _within(_OUTERMOST, self.lora):
        return own(self, variables, *args, **_with_method(kwargs))


def _as_apply(rngs: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an `apply` to look at in place of `init`: whatever draws may, also dropout, and
    the result does not have the parameters.
    """
    streams = dict(rngs) if isinstance(rngs, Mapping) else {"params": rngs}
    keys = {n: jax.random.key(k) if isinstance(k, int) else k for n, k in streams.items()}
    keys.setdefault("dropout", next(iter(keys.values())))
    return kwargs | {"rngs": keys, "mutable": DenyList("params")}


def _with_method(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A `method` that is a function (the base class's, a lambda) runs as the module's own do."""
    method = kwargs.get("method")
    if method is None or isinstance(method, str):
        return kwargs
    return kwargs | {"method": _intercepted(getattr(method, "__func__", method))}
