"""Several adapters made into one, in the ways of PEFT's `add_weighted_adapter`, without the model.

Each weight is treated on its own, with the adapters that change it, and each expert as a weight.
"""

import collections
import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jlora import adapters as files
from jlora import mixture
from jlora.checkpoint import StoredAdapter
from jlora.config import CombinationType, LoraConfig
from jlora.errors import JloraError, nearest
from jlora.matching import dotted
from jlora.peft import is_copy
from jlora.updates import Update, others, updates

COMBINATION_TYPES: tuple[str, ...] = get_args(CombinationType)


def combine_adapters(
    adapters: Sequence[str | Path | StoredAdapter],
    weights: Sequence[float],
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
) -> StoredAdapter:
    """Make one adapter of several, which may differ in rank, alpha, rsLoRA and layers.

    Where w is an adapter's weight and s its scaling at a layer, ``W' = W + sum of w s A B`` is what
    "cat" gives exactly and "svd" as nearly as its rank allows. The others are not that sum:

    - "linear" adds up the A, each times sqrt(|w s|) and the sign of w, and the B, each times
      sqrt(|w s|). The product of the two sums has the wanted terms and also those of one adapter's
      A with another's B: for adapters trained apart these are noise.
    - "magnitude_prune" keeps the largest entries of each A and B, then does the same.
    - "ties" also elects a sign for each entry, by all adapters together, and averages those that
      have it (Yadav et al. 2023, arXiv:2306.01708); of factors it shares the cross terms.
    - "dare_linear" and "dare_ties" drop entries at random and scale the rest by 1 / density (Yu et
      al. 2023, arXiv:2311.03099), then do as "linear" and "ties".
    - With "_svd" after any of the four the same is done to the s A B, as the papers have it, and
      the result cut to `svd_rank`: without cross terms, but each s A B is formed.

    PEFT 0.21.2 gives the same but for two faults, which tests/parity/test_combine.py shows. Where
    the first adapter has rsLoRA, its result is too large by the square root of the new rank. And
    layers that the first leaves out, by layers_to_transform or exclude_modules, it leaves out too.

    Args:
        adapters: paths as for `load_adapter`, or what this function returned.
        weights: one for each; may be negative.
        combination_type: as above.
        svd_rank: of the ways with "svd": highest rank of the result; None takes that of the
            adapters.
        density: of the ways that drop entries: the part of them that is kept, above 0.
        majority_sign_method: of ties, an entry's sign: that of the "total" or, by "frequency", of
            most adapters. Weights do not count for it.
        seed: of what DARE drops.

    Returns:
        An adapter with scaling 1 and float32 factors, for `load_adapter`; its `save` writes it.

    Raises:
        JloraError: arguments that do not go together; adapters with trained parameters that are no
            factors, of unlike weights or, but for "cat" and "svd", unlike ranks; values that are
            not finite. All of a kind at once.
    """
    _check_arguments(adapters, weights, combination_type, svd_rank, density, majority_sign_method)
    read = [files.read(adapter) for adapter in adapters]
    each = [updates(stored) for stored in read]
    kind = combination_type.removesuffix("_svd")
    of_factors = kind == combination_type and kind not in ("cat", "svd")
    _check_alike(read, each, same_rank=of_factors)
    merge = mixture.Merge(kind, 1.0 if density is None else density, majority_sign_method)
    rank = svd_rank or max(update.r for own in each for update in own.values())
    factors, ranks = {}, {}
    with jax.default_matmul_precision("highest"):
        for name in dict.fromkeys(name for own in each for name in own):
            tasks = [
                mixture.task(own[name], weight, mixture.key_of(seed, name, i))
                for i, (own, weight) in enumerate(zip(each, weights, strict=True))
                if name in own
            ]
            if kind == "cat":
                a, b = mixture.concatenated(tasks)
            elif kind == "svd":
                a, b = mixture.cut(*mixture.concatenated(tasks), rank)
            elif of_factors:
                a, b = mixture.merged_factors(tasks, merge)
            else:
                a, b = mixture.decomposed(mixture.merged_delta(tasks, merge), rank)
            like = _roomiest([own[name] for own in each if name in own])
            ranks[name] = a.shape[1]
            factors[like.paths[0]] = a.reshape(*like.batch_shape, -1, *like.in_shape)
            factors[like.paths[1]] = b.reshape(*like.batch_shape, -1, *like.out_shape)
    if bad := [path for path, leaf in factors.items() if not bool(jnp.isfinite(leaf).all())]:
        raise JloraError(
            f"the combination is not finite at {', '.join(bad[:10])}: jlora inspect ADAPTER shows "
            "which of the adapters is not"
        )
    return dataclasses.replace(
        read[0],
        config=_config(read, each, ranks),
        factors=factors,
        where=f"{combination_type} of {', '.join(stored.where for stored in read)}",
        tensors={},
        base=next((stored.base for stored in read if stored.base is not None), None),
        chat_template=_common_template(read),
    )


def _common_template(read: Sequence[StoredAdapter]) -> str | None:
    """Return the chat template that all adapters were trained with; None and a warning if none."""
    if len({stored.chat_template for stored in read}) == 1:
        return read[0].chat_template
    logging.getLogger("jlora").warning(
        "the adapters were trained with different chat templates: the combination keeps none of "
        "them, and is used with the model's own unless --chat-template gives another"
    )
    return None


def _roomiest(found: Sequence[Update]) -> Update:
    """That with the axes of factored weights, which the PEFT format has as one."""
    return max(found, key=lambda update: update.lora_a.ndim + update.lora_b.ndim)


