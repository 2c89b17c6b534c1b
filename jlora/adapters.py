"""An adapter on disk, whichever form it has: a run, an Orbax checkpoint, or a PEFT directory."""

from pathlib import Path
from typing import Any

from flax import nnx

from jlora import adapter, checkpoint, config, injection, paths, peft
from jlora.checkpoint import StoredAdapter
from jlora.errors import JloraError


def load_adapter(path: str | Path, model: Any) -> config.LoraConfig:
    """Put the adapter at `path` on `model`, in place; every factor accounted for in both directions.

    Args:
        path: a run of `jlora train`, what `save_adapter` wrote, or a PEFT directory.
        model: the base model, or one that was injected alike.

    Returns:
        The adapter's configuration.

    Raises:
        JloraError: nothing readable at `path`; factors that the model has no place for, places
            without a factor, shapes that differ (all at once). The model is then as it was.
    """
    return apply(read(path), model)


def import_peft(path: str | Path, model: Any) -> config.LoraConfig:
    """`load_adapter` for a PEFT directory only."""
    return apply(peft.read_peft(path), model)


def read(path: str | Path) -> StoredAdapter:
    """Read an adapter of any form.

    Raises:
        JloraError: nothing readable at `path`.
    """
    path = Path(path)
    if checkpoint.is_adapter(path):
        return checkpoint.read_adapter(path)
    if (path / peft.CONFIG_FILE).is_file():
        return peft.read_peft(path)
    if (path / "adapter" / peft.CONFIG_FILE).is_file():  # a finished run
        return peft.read_peft(path / "adapter")
    steps = [p for p in path.glob("checkpoints/*") if p.name.isdigit() and checkpoint.is_adapter(p)]
    if steps:  # a run that goes on, or was stopped
        return checkpoint.read_adapter(max(steps, key=lambda p: int(p.name)))
    if (path / "model" / "config.json").is_file():
        raise JloraError(f"{path} trained all weights and has no adapter: use --model {path}/model")
    raise JloraError(
        f"{path} holds no adapter; expected a run (adapter/ or checkpoints/), an adapter "
        f"checkpoint (adapters/ and meta/) or a PEFT directory ({peft.CONFIG_FILE})"
    )


def apply(stored: StoredAdapter, model: Any) -> config.LoraConfig:
    """Put what was read on `model`; see `load_adapter`."""
    trained, _ = injection.partition(model)
    targets = injection.plan(model, stored.config)
    expected = {
        f"{name}/{factor}": shape[len(target.site.batch) :]
        for name, target in adapter.iter_names(targets)
        for factor, shape in target.shapes.items()
    }
    paths.check_same(
        expected,
        {name: tuple(factor.shape) for name, factor in stored.factors.items()},
        what=f"the adapter in {stored.where}",
        remedy="it was trained on another model, or its configuration was edited",
    )
    if not trained:
        injection.inject(model, stored.config, rngs=nnx.Rngs(0))
    elif set(trained) != {f"{t.site.path}/{factor}" for t in targets for factor in t.shapes}:
        raise JloraError(
            f"the model was injected with other targets than the adapter in {stored.where} has; "
            "load it on a fresh model, or jlora.eject(model) first"
        )
    injection.update(model, adapter.restack(stored.factors, injection.stacks(model)))
    return stored.config
