"""The table of an adapter's tensors: what each leaf of ours is called and shaped in PEFT's file."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlora import adapter, canonical, injection
from jlora.adapter import LORA_A, LORA_ADDED, LORA_B, LORA_TOKENS, Site
from jlora.errors import JloraError
from jlora.injection.nnx_tree import KEPT
from jlora.quant.array import QuantArray
from jlora.targets import Plan

PREFIX = "base_model.model."
FACTORS = {
    "lora_A.weight": LORA_A,
    "lora_B.weight": LORA_B,
    "lora_embedding_A": LORA_A,
    "lora_embedding_B": LORA_B,
}
_COPY = "base_layer.weight"
# Where PEFT's wrappers have a layer's own weight, beside the weight itself.
_BESIDE = ("original_module", "token_adapter.base_layer")
_TOKENS = "token_adapter.trainable_tokens_delta"

Weights = Callable[[str], np.ndarray | None]
"""Canonical path of a leaf of the base -> the leaf, one layer's where layers are stacked; None of
one that is quantised."""


def is_factor(key: str) -> bool:
    """Whether the name of a tensor is that of a low-rank factor."""
    return any(key.endswith(f".{suffix}") for suffix in FACTORS)


def is_copy(key: str) -> bool:
    """Whether it is that of a base weight, which PEFT saves along with factors."""
    return key.endswith(f".{_COPY}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the file and the leaf that it is: both differ by the order of axes alone."""

    key: str
    """The tensor's name in the file."""
    leaf: str
    """Canonical path of ours."""
    own: tuple[int, ...]
    """Our shape."""
    axes: tuple[int, ...]
    """Our axes in torch's order."""
    shape: tuple[int, ...]
    """Torch's shape: several of our axes may be one there."""
    base: str | None = None
    """Canonical path of the base's leaf that ours is added to, where torch's replaces it."""
    rows: tuple[int, ...] | None = None
    """Only these rows of `base`."""
    twin: str | None = None
    """Another name under which the file repeats the tensor: that of a tied output head."""

    def to_torch(self, leaf: np.ndarray, weights: Weights | None = None) -> np.ndarray:
        """Our leaf as the file has it; `weights` where it is added to one of the base's."""
        if self.base is not None and weights is not None:
            leaf = leaf + self._replaced(weights)
        # ascontiguousarray would make an axis of a scalar.
        return np.asarray(leaf.transpose(self.axes).reshape(self.shape), order="C")

    def from_torch(self, tensor: np.ndarray, weights: Weights) -> np.ndarray:
        """The file's tensor (float32) as we have it; the exact inverse where nothing is replaced.

        What replaces a leaf of the base is kept as its difference, in float32: adding it again
        gives the same bits where both have one sign and differ by a factor of two at most, and is
        off by at most one unit in the last place of the larger one elsewhere.
        """
        ordered = tensor.reshape([self.own[i] for i in self.axes])
        leaf = ordered.transpose(np.argsort(self.axes))
        return leaf if self.base is None else leaf - self._replaced(weights)

    def _replaced(self, weights: Weights) -> np.ndarray:
        assert self.base is not None
        whole = weights(self.base)
        assert whole is not None, self.base  # what is quantised is not trained
        whole = whole.astype(np.float32)
        return whole if self.rows is None else whole[list(self.rows)]


@dataclasses.dataclass(frozen=True)
class Table:
    """All tensors that an adapter has in the PEFT format."""

    entries: tuple[Entry, ...]
    copies: Mapping[str, Entry]
    """Name -> leaf of the base that PEFT may save along, unchanged."""
    beside: Mapping[str, Entry]
    """The same of layers that have no factors: embeddings and the head (save_embedding_layers)."""
    repeats: Mapping[str, str]
    """Name -> that of the tensor which PEFT then saves twice."""

    @property
    def leaves(self) -> dict[str, tuple[int, ...]]:
        """Canonical path -> shape of each leaf of ours."""
        return {entry.leaf: entry.own for entry in self.entries}


