"""Whether a PEFT file holds what its configuration and a model ask for, no less and no more."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.adapter import Site
from jlora.checkpoint import StoredAdapter
from jlora.errors import JloraError
from jlora.matching import dotted
from jlora.peft.tensors import FACTORS, PREFIX, Entry, Table, Weights

Shapes = Mapping[str, tuple[int, ...]]


def check_names(stored: StoredAdapter, known: Table, sites: Sequence[Site]) -> None:
    """Demand each tensor of the table, in its shape, and no other but copies of the base's.

    Raises:
        JloraError: all differences at once, and what they come from.
    """
    expected = {entry.key: entry.shape for entry in known.entries}
    twins = {entry.twin: entry.shape for entry in known.entries if entry.twin}
    besides = {*known.copies, *known.beside, *known.repeats}
    if lacking := [twin for twin in twins if twin not in stored.tensors]:
        raise JloraError(
            f"the adapter in {stored.where} lacks {', '.join(lacking)}: it trained the embedding "
            "apart from the output head, which is the same weight here; train it with PEFT's "
            "ensure_weight_tying"
        )
    expected |= twins
    found = {
        key: tuple(tensor.shape)
        for key, tensor in stored.tensors.items()
        if key in expected or key not in besides
    }
    paths.check_same(
        expected,
        found,
        what=f"the adapter in {stored.where}",
        remedy="\n".join(_causes(expected, found, sites)),
    )


def _causes(expected: Shapes, found: Shapes, sites: Iterable[Site]) -> list[str]:
    """Return what the differences come from, a line for each cause, with the next step."""
    names = {dotted(name) for site in sites for name in site.names}
    lines = []
    extra, missing = (
        {key: _module(key) for key in a if key not in b}
        for a, b in ((found, expected), (expected, found))
    )
    odd = {key.rpartition(".")[2] for key, module in extra.items() if module is None}
    if odd:
        lines.append(
            f"{', '.join(sorted(odd)[:3])}: tensors of another kind of adapter than LoRA (DoRA, "
            "say), or base weights of another model; save it as LoRA alone"
        )
    ours = {module for module in extra.values() if module in names}
    if others := {module for module in extra.values() if module and module not in names}:
        lines.append(
            f"{len(others)} layers of the file are none of this model's: the adapter was trained "
            "on another model; load it on that"
        )
    elif new := ours - set(missing.values()):
        lines.append(
            f"adapter_config.json does not choose {', '.join(sorted(new)[:3])}, for which the file "
            "has factors: the configuration was edited, or is another adapter's; restore it"
        )
    sizes = [key for key in expected if key in found and found[key] != expected[key]]
    if sizes and all(_alike_but_rank(key, expected[key], found[key]) for key in sizes):
        lines.append(
            "the tensors are of other ranks than r and rank_pattern in adapter_config.json say: "
            "the configuration was edited, or is another adapter's; restore it"
        )
    elif sizes:
        lines.append(
            "layers of other sizes: the adapter was trained on another model; load it on that"
        )
    if missing and not (others or sizes):
        lines.append(
            "what is missing is not in the file, though adapter_config.json chooses it: a file "
            "that was saved in part, or a configuration that was edited; save or copy both again"
        )
    return lines


def _module(key: str) -> str | None:
    """Return the dotted name of the layer whose factor a tensor is by its name; None if of none."""
    for suffix in FACTORS:
        if key.endswith(f".{suffix}"):
            return key.removeprefix(PREFIX).removesuffix(f".{suffix}")
    return None


def _alike_but_rank(key: str, expected: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Return whether two shapes of one factor differ in its rank alone."""
    if _module(key) is None or len(expected) != len(found):
        return False
    rank = 0 if key.endswith(("lora_A.weight", "lora_embedding_A")) else 1
    return all(a == b for i, (a, b) in enumerate(zip(expected, found, strict=True)) if i != rank)


def check_repeats(stored: StoredAdapter, known: Table) -> None:
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


def check_copies(stored: StoredAdapter, known: Table, weights: Weights) -> None:
    """Demand that copies of base weights are the model's.

    Raises:
        JloraError: some differ; all are named.
    """
    own = {entry.key for entry in known.entries}
    changed, beside = [], []
    for key in sorted((known.copies.keys() | known.beside.keys()) & stored.tensors.keys() - own):
        entry, copy = known.copies.get(key) or known.beside[key], stored.tensors[key]
        weight = weights(entry.leaf)
        if copy.shape == entry.shape and (weight is None or _same(weight, entry, copy)):
            continue
        if key in known.copies:
            changed.append(key.removeprefix(PREFIX).rpartition(".")[0].rpartition(".")[0])
        else:
            beside.append(f"  {key} {_difference(weight, entry, copy)}")
    if changed:
        raise JloraError(
            f"the adapter in {stored.where} comes with base weights of "
            f"{', '.join(changed)} that are not this model's: it was trained on another model, or "
            "resized or trained its own"
        )
    if beside:
        raise JloraError(
            f"the adapter in {stored.where} comes with weights of its own beside the factors "
            "(PEFT's save_embedding_layers), which PEFT puts in place of the model's:\n"
            + "\n".join(beside[:10])
            + "\nFor a base that has them, where torch is: resize the model if a shape says so "
            "(resize_token_embeddings), and PeftModel.from_pretrained(model, adapter).unload()"
            ".save_pretrained(...); load the adapter on that. force=True (--force) keeps the "
            "model's own weights, with which the adapter was not trained"
        )


def _difference(weight: np.ndarray | None, entry: Entry, copy: np.ndarray) -> str:
    if weight is None or copy.shape != entry.shape:
        return f"is {copy.shape}, the model's {entry.shape}"
    rows = (entry.to_torch(weight).astype(np.float32) != copy).reshape(len(copy), -1).any(1)
    return f"differs in {rows.sum()} of {len(rows)} rows"


def _same(weight: np.ndarray, entry: Entry, copy: np.ndarray) -> bool:
    """Return whether both are one weight, which either side may have rounded when it was loaded."""
    exact = entry.to_torch(weight).astype(np.float32)

    def rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
        with np.errstate(over="ignore"):
            return values.astype(dtype).astype(np.float32)

    return np.array_equal(exact, rounded(copy, weight.dtype)) or any(
        np.array_equal(copy, rounded(copy, dtype)) and np.array_equal(copy, rounded(exact, dtype))
        for dtype in (jnp.bfloat16, np.float16)
    )
