"""The model transform. Each function decides once, by type, which flavour of Flax it was given."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as flax_linen
from flax import nnx as flax_nnx

from jlora import adapter, targets
from jlora.config import LoraConfig, QuantConfig
from jlora.errors import JloraError
from jlora.injection import (
    linen,
    linen_layer,
    linen_tree,
    nnx,
    nnx_model,
    nnx_quant,
    nnx_sites,
    nnx_tree,
    params,
    registry,
)
from jlora.injection.masked import optimizer as optimizer


def inject(
    model: Any,
    config: LoraConfig,
    *,
    rngs: Any = None,
    training: bool = True,
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> Any:
    """Put low-rank factors beside the weights that `config` targets.

    Args:
        model: a Flax module.
            NNX: changed in place. Afterwards the model computes what it did before until the
            factors are trained (B is zero), and they are `nnx.LoRAParam` variables.
            Linen: what comes back is a module of a subclass of its class. Its `init` makes
            `lora_a` and `lora_b` beside each targeted weight; the base's names are what they were.
            A module that stacks layers (nnx.vmap) in an attribute may name it in a class attribute,
            `stacked_layers = ("layers",)`, for files that fit the unrolled model too; one with an
            output projection that "all-linear" leaves out may name it in `output_head`; one whose
            code uses the weight of a layer elsewhere too may say so in `tied_weights`:
            {"embed_tokens": "the output head"}.
        config: which layers, which rank.
        rngs: for NNX: nnx.Rngs, which draws A from `params` and dropout's keys from `dropout`; or a
            key. Linen's `init` has its own.
        training: whether the adapters' dropout is on; for NNX model.train() and model.eval() switch
            it, for Linen module.clone(lora_deterministic=...).
        inputs: for NNX models that use weights in plain parameters (jnp.einsum, `@`) rather than in
            layers: arguments of a call, by which these uses are found; shapes
            (jax.ShapeDtypeStruct) do. Linen's `init` has its inputs.

    Returns:
        NNX: the same model; Linen: the injected module.

    Raises:
        JloraError: a pattern that matches no layer (for Linen, at `init`); a model that holds
            adapters already, or that is itself a layer.
    """
    if isinstance(model, flax_linen.Module):
        if rngs is not None or inputs is not None:
            raise JloraError(
                "rngs and inputs are for NNX models: a Linen module gets its keys and inputs in "
                "init, of which the injected module has one"
            )
        return linen.inject(model, config, training)
    checked = plan(model, config, inputs)
    head = _head(model)
    nnx.attach(model, checked.targets, config, rngs, training, checked.whole, checked.tokens, head)
    if inputs is not None:
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
        nnx_model.direct(model, "__call__", type(model).plain_base.__call__, args, kwargs)
    return model


def eject(model: Any) -> Any:
    """Take the factors out again: bits and classes are those before `inject`.

    An NNX model is changed in place and returned; for Linen, the module that was injected.
    """
    if isinstance(model, flax_linen.Module):
        return linen.eject(model)
    nnx.eject(_nnx(model))
    return model


def merge(model: Any, params: Any = None) -> Any:
    """W + scaling * A B in place of each weight W, by way of float32, and arrays of all weights.

    What was given stays as it is. Weights of a quantised base are dequantised, adapted or not.

    Args:
        model: an injected NNX model, or Linen module.
        params: Linen's tree of parameters, with its factors.

    Returns:
        NNX: a new model without adapters; Linen: a tree of parameters for the module that was
        injected.
    """
    if isinstance(model, linen.LoraModule):
        return linen_tree.merge(model, params)
    if params is not None:
        raise JloraError(
            f"merge takes a tree for injected Linen modules, not {type(model).__name__}"
        )
    return nnx.merge(_nnx(model))


def quantize(model: Any, config: QuantConfig | None = None, *, params: Any = None) -> Any:
    """Quantise the weights of chosen linear layers, each as soon as it is met.

    Args:
        model: an NNX model that is not injected yet, changed in place; or an injected Linen module
            that has been traced (by `init`, say), which then computes with quantised weights.
        config: which layers, and how; None means QuantConfig().
        params: the Linen module's tree of parameters.

    Returns:
        NNX: the same model; Linen: a new tree.

    Raises:
        JloraError: patterns that match nothing, what cannot be quantised or is already, weights
            that are not finite.
    """
    config = config or QuantConfig()
    if isinstance(model, flax_linen.Module):
        if not isinstance(model, linen.LoraModule) or params is None:
            raise JloraError("quantize takes an injected Linen module and its tree: params=tree")
        return linen_tree.quantize(model, params, config)
    nnx_quant.quantize(_nnx(model), to_quantise(model, config), config)
    return model


def to_quantise(model: Any, config: QuantConfig) -> list[adapter.Site]:
    """The sites of an NNX model, abstract or not, whose weights `config` quantises.

    Raises:
        JloraError: the model is injected already; patterns that match nothing.
    """
    if nnx.adapted(model):
        raise JloraError("the model holds adapters already: quantise it first, then inject")
    found = nnx_sites.find_sites(model)
    head = _head(model, found)
    return targets.to_quantise(config, found, head)


def mark_quantised(model: Any, sites: Sequence[adapter.Site]) -> None:
    """Have layers of an NNX model, abstract or not, compute with quantised weights, to be set."""
    by_path = nnx_tree.modules(model)
    for site in sites:
        nnx_quant.mark(by_path[site.path], site.path)


def partition(model: Any, *, everything: bool = False) -> tuple[dict[str, Any], Any]:
    """Split a model into what is trained and all the rest; `combine` is the exact inverse.

    Args:
        model: a Flax NNX module that `inject` has been given, or the tree of parameters of a Linen
            module.
        everything: take every parameter of an NNX model as trained (full fine-tuning).

    Returns:
        (adapters, base): path -> array, in the model's shape, and a pytree to hand to `combine`.
        Both pass through jit; differentiate with respect to the first alone.
    """
    if isinstance(model, Mapping):
        return params.partition(model)
    return nnx_tree.partition(_nnx(model), everything)


def base_leaves(model: Any) -> dict[str, Any]:
    """Path -> leaf of the base, as before training, of what `partition` takes."""
    if isinstance(model, Mapping):
        return params.base_leaves(model)
    return nnx_tree.base_leaves(_nnx(model))


def combine(adapters: Any, base: Any) -> Any:
    """The model or tree made of `adapters` and `base`, as `partition` gave them, without copies.

    Those of a bank (`jlora.Bank.partition`) are gathered here: call it within jit.

    For Linen `base` may also be a tree of parameters: pretrained ones, say, that get the adapters
    which `init` of the injected module made.
    """
    if isinstance(base, params.LinenBase | Mapping):
        return params.combine(adapters, base)
    return nnx_tree.combine(adapters, _nnx(base))


def unboxed(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays in boxes (nn.Partitioned)."""
    return params.unboxed(leaves)


