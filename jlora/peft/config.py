"""adapter_config.json: written with names resolved, read with every setting accounted for."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora import adapter, canonical, config, conversion
from jlora.adapter import Site, Target
from jlora.errors import JloraError
from jlora.matching import Choice, dotted
from jlora.peft.fused import Fused, is_renamed, names_of
from jlora.targets import Plan

CONFIG_FILE = "adapter_config.json"

# Settings of PEFT that change nothing in what an adapter computes.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights",
    "peft_type", "peft_version", "revision", "runtime_config",
    "low_cpu_mem_usage", "corda_config", "eva_config", "loftq_config", "lora_ga_config",
    "ensure_weight_tying",  # where it matters the file has the tied head too
    "qalora_group_size",  # use_qalora says whether it counts
    "megatron_core",  # megatron_config says whether it counts
    "fan_in_fan_out",  # of how torch keeps the base's weight; factors are the same
    "layers_pattern",  # what stands before a layer's number; each tensor has its place here anyway
}  # fmt: skip
# Other ways of initialising change the base weights whenever the adapter is loaded.
_BASE_KEPT = (None, True, False, "gaussian", "orthogonal", "eva")
_READ = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform",
    "rank_pattern", "alpha_pattern", "use_rslora", "task_type", "bias", "modules_to_save",
    "trainable_token_indices",
)  # fmt: skip
# Modules that PEFT puts into an adapted layer, and then finds like the model's.
_PEFTS = ("base_layer", "lora_dropout", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B",
          "lora_magnitude_vector")  # fmt: skip
_LARGEST = 2**31  # of numbers: beyond it they are damage, and some overflow floats
_DEEPEST = 50  # tables in tables: beyond it they are damage too


def to_settings(
    lora: config.LoraConfig,
    plan: Plan,
    sites: Sequence[Site],
    modules: Iterable[str],
    stacks: Mapping[str, int],
    *,
    fused: Fused,
    tied: bool,
    base_model: tuple[str | None, str | None],
) -> dict[str, Any]:
    """Resolved to names: patterns, exclusions and layer choices are written as what they chose.

    Args:
        lora: the configuration.
        plan: what it chose.
        sites: all of the model's.
        modules: paths of all modules, in the model's shape.
        stacks: path of each stacked module -> number of its layers.
        fused: layers that have several names there.
        tied: whether an embedding is trained as a whole that is the output head too.
        base_model: name or directory of the base model, and its revision.

    Raises:
        JloraError: modules to save, or embeddings, whose names PEFT would also find elsewhere.
    """
    named = {
        part: target
        for name, target in adapter.iter_names(plan.targets)
        for part in names_of(dotted(name), fused)
    }
    every = [p for site in sites for name in site.names for p in names_of(dotted(name), fused)]
    own = [dotted(name) for name, _ in adapter.iter_names(plan.targets)]
    before = own if any(is_renamed(fused.get(name, {})) for name in own) else []

    def only(name: str) -> str:
        """A pattern for `name` alone: PEFT lets patterns match the end of longer names too."""
        return f"^{name}" if any(other.endswith("." + name) for other in every) else name

    choice = Choice(lora)
    tops = [m for m in modules if choice.saves(m) and not choice.saves(m.rpartition("/")[0])]
    saved, known = (
        {
            part
            for path in paths
            for name in canonical.layer_paths(path, stacks)
            for part in names_of(dotted(name), fused)
        }
        for paths in (tops, modules)
    )
    known |= {f"{name}.{own}" for name in named for own in _PEFTS}
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": lora.task_type or None,
        "base_model_name_or_path": base_model[0],
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "target_modules": _target_names(named, every, before),
        "lora_dropout": lora.lora_dropout,
        "bias": lora.bias,
        "fan_in_fan_out": False,
        "use_rslora": lora.use_rslora,
        "use_dora": False,
        "rank_pattern": {only(name): t.r for name, t in named.items() if t.r != lora.r},
        "alpha_pattern": {
            only(name): t.alpha for name, t in named.items() if t.alpha != lora.lora_alpha
        },
        "modules_to_save": _ends("modules_to_save", saved, known) or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if plan.tokens:
        for path in plan.tokens:
            _ends("trainable_token_indices", {dotted(path)}, known)
        rows = {dotted(path): list(rows) for path, rows in plan.tokens.items()}
        settings["trainable_token_indices"] = rows
    if base_model[1] is not None:
        settings["revision"] = base_model[1]
    return settings | ({"ensure_weight_tying": True} if tied else {})


def _target_names(
    named: Mapping[str, Target], every: Sequence[str], before: Sequence[str]
) -> list[str] | str:
    """Last components where they choose just the adapted layers, as servers like it.

    Else full names, or a regular expression where those too would choose others, whose names end in
    one of them. A number alone is never written: in PEFT's model it names a whole block.

    With them, names that layers had `before` they were renamed: on a model that has them still PEFT
    then warns of tensors that are missing, and would else pass over most of the file in silence.
    """
    whole = sorted({*named, *before})
    last = sorted({name.split(".")[-1] for name in whole})
    for names in (last, whole):
        suffixes = tuple("." + name for name in names)
        chosen = {n for n in every if n in names or n.endswith(suffixes)}
        if chosen == set(named) and not any(name.isdigit() for name in names):
            return names
    return "|".join(map(re.escape, whole))


def _ends(field: str, wanted: set[str], known: set[str]) -> list[str]:
    """Ends of names that choose `wanted` among `known` as PEFT matches them: without a dot."""
    last = sorted({name.rpartition(".")[2] for name in wanted})
    for names in (last, sorted(wanted)):
        chosen = {n for n in known if n.endswith(tuple(names))}
        if chosen == wanted and not any(name.isdigit() for name in names):
            return names
    more = sorted({n for n in known if n.endswith(tuple(wanted))} - wanted)
    raise JloraError(
        f"{field}: PEFT finds modules by the end of their name, and that of "
        f"{', '.join(sorted(wanted)[:5])} would also be "
        f"{', '.join(more[:5]) or 'a number alone'}; keep the adapter with jlora.save_adapter"
    )


def as_matched(lora: config.LoraConfig, modules: Iterable[str], fused: Fused) -> config.LoraConfig:
    """With `modules_to_save` that choose what they do in PEFT: there any end of a name matches.

    Args:
        lora: as read from PEFT's file.
        modules: paths of all modules.
        fused: layers that have several names there.
    """
    if not lora.modules_to_save:
        return lora
    names = {part: name for path in modules for name in [dotted(path)]
             for part in names_of(name, fused)}  # fmt: skip
    ends: dict[str, None] = {}
    for pattern in lora.modules_to_save:
        depth = pattern.count(".") + 1
        found = [
            name if name in fused else ".".join(name.split(".")[-depth:])
            for part, name in names.items()
            if part.endswith(pattern)
        ]
        ends |= dict.fromkeys(found or [pattern])
    return dataclasses.replace(lora, modules_to_save=tuple(ends))


def read_config(file: Path) -> config.LoraConfig:
    """Read adapter_config.json.

    Raises:
        JloraError: a file that is missing or no JSON object; settings that are not supported, all
            by name; values of a wrong type.
    """
    if not file.is_file():
        own = "; this is jlora's own form, which load_adapter and --adapter take as it is"
        known = own if (file.parent / "meta").is_dir() else ""
        raise JloraError(f"{file} does not exist; a PEFT adapter is a directory with it{known}")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise JloraError(f"{file} is not JSON: {error}; copy the adapter again") from None
    if not isinstance(settings, dict):
        raise JloraError(f"{file} holds no JSON object; copy the adapter again")
    if _deeper(settings, _DEEPEST):
        raise JloraError(f"{file} is nested more than {_DEEPEST} deep; copy the adapter again")
    if settings.get("peft_type") != "LORA":
        raise JloraError(f"{file}: peft_type is {settings.get('peft_type')!r}, only 'LORA' is read")
    unsupported = [
        f"{key} = {value!r}"
        for key, value in settings.items()
        if key not in _INERT and key not in _READ and value
    ]
    if settings.get("init_lora_weights") not in _BASE_KEPT:
        unsupported.append(f"init_lora_weights = {settings['init_lora_weights']!r}")
    if unsupported:
        raise JloraError(f"{file}: not supported: {'; '.join(sorted(unsupported))}")
    if not settings.get("target_modules"):
        raise JloraError(
            f"{file}: target_modules is {settings.get('target_modules')!r}, which leaves the "
            "choice to PEFT's table of model types; write the names of the layers there"
        )
    if null := [key for key in ("r", "lora_alpha") if settings.get(key, 0) is None]:
        raise JloraError(f"{file}: {', '.join(null)}: null, and only a number will do")
    values = {key: settings[key] for key in _READ if settings.get(key) is not None}
    if huge := [key for key, value in values.items() if _too_large(value)]:
        raise JloraError(f"{file}: {', '.join(huge)}: a number beyond {_LARGEST}; copy it again")
    values = {"r": 8, "lora_alpha": 8, "task_type": ""} | values  # PEFT's own defaults
    return conversion.from_dict(config.LoraConfig, values, where=str(file))


def without(
    lora: config.LoraConfig, patterns: Iterable[tuple[str, str | int]]
) -> config.LoraConfig:
    """Return a configuration less patterns that match nothing; the same where no target is left."""
    fewer: dict[str, Any] = {}
    for field, pattern in patterns:
        value = fewer.get(field, getattr(lora, field))
        if isinstance(value, dict):
            fewer[field] = {key: own for key, own in value.items() if key != pattern}
        elif isinstance(value, tuple):
            fewer[field] = tuple(own for own in value if own != pattern)
        elif field == "exclude_modules":
            fewer[field] = None
    if not all(fewer.get(name, True) for name in ("target_modules", "layers_to_transform")):
        return lora
    fewer |= {name: value or None for name, value in fewer.items() if name in _OPTIONAL}
    return dataclasses.replace(lora, **fewer)


_OPTIONAL = ("exclude_modules", "modules_to_save")


def _too_large(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_too_large, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and abs(value) > _LARGEST


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and tables lie in each other more than `depth` deep; without recursion."""
    level = [value]
    for _ in range(depth + 1):
        tables = [x for x in level if isinstance(x, dict | list)]
        level = [y for x in tables for y in (x.values() if isinstance(x, dict) else x)]
    return bool(level)