def table(
    plan: Plan,
    sites: Sequence[Site],
    stacks: Mapping[str, int],
    *,
    added: bool = False,
    tied: Mapping[str, str] | None = None,
) -> Table:
    """The table for what `plan` trains.

    Args:
        plan: of an adapter that `check_exportable` lets pass.
        sites: all of the model's.
        stacks: path of each stacked module -> number of its layers.
        added: parameters that are trained as a whole are kept as what is added to them (Linen).
        tied: path of an embedding -> name of the output head that has no weight but it.
    """
    entries: list[Entry] = []
    copies: dict[str, Entry] = {}
    repeats: dict[str, str] = {}
    adapted = {}
    for name, target in adapter.iter_names(plan.targets):
        adapted[name] = target.site
        entries += _factors(name, target)
        weight = _weight(f"{_torch(name)}.{_COPY}", name, target.site)
        copies[weight.key] = weight
    beside: dict[str, Entry] = {}
    heads_of = tied or {}
    for site in sites:
        for name in site.names:
            if site.weight and name not in adapted:
                weight = _weight(f"{_torch(name)}.weight", name, site)
                heads = [f"{PREFIX}{heads_of[name]}.weight"] if name in heads_of else []
                infixes = [f"{_torch(name)}.{infix}.weight" for infix in _BESIDE]
                beside |= {
                    key: dataclasses.replace(weight, key=key)
                    for key in (weight.key, *infixes, *heads)
                }
    by_weight = {f"{name}/{site.weight}": site for site in sites for name in site.names}
    modules = {name for site in sites for name in site.names}
    for path, shape in plan.whole.items():
        layers = canonical.layer_paths(path, stacks)
        for leaf in layers:
            own = shape if layers == [path] else shape[1:]
            parent, _, name = leaf.rpartition("/")
            if leaf in by_weight:
                entry = _weight(f"{_torch(parent)}.weight", parent, by_weight[leaf])
            else:
                alone = f"{path.rpartition('/')[0]}/weight" not in plan.whole  # of another leaf
                renamed = name == "scale" and parent not in modules and alone
                named = "weight" if renamed else name
                infix = ".base_layer" if parent in adapted else ""
                key = f"{_torch(parent)}{infix}.{named}" if parent else PREFIX + named
                flat = (math.prod(own),) if parent in modules else own
                entry = Entry(key, leaf, own, tuple(range(len(own))), flat)
            if parent in (tied or {}):
                assert tied is not None
                entry = dataclasses.replace(entry, twin=f"{PREFIX}{tied[parent]}.weight")
            if name == "bias" and parent not in adapted:  # of PEFT's two modules, with bias="all"
                original = f"{_torch(parent)}.original_module.bias"
                copies[original] = dataclasses.replace(entry, key=original)
                repeats[f"{_torch(parent)}.modules_to_save.bias"] = entry.key
            if added:
                leaf_added = f"{parent}/{LORA_ADDED}{name}".lstrip("/")
                entry = dataclasses.replace(entry, leaf=leaf_added, base=leaf)
            entries.append(entry)
    weight_of = {name: site.weight for site in sites for name in site.names}
    for path, rows in plan.tokens.items():
        key, shape = f"{_torch(path)}.{_TOKENS}", (len(rows), plan.widths[path])
        base = f"{path}/{weight_of[path]}"
        entries.append(
            Entry(key, f"{path}/{LORA_TOKENS}", shape, (0, 1), shape, base=base, rows=rows)
        )
    own_keys = {entry.key for entry in entries} | {entry.twin for entry in entries}
    beside = {key: entry for key, entry in beside.items() if key not in own_keys}
    return Table(tuple(entries), copies, beside, repeats)


def _factors(name: str, target: adapter.Target) -> list[Entry]:
    """A (r, *in) and B (r, *out) of one layer."""
    site, r, key = target.site, target.r, _torch(name)
    ins, outs = site.in_shape, site.out_shape
    a, b = (r, *ins), (r, *outs)
    axes_a, axes_b = tuple(range(len(a))), (*range(1, len(b)), 0)
    shape_a: tuple[int, ...] = (r, math.prod(ins))
    shape_b: tuple[int, ...] = (math.prod(outs), r)
    names = ("lora_A.weight", "lora_B.weight")
    if site.kind == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
    elif site.kind == "convolution":  # the inputs before the window; B has a window of 1
        *window, channels = ins
        axes_a = (0, len(a) - 1, *range(1, len(a) - 1))
        shape_a, shape_b = (r, channels, *window), (*outs, r, *(1 for _ in window))
    return [
        Entry(f"{key}.{names[0]}", f"{name}/{LORA_A}", a, axes_a, shape_a),
        Entry(f"{key}.{names[1]}", f"{name}/{LORA_B}", b, axes_b, shape_b),
    ]


