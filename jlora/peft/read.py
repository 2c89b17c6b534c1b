"""PEFT directories in: read whole, then fitted to a model, tensor by tensor."""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora import canonical, fingerprint, injection
from jlora.checkpoint import StoredAdapter, check_finite
from jlora.errors import JloraError, UnmatchedError, warn_once
from jlora.files import read_template_of
from jlora.fingerprint import Fingerprint
from jlora.peft import config as peft_config
from jlora.peft.checks import check_copies, check_names, check_repeats
from jlora.peft.config import CONFIG_FILE
from jlora.peft.fused import Fused, fused_layers, join, renamed, torch_layers
from jlora.peft.tensors import (
    FACTORS,
    PREFIX,
    Weights,
    base_weights,
    check_exportable,
    demand_unrolled,
    table,
    tied_heads,
)
from jlora.places import local
from jlora.targets import head_among

WEIGHTS_FILE = "adapter_model.safetensors"
# Names of factors with an adapter's name in them: layer and factor, that name, the rest.
_WITH_NAME = re.compile(
    r"(.*\.(?:lora_[AB](?=\..*\.weight)|lora_embedding_[AB](?!\.weight)))\.([^.]+)((?:\.weight)?)"
)
METADATA = "jlora"  # of the safetensors file: JSON that other programs pass over
_FLOATS = {"F64", "F32", "F16", "BF16"}


def locate(path: Path) -> Path | None:
    """The PEFT directory at `path`: itself, or the only one of its subdirectories that is one.

    PEFT writes each adapter that is not called "default" into a subdirectory of its name.

    Raises:
        JloraError: several subdirectories are adapters; they are named.
    """
    if (path / CONFIG_FILE).is_file():
        return path
    found = sorted(file.parent for file in path.glob(f"*/{CONFIG_FILE}"))
    if len(found) > 1:
        names = ", ".join(directory.name for directory in found)
        raise JloraError(f"{path} holds several adapters, {names}: give one, as {found[0]}")
    return found[0] if found else None


def read_peft(path: str | Path) -> StoredAdapter:
    """Read a PEFT directory, or the only one among the subdirectories of `path`.

    Tensors are converted to float32 (bfloat16 and float16 exactly, float64 rounded).

    Raises:
        JloraError: files that are missing or unreadable; settings that are not supported, all by
            name; tensors that are no floats or not finite, or whose names are none of PEFT's.
    """
    path = locate(local(path)) or Path(path)
    lora = peft_config.read_config(path / CONFIG_FILE)
    file = path / WEIGHTS_FILE
    if not file.is_file():
        raise JloraError(f"{file} does not exist; pickled adapters (.bin) are not read: save the "
                         "adapter again with safetensors")  # fmt: skip
    tensors, base = _read(file)
    factors = {}
    for key, tensor in tensors.items():
        if (name := _factor(key)) is not None:
            factors[name] = jnp.asarray(_usual_axes(name, tensor))
    template = read_template_of(path)
    return StoredAdapter(
        lora, factors, str(path), tensors=tensors, base=base, chat_template=template
    )


def _read(file: Path) -> tuple[dict[str, np.ndarray], Fingerprint | None]:
    """The tensors, and the base that they were trained on where the file says it."""
    try:
        # Compares the shapes that the header declares with the file's size before any is read.
        with safe_open(file, framework="np") as opened:
            dtypes = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
            if strange := [f"{k} ({d})" for k, d in dtypes.items() if d not in _FLOATS]:
                raise JloraError(
                    f"{file}: {', '.join(sorted(strange)[:10])}: an adapter's tensors are floats "
                    f"({', '.join(sorted(_FLOATS))}); save the adapter again"
                )
            if named := [key for key in dtypes if not _is_name(key)]:
                raise JloraError(
                    f"{file} holds tensors that are no adapter's, whose names are {PREFIX}, the "
                    f"layer's and the factor's: {', '.join(map(repr, sorted(named)[:10]))}"
                )
            plain = _plain_names(dtypes, file)
            with np.errstate(over="ignore"):
                tensors = {plain[k]: opened.get_tensor(k).astype(np.float32) for k in dtypes}
            about = (opened.metadata() or {}).get(METADATA)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, JloraError):
            raise
        raise JloraError(
            f"{file} is truncated or no safetensors file ({error}); copy it again"
        ) from None
    check_finite(tensors, file)
    return tensors, None if about is None else _base(about, f"{file}: its metadata")


def _plain_names(keys: Iterable[str], file: Path) -> dict[str, str]:
    """Return tensor name -> the name without the adapter's, which a saved state_dict has in it.

    "x.lora_A.default.weight" -> "x.lora_A.weight".

    Raises:
        JloraError: several adapters in one file; two tensors that would have one name.
    """
    plain = {key: key for key in keys}
    found = {m[2] for key in plain if (m := _WITH_NAME.fullmatch(key))}
    if len(found) > 1:
        raise JloraError(
            f"{file} holds several adapters, {', '.join(sorted(found))}: save one of them alone"
        )
    if found:
        name = re.escape(found.pop())
        rest = re.compile(
            rf"(.*\.trainable_tokens_delta)\.{name}|(.*)\.modules_to_save\.{name}(\..+)"
        )
        for key in plain:
            if match := _WITH_NAME.fullmatch(key):
                plain[key] = f"{match[1]}{match[3]}"
            elif match := rest.fullmatch(key):
                plain[key] = match[1] or f"{match[2]}{match[3]}"
    if len(set(plain.values())) < len(plain):
        twice = sorted(k for k, p in plain.items() if p != k and p in plain)
        raise JloraError(
            f"{file} holds tensors with an adapter's name in theirs and the same without: "
            f"{', '.join(twice[:5])}; save one adapter alone"
        )
    return plain


