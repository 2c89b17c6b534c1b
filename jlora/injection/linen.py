"""Flax Linen: a module whose layers get factors beside their weights, and trees of parameters.

An injected module is of a subclass of its own class, made at run time, that runs each method under
an interceptor of layer calls. The interceptor makes the factors with the layer's own `param`, so
that they land beside its weight and nn.scan and nn.remat lift them with the rest. What is trained
as a whole (biases, saved modules) is a leaf that is added to the base's own, so that weights which
are loaded after `init` count.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import jax
from flax import linen as nn
from flax.core import DenyList, FrozenDict, meta
from flax.core.scope import in_filter

from jlora.adapter import LORA_A, LORA_B, LORA_TOKENS
from jlora.config import LoraConfig
from jlora.errors import JloraError
from jlora.injection import linen_layer, linen_plain, registry
from jlora.injection.linen_layer import REGISTRY, Injection, within
from jlora.injection.linen_tree import added, effective, planned
from jlora.injection.params import check_names, flatten, is_trained, unflatten

_log = logging.getLogger("jlora")


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
    own = registry.own_methods(base, nn.Module)
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
        intercept = functools.partial(linen_layer.intercept, self)
        with within(_RUNNING, self.lora), nn.intercept_methods(intercept):
            out = own(self, *args, **kwargs)
        if self.lora not in _OUTERMOST.get():
            _check_alone(self)
        return out

    for mark in ("compact", "nowrap"):  # Linen's own marks, which `wraps` copies: it wraps again
        method.__dict__.pop(mark, None)
    method.__dict__.pop("method_handler_wrapped", None)
    return method


# Injections one of whose methods runs.
_RUNNING: ContextVar[tuple] = ContextVar("running", default=())
# Injections whose module's own init or apply runs, rather than those of a module around it.
_OUTERMOST: ContextVar[tuple] = ContextVar("outermost", default=())


def _check_alone(model: Any) -> None:
    """Of a module whose own init and apply do not run: it is bound, or within another module.

    Raises:
        JloraError: its adapters need them, or a pattern matches no layer.
    """
    config = model.lora.config
    leaves = flatten(model.variables.get("params", {}))
    apart = [p for p in leaves if is_trained(p) and not p.rpartition("/")[2].startswith(_BESIDE)]
    if apart or model.lora.direct or config.bias != "none" or config.modules_to_save:
        raise JloraError(
            "bias, modules_to_save and weights that the module's own code uses need the injected "
            "module's own init and apply: inject the outermost module, and use apply rather than "
            "bind"
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


def _outermost(base: type[nn.Module], name: str) -> Callable[..., Any]:
    """`init` and `apply`: where whole trees of parameters pass."""
    own = getattr(base, name)

    @nn.nowrap
    @functools.wraps(own)
    def init(self: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        with within(_OUTERMOST, self.lora):
            out, variables = own(self, rngs, *args, **_with_method(kwargs))
        params = variables.get("params", {})
        call = functools.partial(_own_apply, self, base.apply, **_as_apply(rngs, kwargs))
        linen_plain.find(self.lora, call, variables, args, kwargs.get("method"))
        self.lora.forms.add(linen_plain.form_of(kwargs.get("method"), args))
        checked = planned(self, params)
        check_names(params, checked.shapes)
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
        return linen_plain.call(self.lora, call, variables, args, kwargs.get("method"))

    return init if name.startswith("init") else apply


def _own_apply(
    self: Any, own: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any
) -> Any:
    if "method" in kwargs and kwargs["method"] in (None, "__call__"):
        kwargs.pop("method")
    with within(_OUTERMOST, self.lora):
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