def _weight(key: str, name: str, site: Site) -> Entry:
    """One layer's own weight: torch has the outputs first, but for an embedding's rows."""
    own = site.shape[site.stacked :]
    ins, outs = (tuple(i - site.stacked for i in x) for x in (site.contracting, site.output))
    leaf, sizes = f"{name}/{site.weight}", lambda axes: math.prod(own[i] for i in axes)
    if site.kind == "embedding":
        return Entry(key, leaf, own, (*ins, *outs), (sizes(ins), sizes(outs)))
    if site.kind == "convolution":
        *window, channels = ins
        axes = (*outs, channels, *window)
        return Entry(key, leaf, own, axes, tuple(own[i] for i in axes))
    return Entry(key, leaf, own, (*outs, *ins), (sizes(outs), sizes(ins)))


def _torch(name: str) -> str:
    return PREFIX + name.replace("/", ".")


def tied_heads(model: Any, sites: Iterable[Site]) -> dict[str, str]:
    """Path of an embedding -> name of the output head which is its transpose and no layer here."""
    head = getattr(model, "output_head", None)
    if not isinstance(head, str) or any(site.path == head for site in sites):
        return {}
    return dict.fromkeys(getattr(model, "tied_weights", {}), head.replace("/", "."))


def base_weights(model: Any, params: Any = None) -> tuple[list[str], Weights]:
    """Paths of the leaves of a model, and what reads one by its canonical path.

    Reading raises a JloraError where the model is abstract.
    """
    if params is None:
        leaves, _ = injection.partition(model, everything=True)
        stacks = injection.stacks(model)
    else:
        leaves, stacks = injection.unboxed(injection.partition(params)[1].rest), {}

    def read(path: str) -> np.ndarray | None:
        parent, _, name = path.rpartition("/")
        kept = f"{parent}/{KEPT}{name}".lstrip("/")  # the base's own, where another is trained
        for wanted, (found, leaf) in itertools.product((kept, path), leaves.items()):
            layers = canonical.layer_paths(found, stacks)
            if wanted not in layers:
                continue
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise JloraError(
                    f"{path}: the base's own values are needed, which the adapter changes or has a "
                    "copy of, and this model has shapes alone: give it with its weights"
                )
            if isinstance(leaf, QuantArray):
                return None
            return np.asarray(leaf if layers == [found] else leaf[layers.index(wanted)])
        raise JloraError(f"the model has no parameter {path}")

    return list(leaves), read


def demand_unrolled(sites: Iterable[Site]) -> None:
    """Demand that no layers of a Linen module are stacked.

    Raises:
        JloraError: some are, and have no names of their own.
    """
    if stacked := [site.path for site in sites if site.stacked]:
        raise JloraError(
            f"layers that nn.scan stacks have no names of their own: {', '.join(stacked[:5])}; "
            "take the module with its layers unrolled"
        )


def check_exportable(plan: Plan, sites: Iterable[Site] = ()) -> None:
    """Refuse what the PEFT format has no place for.

    Args:
        plan: what is trained.
        sites: all of the model's.

    Raises:
        JloraError: weights in plain parameters, experts, layers that torch computes otherwise,
            embeddings of which both factors and rows are trained; no adapted layer at all. All by
            name, with the reason.
    """
    problems = []
    adapted = {name for name, _ in adapter.iter_names(plan.targets)}
    for target in plan.targets:
        if reason := _unfit(target.site):
            problems.append(f"{target.site.path}: {reason}")
    for site in sites:
        if len(site.batch) > site.stacked and site.weight_path in plan.whole:
            problems.append(f"{site.path}: weights of experts, in torch those of several layers")
    for path in plan.tokens:
        if path in adapted or any(whole.rpartition("/")[0] == path for whole in plan.whole):
            problems.append(
                f"{path}: PEFT trains rows of an embedding (trainable_token_indices) or adapts it "
                "or trains it as a whole, not both"
            )
    if not plan.targets:
        problems.append("no layer is adapted, and PEFT demands one: name it in target_modules")
    if problems:
        raise JloraError(
            "the PEFT format has no place for:\n  "
            + "\n  ".join(problems[:10])
            + "\nleave it out, or keep the adapter with jlora.save_adapter"
        )


def _unfit(site: Site) -> str:
    if not site.weight:
        return "a weight in a plain parameter, which is no layer in torch"
    if site.kind == "other":
        return "a weight that is used in another way than torch's layers use theirs"
    if len(site.batch) > site.stacked:
        return "experts, each with factors of its own (PEFT's target_parameters)"
    return site.peculiar
