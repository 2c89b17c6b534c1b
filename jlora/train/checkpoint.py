"""The checkpoints of a run: what it needs to go on as if it had never stopped, never the base.

Beside `adapters` and `meta` (see jlora.checkpoint) each step has `state`: optimiser, step and
random key. All are in canonical form, so that a run may go on stacked or unrolled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jlora import canonical, checkpoint
from jlora.train.step import TrainState


class RunCheckpoints:
    """Asynchronous checkpoints of one run, in `directory`.

    Args:
        directory: made where it does not exist.
        stacks: path of each stacked module of the model -> number of its layers.
        keep: newest checkpoints that are kept.
        ranks: path of each padded factor -> its layers' own ranks.
    """

    def __init__(
        self,
        directory: Path,
        stacks: Mapping[str, int],
        keep: int,
        ranks: canonical.Ranks | None = None,
    ):
        self.directory, self.stacks, self.ranks = directory.absolute(), dict(stacks), ranks
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("adapters", "state", "meta")
        )

    def latest_step(self) -> int | None:
        """Steps done at the newest complete checkpoint; None where there is none."""
        return self.manager.latest_step()

    def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Begin to save `state`; returns once its arrays are copied, for a step to consume."""
        saved = jax.tree.map(jnp.copy, self._canonical(state, state.trained))
        self.manager.save(
            int(state.step),
            args=ocp.args.Composite(
                adapters=ocp.args.StandardSave(saved.trained),
                state=ocp.args.StandardSave(_rest(saved)),
                meta=ocp.args.JsonSave(dict(meta)),
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, in the shape of `like`, and its meta.

        Raises:
            JloraError: a checkpoint of another schema version, or one that cannot be read.
        """
        step = self.manager.latest_step()
        path = self.directory / str(step)
        abstract = jax.eval_shape(lambda s: self._canonical(s, like.trained), like)
        items = {
            "adapters": checkpoint.restore_here(abstract.trained),
            "state": checkpoint.restore_here(_rest(abstract)),
        }
        with checkpoint.damage_named(path):
            only_meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
            meta = self.manager.restore(step, args=only_meta).meta
            checkpoint.check_schema(meta, path)
            read = self.manager.restore(step, args=ocp.args.Composite(**items))
        saved = TrainState(trained=read.adapters, **read.state)
        state = self._map(saved, abstract.trained, self._restack)
        return state, meta

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()

    def _canonical(self, state: TrainState, trained: Mapping[str, Any]) -> TrainState:
        return self._map(state, trained, self._unstack)

    def _unstack(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        return canonical.unstack(tree, self.stacks, self.ranks)

    def _restack(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        return canonical.restack(tree, self.stacks, self.ranks)

    @staticmethod
    def _map(state: TrainState, trained: Mapping[str, Any], change: Any) -> TrainState:
        """Apply `change` to every tree shaped like the trained one: AdamW holds two more."""

        def like_trained(tree: Any) -> bool:
            return isinstance(tree, dict) and tree.keys() == trained.keys()

        return jax.tree.map(
            lambda tree: change(tree) if like_trained(tree) else tree, state, is_leaf=like_trained
        )


def _rest(state: TrainState) -> dict[str, Any]:
    return {name: value for name, value in state._asdict().items() if name != "trained"}
