"""Layers of ours that are others in Hugging Face's model: one kernel for query, key and value.

A model says so in a class attribute, `fused_layers = {"qkv_proj": {"q_proj": 8, "k_proj": 4,
"v_proj": 4}}`: the end of a layer's name -> the names in its place, and how many of the outputs,
in their order, each has. In the PEFT format each part has its own rows of B, and the same A. What
is only called otherwise there (`names`) has a single part.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jlora.adapter import Site
from jlora.config import LoraConfig
from jlora.errors import JloraError
from jlora.matching import Choice, dotted, ends
from jlora.peft import names
from jlora.peft.tensors import PREFIX

Fused = Mapping[str, Mapping[str, int]]
"""Dotted name of a fused layer -> the names of its parts, and their numbers of outputs; of a
renamed one, 0."""
_SHARED = ("lora_A.weight",)


def torch_layers(model: Any, sites: Iterable[Site], leaves: Iterable[str]) -> Fused:
    """Return the layers and other modules that have other names in Hugging Face's model.

    Args:
        model: says so itself, or is of a type that `names` knows.
        sites: all of its sites.
        leaves: paths of its parameters, each layer's own.

    Raises:
        JloraError: as `fused_layers`; two modules that would have one name.
    """
    found = {name: dict(parts) for name, parts in fused_layers(model, sites).items()}
    renames = names.names_of_model(model)
    if not renames:
        return found
    modules = dict.fromkeys(dotted(leaf.rpartition("/")[0]) for leaf in leaves)
    known: dict[str, str] = {}
    for module in modules:
        parts = {names.torch_name(p, renames): n for p, n in found.get(module, {module: 0}).items()}
        for part in parts:
            if (other := known.setdefault(part, module)) != module:
                raise JloraError(
                    f"peft_names: {other} and {module} would both be {part}; make the patterns "
                    "tell them apart"
                )
        if list(parts) != [module]:
            found[module] = parts
    return found


def is_renamed(parts: Mapping[str, int]) -> bool:
    """Tell whether a module is one in Hugging Face's model too, by another name."""
    return len(parts) == 1


def fused_layers(model: Any, sites: Iterable[Site]) -> Fused:
    """The fused layers among `sites`.

    Raises:
        JloraError: parts that are not all of a layer's outputs; a fused layer that is not linear.
    """
    declared = getattr(model, "fused_layers", {})
    found: dict[str, dict[str, int]] = {}
    for site in sites:
        for name in map(dotted, site.names):
            parts = next((p for end, p in declared.items() if ends(name, end)), None)
            if parts is None:
                continue
            outputs = math.prod(site.out_shape)
            if site.kind != "linear" or sum(parts.values()) != outputs:
                raise JloraError(
                    f"fused_layers: {name} is a {site.kind} layer of {outputs} outputs, which "
                    f"{dict(parts)} do not divide"
                )
            before = name.rpartition(".")[0]
            found[name] = {f"{before}.{part}".lstrip("."): n for part, n in parts.items()}
    return found


def names_of(name: str, fused: Fused) -> list[str]:
    """What a layer, by its dotted name, is called in Hugging Face's model."""
    return list(fused.get(name, [name]))


def split(tensors: Mapping[str, np.ndarray], fused: Fused) -> dict[str, np.ndarray]:
    """The tensors of fused layers as those of their parts."""
    result = {}
    for key, tensor in tensors.items():
        holding = (name for name in fused if key.startswith(f"{PREFIX}{name}."))
        module = max(holding, key=len, default=None)
        if module is None:
            result[key] = tensor
            continue
        suffix = key.removeprefix(f"{PREFIX}{module}.")
        start = 0
        for part, rows in fused[module].items():
            whole = suffix in _SHARED or is_renamed(fused[module])
            own = tensor if whole else tensor[start : start + rows]
            result[f"{PREFIX}{part}.{suffix}"] = own.copy()
            start += rows
    return result


def join(tensors: Mapping[str, np.ndarray], fused: Fused) -> dict[str, np.ndarray]:
    """The inverse of `split`; parts that are not all there, or of another size, stay as they are.

    Raises:
        JloraError: parts whose factors A differ, of which a fused layer has one.
    """
    rest, result = dict(tensors), {}
    for module, parts in sorted(fused.items(), key=lambda item: -len(next(iter(item[1])))):
        first, suffixes = next(iter(parts)), []
        for key in rest:
            if key.startswith(f"{PREFIX}{first}."):
                suffixes.append(key.removeprefix(f"{PREFIX}{first}."))
        for suffix in suffixes:
            keys = [f"{PREFIX}{part}.{suffix}" for part in parts]
            own = [rest[key] for key in keys if key in rest]
            if len(own) < len(parts):
                continue
            if is_renamed(parts):
                joined = own[0]
            elif suffix in _SHARED:
                if not all(np.array_equal(own[0], other) for other in own):
                    raise JloraError(
                        "it has a factor A of its own for each of "
                        f"{', '.join(parts)}, and {module}, which is all of them here, has one: "
                        "load it on a model with these layers apart"
                    )
                joined = own[0]
            elif [x.shape[:1] for x in own] == [(n,) for n in parts.values()] and (
                len({x.shape[1:] for x in own}) == 1
            ):
                joined = np.concatenate(own)
            else:
                continue
            for key in keys:
                del rest[key]
            result[f"{PREFIX}{module}.{suffix}"] = joined
    return rest | result


def renamed(lora: LoraConfig, sites: Iterable[Site], head: str | None, fused: Fused) -> LoraConfig:
    """What a configuration of Hugging Face's names chooses, by our names, each in full.

    Raises:
        JloraError: patterns that match nothing; parts of one layer that are not adapted alike.
    """
    choice, alone = Choice(lora, head), []
    for site in sites:
        for name in map(dotted, site.names):
            alone.append((name, [_alone(site, part) for part in names_of(name, fused)]))
    # What is only renamed goes by its name here too: for models of before it was renamed.
    again = [s for s in sites for n in s.names if is_renamed(fused.get(dotted(n), {}))]
    choice.check([*again, *(site for _, parts in alone for site in parts)])
    chosen = {}
    for name, parts in alone:
        targets = [choice.target(part) for part in parts]
        own = {(t.r, t.alpha) if t else None for t in targets}
        if len(own) > 1:
            raise JloraError(
                f"{', '.join(dotted(part.path) for part in parts)} are one layer here, {name}, and "
                "are not adapted alike"
            )
        if (ranks := own.pop()) is not None:
            chosen[name] = ranks
    return dataclasses.replace(
        lora,
        target_modules="|".join(map(re.escape, chosen)),
        exclude_modules=None,
        layers_to_transform=None,
        rank_pattern={f"^{re.escape(n)}": r for n, (r, _) in chosen.items() if r != lora.r},
        alpha_pattern={
            f"^{re.escape(n)}": a for n, (_, a) in chosen.items() if a != lora.lora_alpha
        },
    )


def _alone(site: Site, name: str) -> Site:
    """One layer of a site, by another name."""
    shape, n = site.shape[site.stacked :], site.stacked
    axes = {
        field: tuple(i - n for i in getattr(site, field) if i >= n)
        for field in ("contracting", "output", "batch")
    }
    path = name.replace(".", "/")
    return Site(path, shape, weight=site.weight, kind=site.kind, **axes)  # type: ignore[arg-type]
