"""Flax NNX: find sites, put factors beside kernels, take them out, read the model as trees."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jlora import adapter
from jlora.adapter import LORA_A, LORA_B, Site, Target
from jlora.config import LoraConfig
from jlora.errors import JloraError
from jlora.injection.registry import LINEAR, Contraction

REGISTRY: dict[type[nnx.Module], Contraction] = {nnx.Linear: LINEAR}


def find_sites(model: nnx.Module) -> list[Site]:
    """Every weight of `model` that can be adapted, in the order of the model's attributes.

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
    for path, module in _layers(model):
        contraction = _contraction(module)
        shape = getattr(module, contraction.weight).shape
        extra = len(shape) - contraction.ndim
        sites.append(
            Site(
                path="/".join(map(str, path)),
                shape=shape,
                contracting=tuple(axis + extra for axis in contraction.contracting),
                output=tuple(axis + extra for axis in contraction.output),
                batch=tuple(range(extra)),
                stack=_stack(path, shape[:extra], declared) if extra else None,
                weight=contraction.weight,
            )
        )
    return sites


def output_head(model: nnx.Module) -> str | None:
    """Path of the output projection: the model's `output_head`, or a layer called "lm_head"."""
    named = getattr(model, "output_head", None)
    if isinstance(named, str):
        return named
    paths = ["/".join(map(str, path)) for path, _ in _layers(model)]
    return next((path for path in paths if path.split("/")[-1] == "lm_head"), None)


def attach(
    model: nnx.Module, targets: Sequence[Target], config: LoraConfig, rngs: Any, training: bool
) -> None:
    """Add factors to the targeted layers, in place; paths, sharing and isinstance stay.

    Args:
        model: holds the targets.
        targets: which layers.
        config: says how factors are initialised, and their dropout.
        rngs: nnx.Rngs, or a random key.
        training: whether dropout is on; `model.train()` and `model.eval()` change it.

    Raises:
        JloraError: the model holds adapters already.
    """
    if adapted(model):
        raise JloraError(
            "the model holds adapters already: jlora.eject(model) takes them out, "
            "jlora.load_adapter replaces their values"
        )
    rngs = rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs)
    key = rngs.params()
    streams: Any = rngs.dropout if config.lora_dropout else None  # an error here changes nothing
    modules = {"/".join(map(str, path)): module for path, module in _layers(model)}
    for target in targets:
        module: Any = modules[target.site.path]
        factors = adapter.init_factors(key, target, config.init_lora_weights)
        before = set(vars(module))
        own_class: Any = type(module)
        _set_class(module, _lora_class(own_class))
        module.lora_a = nnx.LoRAParam(factors[LORA_A])
        module.lora_b = nnx.LoRAParam(factors[LORA_B])
        module.lora_scaling = target.scaling
        module.lora_dropout = config.lora_dropout
        if streams is not None:
            # One stream a stacked layer, so that a scan over layers slices it with the kernel.
            shape = target.site.batch_shape
            module.lora_rngs = streams.split(shape) if shape else streams.fork()
            module.deterministic = not training
        module.lora_attributes = tuple(sorted(set(vars(module)) - before))


def eject(model: nnx.Module) -> None:
    """Take all factors out, in place, and give every layer its own class back."""
    for _, module in adapted(model):
        for name in (*module.lora_attributes, "lora_attributes"):
            delattr(module, name)
        _set_class(module, type(module).lora_base)


def adapted(model: nnx.Module) -> list[tuple[tuple, Any]]:
    """(path, module) of every layer that holds factors."""
    return [(p, m) for p, m in nnx.iter_modules(model) if isinstance(m, LoraLayer)]


def scalings(model: nnx.Module) -> dict[str, float]:
    """Path of each adapted layer -> the factor on its low-rank product."""
    return {"/".join(map(str, path)): module.lora_scaling for path, module in adapted(model)}