def _check_arguments(
    adapters: Sequence[Any],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None,
    density: float | None,
    majority_sign_method: str,
) -> None:
    problems = []
    if isinstance(adapters, str):
        problems.append(f"adapters is {adapters!r}: give a list of paths")
    if not adapters:
        problems.append("adapters is empty: give at least one")
    if len(adapters) != len(weights):
        problems.append(f"weights: {len(weights)} of them for {len(adapters)} adapters")
    if bad := [w for w in weights if not math.isfinite(w)]:
        problems.append(f"weights must be finite, got {', '.join(map(str, bad))}")
    known = combination_type in COMBINATION_TYPES
    if not known:
        near = nearest(combination_type, COMBINATION_TYPES)
        problems.append(
            f"combination_type: no {combination_type!r}"
            + (near or f"; there are {', '.join(COMBINATION_TYPES)}")
        )
    kind = combination_type.removesuffix("_svd")
    if known and kind not in mixture.PRUNED and density is not None:
        problems.append(f"density: {combination_type!r} drops nothing; leave it out")
    if known and kind in mixture.PRUNED and density is None:
        problems.append(f"density: {combination_type!r} needs the part of the entries to keep")
    if density is not None and not 0 < density <= 1:
        problems.append(f"density must be above 0 and at most 1, got {density}")
    if svd_rank is not None and svd_rank < 1:
        problems.append(f"svd_rank must be at least 1, got {svd_rank}")
    if known and svd_rank is not None and "svd" not in combination_type:
        problems.append(f"svd_rank: {combination_type!r} decomposes nothing; leave it out")
    if majority_sign_method not in ("total", "frequency"):
        problems.append(
            f"majority_sign_method must be 'total' or 'frequency', got {majority_sign_method!r}"
        )
    elif known and majority_sign_method != "total" and "ties" not in kind:
        problems.append(f"majority_sign_method: {combination_type!r} elects none; leave it out")
    if problems:
        raise JloraError("\n  ".join(["these adapters cannot be combined so:", *problems]))


def _check_alike(
    read: Sequence[StoredAdapter], each: Sequence[Mapping[str, Update]], *, same_rank: bool
) -> None:
    problems = []
    for stored, own in zip(read, each, strict=True):
        if more := sorted(others(stored)):
            problems.append(
                f"{stored.where} trains {', '.join(more[:5])} beside factors, and only factors "
                "are combined"
            )
        if not own:
            problems.append(f"{stored.where} has no factors")
    first: dict[str, tuple[Update, str]] = {}
    copies: dict[str, tuple[Any, str]] = {}
    for stored, own in zip(read, each, strict=True):
        for name, update in own.items():
            other, where = first.setdefault(name, (update, stored.where))
            if not _same_weight(other, update):
                problems.append(
                    f"{name}: shapes {other.shape} and {update.shape} in {where} and {stored.where}"
                )
            elif same_rank and other.r != update.r:
                problems.append(
                    f"{name}: ranks {other.r} and {update.r} in {where} and {stored.where}"
                )
        for name, copy in stored.tensors.items():
            known, where = copies.setdefault(name, (copy, stored.where))
            if is_copy(name) and not np.array_equal(known, copy):
                problems.append(f"{name}: the base weights in {where} and {stored.where} differ")
    bases = [(stored.base, stored.where) for stored in read if stored.base is not None]
    for base, where in bases[1:]:
        if differs := bases[0][0].differences(base):
            problems.append(
                f"{bases[0][1]} and {where} were trained on other bases: {'; '.join(differs)}"
            )
    if problems:
        unequal = any(": ranks " in problem for problem in problems)
        raise JloraError(
            "\n  ".join(
                ["the adapters do not go together:", *problems[:10]]
                + ([f"… and {len(problems) - 10} more"] if len(problems) > 10 else [])
                + (["ranks may differ for cat, svd and those that end in _svd"] if unequal else [])
            )
        )


def _same_weight(x: Update, y: Update) -> bool:
    """Whether both are of one weight; one may have its factored axes as one."""
    return x.batch_shape == y.batch_shape and all(
        p == q or (math.prod(p) == math.prod(q) and 1 in (len(p), len(q)))
        for p, q in ((x.in_shape, y.in_shape), (x.out_shape, y.out_shape))
    )


def _config(
    read: Sequence[StoredAdapter], each: Sequence[Mapping[str, Update]], ranks: Mapping[str, int]
) -> LoraConfig:
    """The first adapter's, with all that chooses layers, ranks and scaling made to fit."""
    choices = [
        (c.target_modules, c.exclude_modules, c.layers_to_transform)
        for c in (stored.config for stored in read)
    ]
    if all(choice == choices[0] for choice in choices) and all(
        set(own) == set(ranks) for own in each
    ):
        target_modules, exclude_modules, layers = choices[0]
    else:
        # A list of names would match the ends of longer ones.
        names = "|".join(re.escape(dotted(name)) for name in ranks)
        target_modules, exclude_modules, layers = names, None, None
    ((r, _),) = collections.Counter(ranks.values()).most_common(1)
    own: dict[str, Any] = {
        f"^{re.escape(dotted(name))}": rank for name, rank in ranks.items() if rank != r
    }
    return dataclasses.replace(
        read[0].config,
        r=r,
        lora_alpha=r,
        use_rslora=False,
        rank_pattern=own,
        alpha_pattern=own,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        layers_to_transform=layers,
    )
