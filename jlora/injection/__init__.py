"""The model transform. Each function decides once, by type, which flavour of Flax it was given."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from flax import nnx as flax_nnx

from jlora import adapter, targets
from jlora.config import LoraConfig
from jlora.errors import JloraError
from jlora.injection import nnx


def inject(model: Any, config: LoraConfig, *, rngs: Any, training: bool = True) -> Any:
    """Put low-rank factors beside the kernels that `config` targets.

    Args:
        model: a Flax NNX module; changed in place. Afterwards the model computes what it did before
            until the factors are trained (B is zero), and they are `nnx.LoRAParam` variables.
            A module that stacks layers (nnx.vmap) in an attribute may name it in a class attribute,
            `stacked_layers = ("layers",)`, for files that fit the unrolled model too; one with an
            output projection that "all-linear" leaves out may name it in `output_head`.
        config: which layers, which rank.
        rngs: nnx.Rngs, which draws A from `params` and dropout's keys from `dropout`; or a key.
        training: whether the adapters' dropout is on; model.train() and model.eval() switch it.

    Returns:
        The same model.

    Raises:
        JloraError: a pattern that matches no layer; a model that holds adapters already, or that is
            itself a layer.
    """
    _flavour(model).attach(model, plan(model, config), config, rngs, training)
    return model


def eject(model: Any) -> Any:
    """Take the factors out again, in place: bits and classes are those before `inject`."""
    _flavour(model).eject(model)
    return model


def partition(model: Any, *, everything: bool = False) -> tuple[dict[str, Any], Any]:
    """Split a model into what is trained and all the rest; `combine` is the exact inverse.

    Args:
        model: a Flax NNX module that `inject` has been given.
        everything: take every parameter as trained (full fine-tuning), not only adapters.

    Returns:
        (adapters, base): path -> array, in the model's shape, and a pytree to hand to `combine`.
        Both pass through jit; differentiate with respect to the first alone.
    """
    return _flavour(model).partition(model, everything)


def combine(adapters: Mapping[str, Any], base: Any) -> Any:
    """The model made of `adapters` and `base`, as `partition` gave them; no array is copied."""
    return _flavour(base).combine(adapters, base)


def train_mode(model: Any, key: Any) -> None:
    """Turn dropout on, in place, with draws that follow from `key`."""
    _flavour(model).train_mode(model, key)


def eval_mode(model: Any) -> None:
    """Turn dropout off, in place."""
    _flavour(model).eval_mode(model)


def update(model: Any, adapters: Mapping[str, Any]) -> None:
    """Set the values of leaves by path, in place, in each leaf's own dtype."""
    _flavour(model).update(model, adapters)


def sites(model: Any) -> list[adapter.Site]:
    """Every weight of the model that can be adapted."""
    return _flavour(model).find_sites(model)


def stacks(model: Any) -> dict[str, int]:
    """Path of each stacked module -> number of its layers."""
    return adapter.stacks_of(sites(model))


def plan(model: Any, config: LoraConfig) -> tuple[adapter.Target, ...]:
    """What `inject` would adapt, without touching the model."""
    flavour = _flavour(model)
    found = flavour.find_sites(model)
    if not found:
        raise JloraError(f"{type(model).__name__} holds no layer of a type that can be adapted")
    if any(not site.path for site in found):
        raise JloraError(
            f"the model is itself a {type(model).__name__} layer: put it in a module, since "
            "adapters are named by the path of their layer"
        )
    return targets.plan(config, found, flavour.output_head(model))


def scalings(model: Any) -> dict[str, float]:
    """Path of each adapted layer -> the factor on its low-rank product."""
    return _flavour(model).scalings(model)


def count(model: Any) -> tuple[int, int]:
    """(trainable, all) parameters; a shared weight counts once."""
    return _flavour(model).count(model)


def summary(model: Any) -> str:
    """The line that PEFT prints: trainable and all parameters, and the first's share in percent."""
    return summary_line(*count(model))


def summary_line(trainable: int, total: int) -> str:
    """`summary` of given counts."""
    return (
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )


def _flavour(model: Any) -> ModuleType:
    if isinstance(model, flax_nnx.Module | nnx.NnxBase):
        return nnx
    if hasattr(model, "module") and hasattr(model, "params"):
        raise JloraError(f"{type(model).__name__} wraps a Flax module: pass its .module")
    raise JloraError(f"expected a flax.nnx.Module, got {type(model).__name__}")
