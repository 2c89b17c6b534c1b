"""An adapter on disk, whichever form it has: a run, an Orbax checkpoint, or a PEFT directory."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jlora import canonical, checkpoint, fingerprint, injection, paths, peft
from jlora.checkpoint import StoredAdapter
from jlora.errors import JloraError
from jlora.files import read_template_of
from jlora.fingerprint import Fingerprint
from jlora.norms import delta_norms, distance
from jlora.places import place, reaching, url_of
from jlora.quant import checks
from jlora.quant.array import QuantArray
from jlora.targets import Plan
from jlora.updates import others

_log = logging.getLogger("jlora")


def load_adapter(
    path: str | Path | StoredAdapter,
    model: Any,
    *,
    params: Any = None,
    force: bool = False,
    allow_zero: bool = False,
) -> Any:
    """Put the adapter at `path` on `model`, in place, with every factor accounted for.

    The norm of what it adds to the weights is logged, by the logger "jlora" at INFO.

    Args:
        path: a run of `jlora train`, what `save_adapter` wrote (there or in a bucket, gs:// or
            s3://), or a PEFT directory; or what `combine_adapters` returned.
        model: the base model, or one that was injected alike; of Linen, the injected module, for
            what was saved of one.
        params: the Linen module's tree of parameters.
        force: load it though it was trained on another base, with a warning.
        allow_zero: load it though it changes nothing, as before training.

    Returns:
        The same model, or a new tree. On a base model, dropout is off until model.train().

    Raises:
        JloraError: nothing readable at `path`; factors that the model has no place for, places
            without a factor, shapes that differ (all at once); a base that is not the one that it
            was trained on, by class, shapes or values; an adapter that changes nothing. The model
            is then as it was.
    """
    return apply(read(path), model, params, force=force, allow_zero=allow_zero)


def import_peft(
    path: str | Path,
    model: Any,
    *,
    params: Any = None,
    force: bool = False,
    allow_zero: bool = False,
) -> Any:
    """`load_adapter` for a PEFT directory only, or one with a single adapter in a subdirectory."""
    return apply(peft.read_peft(path), model, params, force=force, allow_zero=allow_zero)


def read(path: str | Path | StoredAdapter) -> StoredAdapter:
    """Read an adapter of any form; one that has been read is returned as it is.

    Raises:
        JloraError: nothing readable at `path`.
    """
    if isinstance(path, StoredAdapter):
        return path
    if url_of(path) is None:
        return _read(Path(path))
    with reaching(path):
        return _read(place(path))


def _read(path: Any) -> StoredAdapter:
    if not path.exists():
        raise JloraError(f"{path} does not exist; give a run, an Orbax adapter or a PEFT directory")
    if checkpoint.is_adapter(path):
        return checkpoint.read_adapter(path)
    for own in (path, path / "adapter"):  # that of a finished run
        if isinstance(own, Path) and (own / peft.CONFIG_FILE).is_file():
            return peft.read_peft(own)
    if (path / "model" / "config.json").is_file():
        raise JloraError(f"{path} trained all weights and has no adapter: use --model {path}/model")
    if _checkpoints(path):  # a run that goes on, or was stopped
        return read_newest_checkpoint(path)
    if (found := peft.locate(path)) is not None:
        return peft.read_peft(found)
    raise JloraError(
        f"{path} holds no adapter; expected a run (adapter/ or checkpoints/), an adapter "
        f"checkpoint (adapters/ and meta/) or a PEFT directory ({peft.CONFIG_FILE})"
    )


def read_newest_checkpoint(run: Path) -> StoredAdapter:
    """Read the adapter in the newest checkpoint of a run.

    Raises:
        JloraError: there is none.
    """
    steps = _checkpoints(run)
    if not steps:
        raise JloraError(f"{run} holds no checkpoint of a run of jlora train")
    stored = checkpoint.read_adapter(max(steps, key=lambda step: int(step.name)))
    return dataclasses.replace(stored, chat_template=read_template_of(run))


def _checkpoints(run: Any) -> list[Any]:
    steps = run.glob("checkpoints/*")
    return [step for step in steps if step.name.isdigit() and checkpoint.is_adapter(step)]


def apply(
    stored: StoredAdapter,
    model: Any,
    params: Any = None,
    *,
    force: bool = False,
    allow_zero: bool = False,
) -> Any:
    """Put what was read on `model`; see `load_adapter`."""
    if isinstance(model, Mapping):
        raise JloraError(
            "a tree of parameters goes with its module: (path, module, ..., params=tree)"
        )
    trained, base = injection.partition(model if params is None else params)
    check_base(stored, fingerprint.of(model, params), force=force)
    leaves = injection.base_leaves(model if params is None else params)
    if params is not None:
        stored = peft.fit(stored, model, params, force=force)
        paths.check_same(
            {path: leaf.shape for path, leaf in injection.unboxed(trained).items()},
            {path: tuple(leaf.shape) for path, leaf in stored.factors.items()},
            what=f"the adapter in {stored.where}",
            remedy="load it into the tree that init of the injected module returns",
        )
        if differs := injection.difference(model, params, stored.config):
            raise JloraError(
                f"the adapter in {stored.where} is not of a module injected like this one: "
                f"{differs}; inject with the configuration that it was saved with"
            )
        report(stored, norms(stored, leaves), allow_zero=allow_zero)
        return injection.combine(injection.boxed_like(trained, stored.factors), base)
    stored, plan = fitted(stored, model, force=force)
    stacks = injection.stacks(model)
    if trained and not _injected_alike(model, trained, plan):
        raise JloraError(
            "the model was injected with other targets, ranks or scaling than the adapter in "
            f"{stored.where} has; load it on a fresh model, or jlora.eject(model) first"
        )
    whole = {path: leaves[path] for path in plan.whole}
    checks.whole([path for path, leaf in whole.items() if isinstance(leaf, QuantArray)])
    report(stored, norms(stored, canonical.unstack(whole, stacks)), allow_zero=allow_zero)
    if not trained:
        injection.inject(model, stored.config, rngs=jax.random.key(0), training=False)
    injection.update(model, canonical.restack(stored.factors, stacks, plan.ranks))
    return model


def fitted(
    stored: StoredAdapter, model: Any, *, weights: peft.Weights | None = None, force: bool = False
) -> tuple[StoredAdapter, Plan]:
    """What was read as an NNX model (abstract or not) has it, and the plan that it follows.

    `weights` and `force` are those of `peft.fit`.

    Raises:
        JloraError: it does not fit the model; all differences at once.
    """
    stored = peft.fit(stored, model, weights=weights, force=force)
    try:
        plan = injection.plan(model, stored.config)
    except JloraError as error:
        raise JloraError(f"the adapter in {stored.where} is not for this model: {error}") from None
    stacks = injection.stacks(model)
    stored = _refactored(stored, plan.layer_shapes(stacks))
    checkpoint.check_fits(stored, plan, stacks)
    return stored, plan


def _refactored(stored: StoredAdapter, shapes: Mapping[str, tuple[int, ...]]) -> StoredAdapter:
    """With the axes of factored weights, which a combination of PEFT directories has as one."""
    factors = {}
    for path, leaf in stored.factors.items():
        shape = shapes.get(path, leaf.shape)
        flat = len(shape) > 1 and leaf.shape == (shape[0], math.prod(shape[1:]))
        factors[path] = leaf.reshape(shape) if flat else leaf
    return dataclasses.replace(stored, factors=factors)


def check_base(stored: StoredAdapter, now: Fingerprint, *, force: bool = False) -> None:
    """Demand that the adapter was trained on this base; with `force`, warn where it was not.

    Raises:
        JloraError: it was trained on another; the message says what differs.
    """
    if not (differs := fingerprint.check(stored.base, now, stored.where)):
        return
    if not force:
        remedy = "give that base; force=True (--force) uses the adapter on this one all the same"
        raise JloraError("\n".join([*differs, remedy]))
    _log.warning("%s", "\n".join(differs))


def norms(stored: StoredAdapter, base: Mapping[str, Any]) -> dict[str, float]:
    """Canonical path of each module and leaf that the adapter changes -> norm of the change.

    Args:
        stored: fits a model.
        base: canonical path -> the base's value of each leaf that is trained as a whole; of a
            Linen tree, where what is added is what is stored, nothing.
    """
    found = delta_norms(stored)
    for path, value in others(stored).items():
        found[path] = distance(value, base.get(path))
    return found


def report(stored: StoredAdapter, found: Mapping[str, float], *, allow_zero: bool = False) -> None:
    """Log the norm of what an adapter changes, as `norms` found it.

    Raises:
        JloraError: it changes nothing.
    """
    total = math.hypot(*found.values())
    if total == 0 and not allow_zero:
        raise JloraError(
            f"the adapter in {stored.where} changes nothing: its norm is 0 in all of "
            f"{len(found)} weights. Was it saved before training? allow_zero=True (--force) loads "
            "it all the same"
        )
    _log.info("adapter %s: %d weights, |ΔW| = %.4g", stored.where, len(found), total)


def _injected_alike(model: Any, trained: Mapping[str, Any], plan: Plan) -> bool:
    """Whether `model` holds the leaves of `plan`, with their shapes and scaling."""
    return {path: leaf.shape for path, leaf in trained.items()} == plan.shapes and (
        injection.scalings(model) == {t.site.path: t.scaling for t in plan.targets}
    )