def _base(text: str, where: str) -> Fingerprint | None:
    try:
        known = json.loads(text)
    except (ValueError, RecursionError):
        known = None
    if not isinstance(known, dict):
        raise JloraError(f"{where} {METADATA!r} is no JSON object; copy the adapter again")
    return fingerprint.from_json(known["base"], where=where) if "base" in known else None


def _is_name(key: str) -> bool:
    """Whether a tensor's name is a path of attributes: nothing that a file system might follow."""
    parts = key.removeprefix(PREFIX).split(".")
    return key.startswith(PREFIX) and all(
        part and part.isprintable() and not set(part) & set("/\\") for part in parts
    )


def _factor(key: str) -> str | None:
    """Canonical path of a low-rank factor, by its name alone."""
    for suffix, factor in FACTORS.items():
        if key.endswith(f".{suffix}"):
            module = key.removeprefix(PREFIX).removesuffix(f".{suffix}")
            return f"{module.replace('.', '/')}/{factor}"
    return None


def _usual_axes(name: str, factor: np.ndarray) -> np.ndarray:
    """(r, in) or (r, *window, in), and (r, out): what can be said without the model."""
    if name.endswith("/lora_b"):
        return factor.reshape(factor.shape[:2]).T if _is_flat(factor) else factor
    return np.moveaxis(factor, 1, -1) if factor.ndim > 2 else factor


def _is_flat(factor: np.ndarray) -> bool:
    return factor.ndim >= 2 and all(size == 1 for size in factor.shape[2:])


def fit(
    stored: StoredAdapter,
    model: Any,
    params: Any = None,
    *,
    weights: Weights | None = None,
    force: bool = False,
) -> StoredAdapter:
    """The adapter of a PEFT directory as one for `model`: its leaves by canonical path.

    What was not read from a PEFT directory is returned as it is.

    Args:
        stored: as `read_peft` gave it.
        model: an NNX model, abstract or not, or an injected Linen module that has been traced.
        params: the Linen module's tree of parameters.
        weights: reads a leaf of the base, where `model` is abstract and the adapter has copies of
            base weights or rows of an embedding.
        force: pass over copies of base weights that are not the model's.

    Raises:
        JloraError: targets that the model lacks; tensors that are missing, unexpected or of
            another shape, all at once, by their names in the file; copies of base weights that are
            not the model's; what the format has no place for.
    """
    if not stored.tensors:
        return stored
    try:
        return _fit(stored, model, params, weights, force)
    except UnmatchedError as error:
        fewer = peft_config.without(stored.config, error.patterns)
        not_for = f"the adapter in {stored.where} is not for this model: {error}"
        if fewer == stored.config:
            raise JloraError(not_for) from None
        try:
            found = fit(
                dataclasses.replace(stored, config=fewer),
                model, params, weights=weights, force=force,
            )  # fmt: skip
        except JloraError as other:
            raise JloraError(f"{not_for}\nand without these: {other}") from None
        warn_once(
            f"the adapter in {stored.where} names what this model has not, and every tensor of its "
            f"file has a place here without: {', '.join(f'{f} {p!r}' for f, p in error.patterns)}"
        )
        return found


def _fit(
    stored: StoredAdapter, model: Any, params: Any, weights: Weights | None, force: bool
) -> StoredAdapter:
    """Return what `fit` does where each pattern matches; see there."""
    leaves, read = base_weights(model, params)
    lora = stored.config
    try:
        if params is None:
            sites, stacks = injection.sites(model), injection.stacks(model)
        else:
            sites, stacks = injection.planned(model, params)[1], {}
            demand_unrolled(sites)
        own = [layer for leaf in leaves for layer in canonical.layer_paths(leaf, stacks)]
        fused = torch_layers(model, sites, own)
        if not _has_any(stored.tensors, fused):  # of a model of before the layers were renamed
            fused = fused_layers(model, sites)
        if fused:
            head = getattr(model, "output_head", None) or head_among(sites)
            lora = renamed(lora, sites, head, fused)
            stored = dataclasses.replace(stored, tensors=join(stored.tensors, fused))
        lora = peft_config.as_matched(lora, modules_of(leaves), fused)
        if params is None:
            plan = injection.plan(model, lora)
        else:
            plan, _ = injection.planned(model, params, lora)
        check_exportable(plan, sites)
    except UnmatchedError:
        raise
    except JloraError as error:
        raise JloraError(f"the adapter in {stored.where} is not for this model: {error}") from None
    tied = tied_heads(model, sites)
    found = table(plan, sites, stacks, added=params is not None, tied=tied)
    check_names(stored, found, sites)
    check_repeats(stored, found)
    if not force:
        check_copies(stored, found, weights or read)
    factors = {
        entry.leaf: jnp.asarray(entry.from_torch(stored.tensors[entry.key], weights or read))
        for entry in found.entries
    }
    return dataclasses.replace(stored, config=lora, factors=factors, tensors={})


def _has_any(tensors: Iterable[str], fused: Fused) -> bool:
    """Return whether a file has tensors of some module that is called otherwise in torch."""
    parts = tuple(f"{PREFIX}{part}." for parts in fused.values() for part in parts)
    return any(key.startswith(parts) for key in tensors)


def modules_of(leaves: list[str]) -> list[str]:
    """Paths of all modules that hold the leaves, or modules that do."""
    found: dict[str, None] = {}
    for leaf in leaves:
        parts = leaf.split("/")
        found |= dict.fromkeys("/".join(parts[:n]) for n in range(1, len(parts)))
    return list(found)
