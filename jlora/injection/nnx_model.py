"""Flax NNX: the class of an injected model, whose methods adapt weights that its own code uses.

Modules within it that hold adapters are of such classes too, for calls that pass the model by.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jlora.adapter import LORA_A, LORA_B, Site
from jlora.errors import JloraError
from jlora.injection import nnx_plain, nnx_sites, plain, registry
from jlora.injection.nnx_call import Call, inside, running, stateful
from jlora.injection.nnx_layer import LoraLayer, LoraScaling, scaling_of, set_class
from jlora.injection.nnx_tree import KEPT, drop, get, holder, modules, put, trained_wholly
from jlora.injection.registry import own_methods
from jlora.matching import Choice
from jlora.paths import join


@dataclasses.dataclass(eq=False)
class Uses:
    """What an injected model knows of how its own code uses weights."""

    config: Any
    head: str | None
    plain: tuple[tuple[Site, Any], ...]
    """(site, scaling) of each adapted plain parameter, by its path in this module."""
    token: Any = dataclasses.field(default_factory=object)
    """One for a model and the modules within it: while a method of one runs, those of others do as
    their class says."""
    inner: bool = False
    """True for a module within an injected model, False for the model."""
    known: dict[Any, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Form of a call -> paths of the adapted layers whose weight it uses outside of them."""
    peculiar: dict[str, str] = dataclasses.field(default_factory=dict)
    """Path of an adapted layer -> why PEFT's update of it is another."""
    said: set[str] = dataclasses.field(default_factory=set)

    # Models that are adapted alike are one to jit.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Uses) and (self.plain, self.inner) == (other.plain, other.inner)

    def __hash__(self) -> int:
        return hash(self.plain)


def find(model: Any, call: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Find how a method uses the model's weights, `plain.OWN_CALL` where their layers do."""

    def prepare(copy: Any) -> None:
        nnx_sites.watch(copy)
        bare(copy)

    return nnx_plain.find_uses(model, call, args, kwargs, prepare)


def adopt(model: Any, uses: Uses, paths: Iterable[str]) -> None:
    """Make a model, and each module within it that holds adapters, one of such a class; in place.

    Args:
        model: holds the adapters.
        uses: of the model.
        paths: of all adapted layers and plain parameters.
    """
    above = {path.rsplit("/", n)[0] for path in paths for n in range(1, path.count("/") + 1)}
    for path, module in modules(model).items():
        if module is model or isinstance(module, nnx.List | nnx.Dict | LoraLayer):
            continue
        if path not in above or registry.find(nnx_sites.REGISTRY, type(module)):
            continue
        own = tuple(
            (dataclasses.replace(site, path=site.path.removeprefix(f"{path}/")), scaling)
            for site, scaling in uses.plain
            if site.path.startswith(f"{path}/")
        )
        _adopt(module, Uses(uses.config, uses.head, own, uses.token, inner=True))
    _adopt(model, uses)


def _adopt(module: Any, uses: Uses) -> None:
    module.lora_uses = uses
    base: Any = type(module)
    set_class(module, model_class(base))


def bare(model: Any) -> None:
    """Undo `adopt`, and take the factors of plain parameters out; in place.

    A copy of an injected model then passes its attributes on as its own class does: parameters that
    are trained as a whole are of their own types again, with their trained values.
    """
    if isinstance(model, PlainModel):
        drop_factors(model)
    for held_by, name in trained_wholly(model):
        kept = get(held_by, KEPT + name)
        put(held_by, name, kept.replace(get(held_by, name).get_value()))
        drop(held_by, KEPT + name)
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, PlainModel):
            delattr(module, "lora_uses")
            set_class(module, type(module).plain_base)


def drop_factors(model: Any) -> None:
    """Take the factors of plain parameters out of a model; in place."""
    for site, _ in nnx_sites.plain_sites(model):
        path, _, name = site.path.rpartition("/")
        for factor in (LORA_A, LORA_B):
            drop(holder(model, path), f"{name}_{factor}")


def direct(
    model: Any, name: str, own: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    """Name the adapted layers whose weight a call uses outside of them.

    Each form of a call is traced once. Factors that it does not use, and parameters that the
    configuration means and `inject` was not shown, are warned of.
    """
    uses: Uses = model.lora_uses
    if name != "__call__" and not (stateful((args, kwargs)) or any(_arrays((args, kwargs)))):
        return ()  # a getter, a printer: nothing is computed of a weight and an input
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda x: isinstance(x, nnx.Pytree))
    static = tuple(type(x) if _is_array(x) or not _hashable(x) else x for x in leaves)
    key = (name, tree, static)
    if key not in uses.known:
        layers = {join(path): layer for path, layer, _ in nnx_sites.layers(model)}
        adapted = {
            path: f"{path}/{nnx_sites.type_of(layer).weight}"
            for path, layer in layers.items()
            if isinstance(layer, LoraLayer)
        }
        try:
            found = find(model, own, args, kwargs)
        except jax.errors.JAXTypeError as error:
            _say(uses, "cannot be traced", (
                f"{name} of this model cannot be traced ({type(error).__name__}), so whether it "
                "uses weights of adapted layers outside of them is not known"
            ))  # fmt: skip
            found, adapted = {}, {}
        uses.known[key] = tuple(
            path for path, weight in adapted.items() if plain.direct(found.get(weight, ()))
        )
        for path in uses.known[key]:
            site = nnx_sites.site_of(layers[path], path)
            if reason := plain.tied(site, found[adapted[path]]):
                uses.peculiar[path] = reason
        if name == "__call__" and found and not uses.inner:
            _tell(model, uses, found, adapted, set(layers))
    return uses.known[key]


