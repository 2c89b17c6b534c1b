"""PEFT directories in: read whole, then fitted to a model, tensor by tensor."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora import fingerprint, injection, paths
from jlora.checkpoint import StoredAdapter, check_finite
from jlora.errors import JloraError
from jlora.files import read_template_of
from jlora.fingerprint import Fingerprint
from jlora.peft import config as peft_config
from jlora.peft.config import CONFIG_FILE
from jlora.peft.fused import fused_layers, join, renamed
from jlora.peft.tensors import (
    FACTORS,
    PREFIX,
    Entry,
    Table,
    Weights,
    base_weights,
    check_exportable,
    demand_unrolled,
    table,
    tied_heads,
)
from jlora.targets import head_among

WEIGHTS_FILE = "adapter_model.safetensors"
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
    path = locate(Path(path)) or Path(path)
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
            with np.errstate(over="ignore"):
                tensors = {k: opened.get_tensor(k).astype(np.float32) for k in dtypes}
            about = (opened.metadata() or {}).get(METADATA)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, JloraError):
            raise
        raise JloraError(
            f"{file} is truncated or no safetensors file ({error}); copy it again"
        ) from None
    check_finite(tensors, file)
    return tensors, None if about is None else _base(about, f"{file}: its metadata")


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
    leaves, read = base_weights(model, params)
    lora = stored.config
    try:
        if params is None:
            sites, stacks = injection.sites(model), injection.stacks(model)
        else:
            sites, stacks = injection.planned(model, params)[1], {}
            demand_unrolled(sites)
        if fused := fused_layers(model, sites):
            head = getattr(model, "output_head", None) or head_among(sites)
            lora = renamed(lora, sites, head, fused)
            stored = dataclasses.replace(stored, tensors=join(stored.tensors, fused))
        lora = peft_config.as_matched(lora, modules_of(leaves), fused)
        if params is None:
            plan = injection.plan(model, lora)
        else:
            plan, _ = injection.planned(model, params, lora)
        check_exportable(plan, sites)
    except JloraError as error:
        raise JloraError(f"the adapter in {stored.where} is not for this model: {error}") from None
    tied = tied_heads(model, sites)
    found = table(plan, sites, stacks, added=params is not None, tied=tied)
    _check_names(stored, found)
    _check_repeats(stored, found)
    if not force:
        _check_copies(stored, found, weights or read)
    factors = {
        entry.leaf: jnp.asarray(entry.from_torch(stored.tensors[entry.key], weights or read))
        for entry in found.entries
    }
    return dataclasses.replace(stored, config=lora, factors=factors, tensors={})


def modules_of(leaves: list[str]) -> list[str]:
    """Paths of all modules that hold the leaves, or modules that do."""
    found: dict[str, None] = {}
    for leaf in leaves:
        parts = leaf.split("/")
        found |= dict.fromkeys("/".join(parts[:n]) for n in range(1, len(parts)))
    return list(found)


def _check_names(stored: StoredAdapter, known: Table) -> None:
    expected = {entry.key: entry.shape for entry in known.entries}
    twins = {entry.twin: entry.shape for entry in known.entries if entry.twin}
    besides = {*known.copies, *known.repeats}
    if lacking := [twin for twin in twins if twin not in stored.tensors]:
        raise JloraError(
            f"the adapter in {stored.where} lacks {', '.join(lacking)}: it trained the embedding "
            "apart from the output head, which is the same weight here; train it with PEFT's "
            "ensure_weight_tying"
        )
    paths.check_same(
        expected | twins,
        {k: tuple(t.shape) for k, t in stored.tensors.items() if k in expected or k not in besides},
        what=f"the adapter in {stored.where}",
        remedy="it was trained on another model, or its configuration was edited",
    )


def _check_repeats(stored: StoredAdapter, known: Table) -> None:
    """Demand that what the file has twice is the same.

    Raises:
        JloraError: some differ; all are named.
    """
    repeats = dict(known.repeats) | {e.twin: e.key for e in known.entries if e.twin}
    differing = [
        again
        for again, key in repeats.items()
        if again in stored.tensors
        and not np.array_equal(stored.tensors[again], stored.tensors[key])
    ]
    if differing:
        raise JloraError(
            f"the adapter in {stored.where}: {', '.join(differing[:10])} should repeat "
            f"{', '.join(repeats[again] for again in differing[:10])}, and differ; save it again"
        )


def _check_copies(stored: StoredAdapter, known: Table, weights: Weights) -> None:
    """Demand that copies of base weights are the model's.

    Raises:
        JloraError: some differ; all are named.
    """
    changed = []
    for key in known.copies.keys() & stored.tensors.keys() - {e.key for e in known.entries}:
        entry, copy = known.copies[key], stored.tensors[key]
        weight = weights(entry.leaf)
        if copy.shape != entry.shape or not (weight is None or _same(weight, entry, copy)):
            changed.append(key.removeprefix(PREFIX).rpartition(".")[0].rpartition(".")[0])
    if changed:
        raise JloraError(
            f"the adapter in {stored.where} comes with base weights of "
            f"{', '.join(sorted(changed))} that are not this model's: it was trained on another "
            "model, or resized or trained its own"
        )


def _same(weight: np.ndarray, entry: Entry, copy: np.ndarray) -> bool:
    """Whether both are one weight, which either side may have rounded when it was loaded."""
    exact = entry.to_torch(weight).astype(np.float32)

    def rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
        with np.errstate(over="ignore"):
            return values.astype(dtype).astype(np.float32)

    return np.array_equal(exact, rounded(copy, weight.dtype)) or any(
        np.array_equal(copy, rounded(copy, dtype)) and np.array_equal(copy, rounded(exact, dtype))
        for dtype in (jnp.bfloat16, np.float16)
    )
