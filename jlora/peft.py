"""The PEFT format: adapter_config.json and adapter_model.safetensors, in both directions.

Our paths are Hugging Face's names with "/" for ".", so that names need no table; the factors differ
from torch's only in B, which PEFT keeps as (out, r).
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora import adapter, config, conversion, fingerprint, injection
from jlora.adapter import LORA_A, LORA_B, Site, Target
from jlora.checkpoint import StoredAdapter, check_fits, gather
from jlora.errors import JloraError
from jlora.files import save_tensors
from jlora.fingerprint import Fingerprint
from jlora.targets import Plan

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_SUFFIXES = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight"}
_METADATA = "jlora"  # of the safetensors file: JSON that other programs pass over
_BASE_WEIGHT = "base_layer.weight"  # PEFT saves it along for a targeted output projection

# Settings of PEFT that change nothing in what an adapter computes.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights",
    "peft_type", "peft_version", "revision", "runtime_config", "ensure_weight_tying",
    "low_cpu_mem_usage", "corda_config", "eva_config", "loftq_config", "lora_ga_config",
    "qalora_group_size",  # use_qalora says whether it counts
}  # fmt: skip
# Other ways of initialising change the base weights whenever the adapter is loaded.
_BASE_KEPT = (None, True, False, "gaussian", "orthogonal", "eva")
_READ = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform",
    "rank_pattern", "alpha_pattern", "use_rslora", "task_type",
)  # fmt: skip
_NEUTRAL: dict[str, Any] = {"bias": "none", "megatron_core": "megatron.core"}


def export_peft(
    path: str | Path,
    model: Any,
    config: config.LoraConfig,
    *,
    params: Any = None,
    base_model: str | None = None,
) -> None:
    """Write the adapters of `model` as a PEFT directory.

    Args:
        path: a directory; an adapter that it holds already is replaced.
        model: a model that `inject` has been given; or an injected Linen module that has been
            traced (by `init`, say).
        config: the configuration that it was given.
        params: the Linen module's tree of parameters.
        base_model: name or directory of the base model, for those who load the adapter.

    Raises:
        JloraError: the model holds no adapters, or others than `config` says, or such as the
            format has no place for.
    """
    if params is None:
        write_peft(path, model, gather(model, config), base_model=base_model)
        return
    plan, sites = injection.planned(model, params)
    if stacked := [target.site.path for target in plan.targets if target.site.stacked]:
        raise JloraError(
            f"layers that nn.scan stacks have no names of their own: {', '.join(stacked[:5])}; "
            "export from the module with its layers unrolled"
        )
    stored = gather(model, config, params)
    check_exportable(plan)
    check_fits(stored, plan, {})
    _write(Path(path), stored, plan, sites, base_model)


def write_peft(
    path: str | Path, model: Any, stored: StoredAdapter, *, base_model: str | None = None
) -> None:
    """`export_peft` for an adapter as read from disk; `model` may be abstract.

    Raises:
        JloraError: factors that do not fit the model and their configuration.
    """
    plan = injection.plan(model, stored.config)
    check_exportable(plan)
    check_fits(stored, plan, injection.stacks(model))
    _write(Path(path), stored, plan, injection.sites(model), base_model)


def _write(
    path: Path, stored: StoredAdapter, plan: Plan, sites: Sequence[Site], base_model: str | None
) -> None:
    tensors = {_key(n): _to_torch(n, np.asarray(leaf)) for n, leaf in stored.factors.items()}
    settings = _peft_config(stored.config, plan.targets, sites, base_model)
    path.mkdir(parents=True, exist_ok=True)
    known = {} if stored.base is None else {"base": fingerprint.to_json(stored.base)}
    with tempfile.TemporaryDirectory(dir=path) as scratch:
        weights, text = Path(scratch, WEIGHTS_FILE), Path(scratch, CONFIG_FILE)
        save_tensors(tensors, weights, {_METADATA: json.dumps(known)} if known else None)
        text.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(weights, path / WEIGHTS_FILE)
        os.replace(text, path / CONFIG_FILE)


def check_exportable(plan: Plan) -> None:
    """Refuse what is not written in the PEFT format yet.

    Raises:
        JloraError: adapters of other layers than linear ones; biases, saved modules, token rows.
    """
    kinds = [f"{t.site.path} ({t.site.kind})" for t in plan.targets if t.site.kind != "linear"]
    kinds += [f"{t.site.path} (plain parameter)" for t in plan.targets if not t.site.weight]
    experts = [
        f"{t.site.path} (experts)" for t in plan.targets if len(t.site.batch) > t.site.stacked
    ]
    if other := [*kinds, *experts, *plan.whole, *plan.tokens]:
        raise JloraError(
            f"not exported to the PEFT format yet: {', '.join(other[:10])}; adapt linear layers "
            "alone, without bias, modules_to_save and trainable_token_indices, or keep the adapter "
            "with jlora.save_adapter"
        )


def read_peft(path: str | Path) -> StoredAdapter:
    """Read a PEFT directory.

    Raises:
        JloraError: files that are missing or unreadable; settings that are not supported, all by
            name; tensors that belong to no LoRA factor.
    """
    path = Path(path)
    lora = _read_config(path / CONFIG_FILE)
    file = path / WEIGHTS_FILE
    if not file.is_file():
        raise JloraError(f"{file} does not exist; pickled adapters (.bin) are not read: save the "
                         "adapter again with safetensors")  # fmt: skip
    try:
        with safe_open(file, framework="np") as tensors:
            found = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
            known = (tensors.metadata() or {}).get(_METADATA)
    except (SafetensorError, OSError) as error:
        raise JloraError(
            f"{file} is truncated or no safetensors file ({error}); copy it again"
        ) from None
    factors, base_weights, strangers = {}, {}, []
    for key, tensor in found.items():
        if (name := _name(key)) is not None:
            factors[name] = jnp.asarray(_from_torch(name, tensor), jnp.float32)
        elif (module := _module(key, _BASE_WEIGHT)) is not None:
            base_weights[module] = tensor
        else:
            strangers.append(key)
    strangers += [
        f"{_PREFIX}{module.replace('/', '.')}.{_BASE_WEIGHT}"
        for module in base_weights
        if f"{module}/{LORA_A}" not in factors
    ]
    if strangers:
        raise JloraError(f"{file} holds tensors that are no LoRA factors of linear layers: "
                         f"{', '.join(sorted(strangers)[:10])}")  # fmt: skip
    base = None if known is None else _read_base(known, f"{file}: its metadata")
    return StoredAdapter(lora, factors, str(path), base_weights, base)


def _read_base(text: str, where: str) -> Fingerprint | None:
    try:
        known = json.loads(text)
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise JloraError(f"{where} {_METADATA!r} is no JSON object; copy the adapter again")
    return fingerprint.from_json(known["base"], where=where) if "base" in known else None


def _key(name: str) -> str:
    module, _, factor = name.rpartition("/")
    return f"{_PREFIX}{module.replace('/', '.')}.{_SUFFIXES[factor]}"


def _name(key: str) -> str | None:
    for factor, suffix in _SUFFIXES.items():
        if (module := _module(key, suffix)) is not None:
            return f"{module}/{factor}"
    return None


def _module(key: str, suffix: str) -> str | None:
    """The canonical path of the module that `key` belongs to, if it ends in `suffix`."""
    if not (key.startswith(_PREFIX) and key.endswith("." + suffix)):
        return None
    return key.removeprefix(_PREFIX).removesuffix("." + suffix).replace(".", "/")


def _to_torch(name: str, factor: np.ndarray) -> np.ndarray:
    """(r, *in) -> (r, in) for A; (r, *out) -> (out, r) for B."""
    flat = factor.reshape(factor.shape[0], -1)
    return np.ascontiguousarray(flat.T if name.endswith(LORA_B) else flat)


def _from_torch(name: str, factor: np.ndarray) -> np.ndarray:
    return factor.T if name.endswith(LORA_B) else factor


def _peft_config(
    lora: config.LoraConfig,
    targets: Sequence[Target],
    sites: Sequence[Site],
    base_model: str | None,
) -> dict[str, Any]:
    """Resolved to names: patterns, exclusions and layer choices are written as what they chose."""
    named = {name.replace("/", "."): target for name, target in adapter.iter_names(targets)}
    every = [name.replace("/", ".") for site in sites for name in site.names]

    def only(name: str) -> str:
        """A pattern for `name` alone: PEFT lets patterns match the end of longer names too."""
        return f"^{name}" if any(other.endswith("." + name) for other in every) else name

    return {
        "peft_type": "LORA",
        "task_type": lora.task_type,
        "base_model_name_or_path": base_model,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "target_modules": _target_names(named, every),
        "lora_dropout": lora.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": lora.use_rslora,
        "use_dora": False,
        "rank_pattern": {only(name): t.r for name, t in named.items() if t.r != lora.r},
        "alpha_pattern": {
            only(name): t.alpha for name, t in named.items() if t.alpha != lora.lora_alpha
        },
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _target_names(named: Mapping[str, Target], every: Sequence[str]) -> list[str] | str:
    """Last components where they choose just the adapted layers, as servers like it.

    Else full names, or a regular expression where those too would choose others, whose names end in
    one of them. A number alone is never written: in PEFT's model it names a whole block.
    """
    last = sorted({name.split(".")[-1] for name in named})
    for names in (last, sorted(named)):
        suffixes = tuple("." + name for name in names)
        chosen = {n for n in every if n in names or n.endswith(suffixes)}
        if chosen == set(named) and not any(name.isdigit() for name in names):
            return names
    return "|".join(map(re.escape, sorted(named)))


def _read_config(file: Path) -> config.LoraConfig:
    if not file.is_file():
        raise JloraError(f"{file} does not exist; a PEFT adapter is a directory with that file")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise JloraError(f"{file} is not JSON: {error}; copy the adapter again") from None
    if not isinstance(settings, dict):
        raise JloraError(f"{file} holds no JSON object; copy the adapter again")
    if settings.get("peft_type") != "LORA":
        raise JloraError(f"{file}: peft_type is {settings.get('peft_type')!r}, only 'LORA' is read")
    unsupported = [
        f"{key} = {value!r}"
        for key, value in settings.items()
        if key not in _INERT and key not in _READ and value and value != _NEUTRAL.get(key)
    ]
    if settings.get("init_lora_weights") not in _BASE_KEPT:
        unsupported.append(f"init_lora_weights = {settings['init_lora_weights']!r}")
    if unsupported:
        raise JloraError(f"{file}: not supported: {'; '.join(sorted(unsupported))}")
    values = {key: settings[key] for key in _READ if settings.get(key) is not None}
    return conversion.from_dict(config.LoraConfig, values, where=str(file))
