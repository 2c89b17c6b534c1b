"""One optimiser step over the trained tree alone; the base goes in and never comes out."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jlora import canonical, injection
from jlora.data.batching import Batch
from jlora.train.loss import cross_entropy


class TrainState(NamedTuple):
    """What a step changes."""

    step: Array
    """int32 (), steps done."""
    trained: dict[str, Array]
    """Path -> leaf, in the model's shape, or with the layers of its lists stacked."""
    opt_state: optax.OptState
    rng: Array
    """uint32 key data: with the step, what dropout is drawn from."""


class Metrics(NamedTuple):
    """Of one step; arrays on the device."""

    loss: Array
    """Mean over the batch's trained tokens, nats."""
    grad_norm: Array
    """Global norm before clipping."""


def batch_loss(model: Any, batch: Batch) -> tuple[Array, Array]:
    """(summed loss in nats, number of trained tokens) of one batch: float32 (), int32 ()."""
    hidden = model.hidden(batch.tokens, batch.mask)[:, :-1]
    targets, mask = batch.tokens[:, 1:], batch.targets[:, 1:]
    loss = cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        model.head_weight(),
        targets.reshape(-1),
        mask.reshape(-1),
    )
    return loss, mask.sum()


def make_train_step(
    tx: optax.GradientTransformation, lists: Mapping[str, int] | None = None
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """A compiled (state, base, batch) -> (state, metrics); the given state is consumed.

    Dropout's keys follow from the state's key and step, so that a resumed run draws them again.

    Args:
        tx: the optimiser of `state.trained`.
        lists: those of `canonical.layer_lists` whose layers are stacked in `state.trained`: the
            optimiser then runs a few large kernels in place of a few for each small leaf, and the
            step compiles, loads and runs faster.
    """
    lists = lists or {}

    def loss_fn(trained: dict[str, Array], base: Any, batch: Batch, key: Array) -> Array:
        model = injection.combine(trained, base)
        injection.train_mode(model, key)
        loss, tokens = batch_loss(model, batch)
        return loss / tokens.astype(jnp.float32)

    def step(state: TrainState, base: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        leaves = canonical.unstack(state.trained, lists)
        loss, grads = jax.value_and_grad(loss_fn)(leaves, base, batch, key)
        grads = canonical.restack(grads, lists)
        updates, opt_state = tx.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        state = TrainState(state.step + 1, trained, opt_state, state.rng)
        return state, Metrics(loss, optax.tree.norm(grads))

    return jax.jit(step, donate_argnums=0)


@jax.jit
def eval_step(trained: dict[str, Array], base: Any, batch: Batch) -> tuple[Array, Array]:
    """`batch_loss` without dropout."""
    model = injection.combine(trained, base)
    injection.eval_mode(model)
    return batch_loss(model, batch)


def init_state(trained: dict[str, Any], tx: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first step, which consumes the arrays of `trained`."""
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, trained, tx.init(trained), jax.random.key_data(key))
