"""Flax NNX: the class of an adapted layer, which adds the low-rank term to what the layer gives."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jlora import adapter
from jlora.adapter import LORA_A
from jlora.errors import JloraError
from jlora.injection import nnx_quant, registry, rows
from jlora.injection.nnx_sites import REGISTRY, type_of
from jlora.injection.registry import Contraction, Lookup


class LoraScaling(nnx.Variable):
    """The scaling of each stacked layer, float32 (layers,), where they differ."""


class LoraLayer:
    """What an adapted layer's class has beside the layer's own class: the low-rank term."""

    __slots__ = ()
    lora_base: type[nnx.Module]
    lora_rows = False
    """Whether the factors have a leading axis: those of each row of the input, which leads too."""

    def lora_call(self: Any, method: str, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's own output plus the low-rank term, in the dtype of that output."""
        own = getattr(self.lora_base, method)
        y = own(self, *args, **kwargs)
        if not args:  # the input was given by name
            bound = inspect.signature(own).bind(self, **kwargs)
            _, *args = bound.args  # type: ignore[assignment]
            kwargs = bound.kwargs
        x, *rest = args
        layer_type = type_of(self)
        if isinstance(layer_type, Contraction) and layer_type.claimed:
            written = getattr(getattr(self.lora_base, "quant_base", self.lora_base), method)
            nnx_quant.check_claim(self, layer_type, written, args, kwargs)
        if hasattr(self, LORA_A):
            low = x
            if self.lora_dropout and not self.deterministic and not isinstance(layer_type, Lookup):
                low = adapter.dropout(x, self.lora_dropout, self.lora_rngs())
            factors = self.lora_a[...], self.lora_b[...]
            scaling = self.lora_scaling
            if isinstance(scaling, LoraScaling):
                scaling = scaling[...]
                if scaling.ndim:
                    raise JloraError(
                        "the layers of this stack differ in rank or scaling, and the scan over it "
                        "does not slice the scalings: let its axes be 0 for all variables, not "
                        "for nnx.Param alone"
                    )
            delta = (
                functools.partial(rows.delta, layer_type) if self.lora_rows else layer_type.delta
            )
            term = delta(self, method, (low, *rest), kwargs, factors, scaling, y.dtype)
            y = y + term
        if hasattr(self, "lora_tokens"):
            trained = self.lora_tokens[...]
            y = y + registry.token_term(method, x, self.lora_token_indices, trained, y)
        return y

    def lora_reduce(self: Any) -> tuple:
        """The class is made at run time: pickle its base, and make it again."""
        own = getattr(self.lora_base, "quant_base", None)
        return _blank, (own or self.lora_base, own is not None), self.__getstate__()


@functools.cache
def lora_class(base: Any) -> Any:
    # The layer's own class comes first: Python lets an instance change class only between classes
    # of one memory layout, which is that of the first base. Hence methods in the body.
    body = {"lora_base": base, "__reduce__": LoraLayer.lora_reduce, "__module__": __name__}
    layer_type = registry.find(REGISTRY, base)
    assert layer_type is not None
    for method in layer_type.methods:
        body[method] = _call(method, getattr(base, method))
    metaclass: Any = type(base)
    return metaclass(f"Lora{base.__name__}", (base, LoraLayer), body)


def _call(method: str, own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
        return LoraLayer.lora_call(self, method, *args, **kwargs)

    return call


def by_row(model: nnx.Module) -> None:
    """Have each adapted layer take factors of each row's own; in place."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LoraLayer):
            module.lora_rows = True


def set_class(module: nnx.Module, cls: type) -> None:
    object.__setattr__(module, "__class__", cls)  # NNX's own would note it as an attribute


def _blank(base: type[nnx.Module], quantised: bool) -> nnx.Module:
    return object.__new__(lora_class(nnx_quant.quant_class(base) if quantised else base))


def scaling_of(module: Any) -> float | tuple[float, ...]:
    """The factor on an adapted layer's low-rank product."""
    layers = getattr(module, "lora_layers", None)
    return tuple(scaling for _, _, scaling in layers) if layers else module.lora_scaling
