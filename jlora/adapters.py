"""An adapter on disk, whichever form it has: a run, an Orbax checkpoint, or a PEFT directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jlora import canonical, checkpoint, injection, paths, peft
from jlora.checkpoint import StoredAdapter
from jlora.errors import JloraError
from jlora.targets import Plan


def load_adapter(path: str | Path, model: Any, *, params: Any = None) -> Any:
    """Put the adapter at `path` on `model`, in place, with every factor accounted for.

    Args:
        path: a run of `jlora train`, what `save_adapter` wrote, or a PEFT directory.
        model: the base model, or one that was injected alike; of Linen, the injected module, for
            what was saved of one.
        params: the Linen module's tree of parameters.

    Returns:
        The same model, or a new tree. On a base model, dropout is off until model.train().

    Raises:
        JloraError: nothing readable at `path`; factors that the model has no place for, places
            without a factor, shapes that differ (all at once); copies of base weights that are not
            the model's. The model is then as it was.
    """
    return apply(read(path), model, params)


def import_peft(path: str | Path, model: Any, *, params: Any = None) -> Any:
    """`load_adapter` for a PEFT directory only, or one with a single adapter in a subdirectory."""
    return apply(peft.read_peft(path), model, params)


def read(path: str | Path) -> StoredAdapter:
    """Read an adapter of any form.

    Raises:
        JloraError: nothing readable at `path`.
    """
    path = Path(path)
    if checkpoint.is_adapter(path):
        return checkpoint.read_adapter(path)
    if (found := peft.locate(path)) is not None:  # of a finished run, that in its adapter/
        return peft.read_peft(found)
    if (path / "model" / "config.json").is_file():
        raise JloraError(f"{path} trained all weights and has no adapter: use --model {path}/model")
    if _checkpoints(path):  # a run that goes on, or was stopped
        return read_newest_checkpoint(path)
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
    return checkpoint.read_adapter(max(steps, key=lambda step: int(step.name)))


def _checkpoints(run: Path) -> list[Path]:
    steps = run.glob("checkpoints/*")
    return [step for step in steps if step.name.isdigit() and checkpoint.is_adapter(step)]


def apply(stored: StoredAdapter, model: Any, params: Any = None) -> Any:
    """Put what was read on `model`; see `load_adapter`."""
    if isinstance(model, Mapping):
        raise JloraError(
            "a tree of parameters goes with its module: (path, module, ..., params=tree)"
        )
    trained, base = injection.partition(model if params is None else params)
    stored = peft.fit(stored, model, params)
    if params is not None:
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
        return injection.combine(injection.boxed_like(trained, stored.factors), base)
    try:
        plan = injection.plan(model, stored.config)
    except JloraError as error:
        raise JloraError(f"the adapter in {stored.where} is not for this model: {error}") from None
    stacks = injection.stacks(model)
    checkpoint.check_fits(stored, plan, stacks)
    if not trained:
        injection.inject(model, stored.config, rngs=jax.random.key(0), training=False)
    elif not _injected_alike(model, trained, plan):
        raise JloraError(
            "the model was injected with other targets, ranks or scaling than the adapter in "
            f"{stored.where} has; load it on a fresh model, or jlora.eject(model) first"
        )
    injection.update(model, canonical.restack(stored.factors, stacks, plan.ranks))
    return model


def _injected_alike(model: Any, trained: Mapping[str, Any], plan: Plan) -> bool:
    """Whether `model` holds the leaves of `plan`, with their shapes and scaling."""
    return {path: leaf.shape for path, leaf in trained.items()} == plan.shapes and (
        injection.scalings(model) == {t.site.path: t.scaling for t in plan.targets}
    )