def boxed_like(leaves: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` in the boxes (nn.Partitioned) that `leaves` of the same paths are in."""
    return params.boxed_like(leaves, values)


def register(layer: type, *, weight: str, equation: Any, bias: str | None = None) -> None:
    """Say how a layer type of your own uses its weight, so that it can be adapted.

    Args:
        layer: a subclass of nnx.Module or nn.Module whose `__call__` takes the input first; in
            Linen it declares its parameter itself.
        weight: name of the weight in it.
        equation: input, weight -> output as for einsum, "...i,io->...o"; or a function of
            (layer, input, *args) that gives it (NNX: also of the layer alone, for planning).
        bias: name of what it adds to the output.

    Each call of such a layer that is traced is compared with the equation.

    Raises:
        JloraError: no Flax module class; an equation that is none.
    """
    if isinstance(equation, str):
        registry.check_equation(equation)
    entry = registry.Contraction(weight=weight, form=equation, bias=bias, claimed=True)
    if isinstance(layer, type) and issubclass(layer, flax_nnx.Module):
        nnx_sites.REGISTRY[layer] = entry
    elif isinstance(layer, type) and issubclass(layer, flax_linen.Module):
        linen_layer.REGISTRY[layer] = entry
    else:
        raise JloraError(f"register takes a class of Flax modules, got {layer!r}")


def train_mode(model: Any, key: Any) -> None:
    """Turn dropout on, in place, with draws that follow from `key`."""
    nnx_tree.train_mode(_nnx(model), key)


def eval_mode(model: Any) -> None:
    """Turn dropout off, in place."""
    nnx_tree.eval_mode(_nnx(model))


def update(model: Any, adapters: Mapping[str, Any]) -> None:
    """Set the values of leaves by path, in place, in each leaf's own dtype."""
    nnx_tree.update(_nnx(model), adapters)


def sites(model: Any) -> list[adapter.Site]:
    """Every weight of the model that can be adapted."""
    return nnx_sites.find_sites(_nnx(model))


def stacks(model: Any) -> dict[str, int]:
    """Path of each stacked module -> number of its layers."""
    return adapter.stacks_of(sites(model))


def plan(model: Any, config: LoraConfig, inputs: Any = None) -> targets.Plan:
    """What `inject` would adapt, without touching the model."""
    _nnx(model)
    found = nnx_sites.find_sites(model, inputs)
    if not found:
        raise JloraError(
            f"{type(model).__name__} holds no layer of a type that can be adapted; weights in "
            "plain parameters are found where `inputs` are given, and jlora.register says how a "
            "layer type of your own uses its weight"
        )
    if any(not site.path for site in found):
        raise JloraError(
            f"the model is itself a {type(model).__name__} layer: put it in a module, since "
            "adapters are named by the path of their layer"
        )
    return targets.plan(
        config,
        found,
        _head(model, found),
        modules=nnx_sites.modules(model),
        biases=nnx_sites.biases(model),
        shared=nnx_sites.shared_weights(model),
    )


def _head(model: Any, found: Sequence[adapter.Site] | None = None) -> str | None:
    """Path of the output projection of an NNX model."""
    found = nnx_sites.find_sites(model) if found is None else found
    return nnx_sites.output_head(model) or targets.head_among(found)


def plan_targets(model: Any, config: LoraConfig, *args: Any, **kwargs: Any) -> targets.Plan:
    """What `inject` would adapt: `print` it for a table of path, shape, rank, alpha, parameters.

    Args:
        model: a Flax module that is not injected yet.
        config: as for `inject`.
        *args: inputs of the module's `__call__`; shapes (jax.ShapeDtypeStruct) do. NNX needs them
            for weights in plain parameters only.
        **kwargs: named ones.

    Raises:
        JloraError: as `inject`.
    """
    if not isinstance(model, flax_linen.Module):
        if args and kwargs:
            raise JloraError("give the inputs of an NNX model all by position or all by name")
        return plan(model, config, args or kwargs or None)
    if not (args or kwargs):
        raise JloraError(
            "the layers of a Linen module are found by tracing it: give plan_targets its inputs too"
        )
    injected = linen.inject(model, config, training=False)
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = [isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for x in leaves]

    def init(key: Any, given: list[Any]) -> Any:
        """Arrays are abstract; flags and the like are what they are."""
        each = iter(given)
        mixed = [next(each) if a else x for a, x in zip(arrays, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(structure, mixed)
        return injected.init(key, *args, **kwargs)

    given = [x for a, x in zip(arrays, leaves, strict=True) if a]
    variables = jax.eval_shape(init, jax.random.key(0), given)
    return linen_tree.planned(injected, variables.get("params", {}))


def planned(
    model: Any, tree: Any, config: LoraConfig | None = None
) -> tuple[targets.Plan, list[adapter.Site]]:
    """What an injected Linen module that has been traced adapts, and all its sites.

    Args:
        model: the injected module.
        tree: its parameters.
        config: another than the module was injected with.

    Raises:
        JloraError: another kind of model; one that has not been traced.
    """
    if not isinstance(model, linen.LoraModule):
        raise JloraError(f"expected an injected Linen module, got {type(model).__name__}")
    linen_tree.demand_traced(model)
    return linen_tree.planned(model, tree, config), linen_tree.sites_of(model, params.flatten(tree))


def difference(model: Any, tree: Any, config: LoraConfig) -> str:
    """Where an injected Linen module adapts otherwise than `config` says; "" where nowhere."""
    (own, _), (other, _) = planned(model, tree), planned(model, tree, config)
    return own.difference(other)


def scalings(model: Any) -> dict[str, float | tuple[float, ...]]:
    """Path of each adapted layer -> the factor on its low-rank product."""
    return nnx.scalings(_nnx(model))


def count(model: Any) -> tuple[int, int]:
    """(trainable, all) parameters; a shared weight counts once."""
    if isinstance(model, Mapping):
        return params.count(model)
    return nnx_tree.count(_nnx(model))


def summary(model: Any) -> str:
    """The line that PEFT prints: trainable and all parameters, and the first's share in percent."""
    return summary_line(*count(model))


def summary_line(trainable: int, total: int) -> str:
    """`summary` of given counts."""
    return (
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )


def _nnx(model: Any) -> Any:
    """`model`, which must be an NNX module, or the rest of one."""
    if isinstance(model, flax_nnx.Module | nnx_tree.NnxBase):
        return model
    if hasattr(model, "module") and hasattr(model, "params"):
        raise JloraError(f"{type(model).__name__} wraps a Flax module: pass its .module")
    if isinstance(model, flax_linen.Module):
        raise JloraError(
            "a Linen module holds no parameters: give the tree that its init returned, or an NNX "
            "module"
        )
    raise JloraError(f"expected a Flax module, got {type(model).__name__}")