class LoraLayer:
    """What an adapted layer's class has beside the layer's own class: the low-rank term."""

    __slots__ = ()
    lora_base: type[nnx.Module]

    def lora_call(self: Any, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's own output plus the low-rank term, in the dtype of that output."""
        y = self.lora_base.__call__(self, x, *args, **kwargs)
        if self.lora_dropout and not self.deterministic:
            x = adapter.dropout(x, self.lora_dropout, self.lora_rngs())
        return y + adapter.delta(
            x, self.lora_a[...], self.lora_b[...], self.lora_scaling, dtype=y.dtype
        )

    def lora_reduce(self: Any) -> tuple:
        """The class is made at run time: pickle its base, and make it again."""
        return _blank, (self.lora_base,), self.__getstate__()


@functools.cache
def _lora_class(base: Any) -> Any:
    # The layer's own class comes first: Python lets an instance change class only between classes
    # of one memory layout, which is that of the first base. Hence methods in the body.
    body = {
        "lora_base": base,
        "__call__": LoraLayer.lora_call,
        "__reduce__": LoraLayer.lora_reduce,
        "__module__": __name__,
    }
    metaclass: Any = type(base)
    return metaclass(f"Lora{base.__name__}", (base, LoraLayer), body)


def _set_class(module: nnx.Module, cls: type) -> None:
    object.__setattr__(module, "__class__", cls)  # NNX's own would note it as an attribute


def _blank(base: type[nnx.Module]) -> nnx.Module:
    return object.__new__(_lora_class(base))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NnxBase:
    """All of a model but its trained leaves, as a pytree that passes through jit."""

    rest: Any
    graphdef: Any = dataclasses.field(metadata={"static": True})
    paths: tuple = dataclasses.field(metadata={"static": True})


def partition(model: nnx.Module, everything: bool) -> tuple[dict[str, Any], NnxBase]:
    """Split into (trained leaves by path, everything else); `combine` is the inverse."""
    trainable: Any = nnx.Param if everything else nnx.LoRAParam
    graphdef, chosen, rest = nnx.split(model, trainable, ...)  # type: ignore[misc]
    flat = nnx.to_flat_state(chosen)
    paths = tuple(path for path, _ in flat)
    leaves = {"/".join(map(str, path)): leaf.get_value() for path, leaf in flat}
    return leaves, NnxBase(rest=rest, graphdef=graphdef, paths=paths)


def combine(adapters: Mapping[str, Any], base: NnxBase) -> nnx.Module:
    """A new model that holds the given leaves; no array is copied."""
    flat = [(path, adapters["/".join(map(str, path))]) for path in base.paths]
    # copy: new Variables (not arrays), or NNX refuses to update a random stream under jax.grad.
    return nnx.merge(base.graphdef, nnx.from_flat_state(flat), base.rest, copy=True)


def update(model: nnx.Module, adapters: Mapping[str, Any]) -> None:
    """Set the values of the model's leaves by path, in place, in each leaf's own dtype."""
    for path, leaf in _variables(model, nnx.Param):
        if (value := adapters.get("/".join(map(str, path)))) is not None:
            leaf.set_value(jnp.asarray(value, leaf.dtype))


def train_mode(model: nnx.Module, key: jax.Array) -> None:
    """Turn dropout on, in place, with draws that follow from `key`."""
    model.train()
    # A model injected with a bare key, or nnx.Rngs(key), has its streams under the name "default".
    default = jax.random.fold_in(key, 1)
    nnx.reseed(model, policy="match_shape", dropout=key, default=default)


def eval_mode(model: nnx.Module) -> None:
    """Turn dropout off, in place."""
    model.eval()


def count(model: nnx.Module) -> tuple[int, int]:
    """(trained, all) parameters; a shared weight counts once."""
    sizes = [(isinstance(v, nnx.LoRAParam), v.size) for _, v in _variables(model, nnx.Param)]
    return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)


def _layers(model: nnx.Module) -> Iterator[tuple[tuple, nnx.Module]]:
    for path, module in nnx.iter_modules(model):
        if isinstance(module, tuple(REGISTRY)):
            yield path, module


def _contraction(module: nnx.Module) -> Contraction:
    return next(REGISTRY[cls] for cls in type(module).__mro__ if cls in REGISTRY)


def _variables(model: nnx.Module, kind: Any) -> list[tuple[tuple, Any]]:
    return list(nnx.to_flat_state(nnx.state(model, kind)))


def _stack(path: tuple, sizes: tuple[int, ...], declared: set[tuple]) -> str:
    """The module above or at `path` whose layers are stacked."""
    name = "/".join(map(str, path))
    if len(sizes) > 1:
        raise JloraError(f"{name} has {len(sizes)} stacked axes {sizes}; one is supported")
    prefixes = (path[:depth] for depth in range(1, len(path)))
    return next(("/".join(map(str, p)) for p in prefixes if p in declared), name)
