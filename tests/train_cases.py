"""Share among the tests of whole runs a tiny configuration, and how a run is cut short."""

import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jlora.config import EvalConfig, LoaderConfig, LoraConfig, OptimConfig, TrainConfig
from jlora.train import loop, measure

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2)
ROWS = 8


def configuration(model: Path, data: Path, output: Path, /, **changes: Any) -> TrainConfig:
    """Return that of a run of 8 steps on one file, with nothing evaluated."""
    values = {
        "model": model,
        "data": str(data / "train.jsonl"),
        "steps": 8,
        "checkpoint_every": 3,
        "lora": LORA,
        "optim": OPTIM,
        "loader": LoaderConfig(batch_size=ROWS, max_shapes=1),
        "eval": EvalConfig(samples=0),
    }
    return TrainConfig(output=output, **(values | changes))


def quiet(settings: TrainConfig) -> dict[str, Any]:
    """Run without a word."""
    return loop.train(settings, say=lambda line: None)


def said_by(settings: TrainConfig) -> list[str]:
    """Run, and return what is said."""
    said: list[str] = []
    loop.train(settings, say=said.append)
    return said


def terminate() -> None:
    """End this process as a scheduler does that wants the machine back."""
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    """Fail as a machine that goes down."""
    raise RuntimeError("the power went out")


def interrupted(settings: TrainConfig, action: Any, step: int = 5) -> Path:
    """Run until `action` ends it in the middle of a step; return the run's directory."""
    calls = []

    def tick(self: measure.Clock, batch: Any) -> None:
        calls.append(batch)
        if len(calls) == step:
            action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.Clock, "tick", tick)
        with pytest.raises((loop.Stopped, RuntimeError)) as caught:
            quiet(settings)
    if action is terminate:
        assert caught.type is loop.Stopped
        assert caught.value.code == 143
    return settings.output


def steps_saved(output: Path) -> list[int]:
    """Return the steps that a run has checkpoints of."""
    return sorted(int(path.name) for path in (output / "checkpoints").iterdir())


def saved(output: Path, step: int, item: str) -> Any:
    """Return an item of a run's checkpoint, as it lies there."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(output / "checkpoints" / str(step) / item)


def same_bits(one: Any, two: Any) -> bool:
    """Return whether two trees, of more than three leaves, are the same bits."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    equal = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), one, two)
    return len(jax.tree.leaves(one)) > 3 and all(jax.tree.leaves(equal))