def _tell(model: Any, uses: Uses, found: Any, adapted: Mapping[str, str], known: set[str]) -> None:
    weights = dict(adapted) | {site.path: site.path for site, _ in uses.plain}
    for path, weight in weights.items():
        if weight in found and not found[weight]:
            _say(uses, path, (
                f"{path}: the weight is not used by this call, in which its adapter does nothing "
                "and gets no gradient"
            ))  # fmt: skip
    choice = Choice(uses.config, uses.head)
    leaves = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    shapes = {join(keys): leaf.shape for keys, leaf in leaves.items()}
    left = [
        site.path
        for site in nnx_plain.sites(found, shapes, known)
        if site.path not in weights and choice.takes(site, site.path)
    ]
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        _say(uses, shown, (
            f"{len(left)} weights in plain parameters, which target_modules means too, are not "
            f"adapted: {shown}. They are found where inject is given the arguments of such a "
            "call, inputs=(...); exclude_modules leaves them out"
        ))  # fmt: skip


def _say(uses: Uses, key: str, message: str) -> None:
    if key not in uses.said:
        uses.said.add(key)
        warnings.warn(message, stacklevel=2)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _arrays(tree: Any) -> list[bool]:
    return [True for x in jax.tree.leaves(tree) if _is_array(x)]


def _hashable(x: Any) -> bool:
    return not isinstance(x, nnx.Pytree | nnx.Variable) and x.__hash__ is not None


class PlainModel:
    """What the class of an injected model has beside the model's own class."""

    __slots__ = ()
    plain_base: type[nnx.Module]
    lora_uses: Uses


@functools.cache
def model_class(base: Any) -> Any:
    """Make the subclass of a model's class whose methods see updated weights."""
    own = own_methods(base, nnx.Module) - _NNX
    body: dict[str, Any] = {name: _updated(name, getattr(base, name)) for name in own}
    body |= {"plain_base": base, "__reduce__": _reduce, "__module__": __name__}
    kind: Any = type(base)
    return kind(f"Lora{base.__name__}", (base, PlainModel), body)


_NNX = {name for name in dir(nnx.Module) if name != "__call__"}


def _updated(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        uses: Uses = self.lora_uses
        if inside(uses.token):
            return own(self, *args, **kwargs)
        traced = direct(self, name, own, args, kwargs)
        if not (traced or uses.plain):
            with running(uses.token):
                return own(self, *args, **kwargs)
        by_path = modules(self)
        updates = {site.path: _plain_update(self, site, s) for site, s in uses.plain}
        updates |= dict(_layer_update(by_path[path], path) for path in traced)
        leaves = {
            join(keys): leaf.get_value()
            for keys, leaf in nnx.to_flat_state(nnx.state(self, nnx.Param))
        }
        weights = {path: leaves[path] for path in updates}

        def prepare(copy: nnx.Module) -> None:
            inner = modules(copy)
            for path in traced:  # their term is that of all uses of the weight
                set_class(inner[path], type(inner[path]).lora_base)
            bare(copy)

        function = Call(self, weights, own, args, kwargs, token=uses.token, prepare=prepare)
        return function.write(
            *plain.call(
                function, weights, updates, function.rest, *function.args, **function.kwargs
            )
        )

    return method


def _plain_update(model: Any, site: Site, scaling: Any) -> plain.LowRank:
    parent, _, name = site.path.rpartition("/")
    held_by = holder(model, parent)
    a, b = (get(held_by, f"{name}_{factor}").get_value() for factor in (LORA_A, LORA_B))
    return plain.update(site, a, b, scaling)


def _layer_update(layer: Any, path: str) -> tuple[str, plain.LowRank]:
    """Return the path of a layer's weight and its update, for all uses of the weight.

    Raises:
        JloraError: the layer's dropout is on, or its rows have adapters of their own: of uses
            outside of the layer neither is known.
    """
    site = nnx_sites.site_of(layer, path)
    what = ""
    if layer.lora_rows:
        what = "an adapter for each row of a batch is not supported there"
    elif getattr(layer, "lora_dropout", 0) and not layer.deterministic:
        what = "lora_dropout is not supported there"
    if what:
        raise JloraError(
            f"{path}: the model's own code uses the weight of this layer outside of it, and "
            f"{what}; leave the layer out (exclude_modules)"
        )
    update = None
    if hasattr(layer, LORA_A):
        scaling = layer.lora_scaling
        scaling = scaling_of(layer) if isinstance(scaling, LoraScaling) else scaling
        update = plain.update(site, layer.lora_a[...], layer.lora_b[...], scaling)
    if hasattr(layer, "lora_tokens"):
        rows = layer.lora_tokens[...]
        update = plain.with_rows(site, update, rows, layer.lora_token_indices)
    assert update is not None
    return site.weight_path, update


def _reduce(self: Any) -> tuple:
    return _blank, (self.plain_base,), self.__getstate__()


def _blank(base: Any) -> nnx.Module:
    return object.__new__(model_class(base))
