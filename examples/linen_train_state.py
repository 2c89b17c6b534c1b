"""LoRA on a Linen model of one's own, in one's own loop with TrainState.

A small transformer (layers scanned and rematerialised) learns to write ten digits backwards. Then
low-rank factors, and nothing else, learn to write them backwards with three added to each digit.

    python examples/linen_train_state.py
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict

import jlora

DIGITS, LENGTH, WIDTH, LAYERS, BATCH = 10, 10, 64, 2, 64


class Block(nn.Module):
    """Attention and MLP; the shape that nn.scan wants."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """(B, T, D) -> (B, T, D)."""
        attention = nn.MultiHeadDotProductAttention(num_heads=4, name="attention")
        x = x + attention(nn.LayerNorm()(x))
        h = nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(h)), None


class Transformer(nn.Module):
    """Digits to the logits of as many digits."""

    @nn.compact
    def __call__(self, digits: jax.Array) -> jax.Array:
        """(B, T) -> (B, T, 10)."""
        x = nn.Embed(DIGITS, WIDTH, name="embed")(digits)
        x = x + self.param("positions", nn.initializers.normal(1.0), (LENGTH, WIDTH))
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(DIGITS, name="lm_head")(nn.LayerNorm(name="norm")(x))


def batch(key: jax.Array, shift: int) -> tuple[jax.Array, jax.Array]:
    """Digits, and the same backwards with `shift` added to each, modulo ten."""
    digits = jax.random.randint(key, (BATCH, LENGTH), 0, DIGITS)
    return digits, (digits[:, ::-1] + shift) % DIGITS


def train(state: TrainState, shift: int, steps: int) -> tuple[TrainState, jax.Array]:
    """The user's own loop; also the loss of each step."""

    @jax.jit
    def step(state: TrainState, key: jax.Array) -> tuple[TrainState, jax.Array]:
        digits, answers = batch(key, shift)

        def loss_fn(params: Any) -> jax.Array:
            logits = state.apply_fn({"params": params}, digits)
            return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for i in range(steps):
        state, loss = step(state, jax.random.key(i))
        losses.append(loss)
    return state, jnp.stack(losses)


def main() -> None:
    """Pretrain, inject, train, merge, compare."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--pretrain-steps", type=int, default=200)
    flags.add_argument("--steps", type=int, default=200)
    args = flags.parse_args()

    model = Transformer()
    digits, answers = batch(jax.random.key(-1), shift=3)
    params = jax.jit(model.init)(jax.random.key(0), digits)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(3e-3))
    state, losses = train(state, shift=0, steps=args.pretrain_steps)
    pretrained = state.params
    print(f"pretraining: loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    config = jlora.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    print(jlora.plan_targets(model, config, digits))
    model_with_lora = jlora.inject(model, config)
    fresh = jax.jit(model_with_lora.init)(jax.random.key(1), digits)["params"]
    # Factors from init, all else as pretrained: the base's names are what they were.
    adapters, _ = jlora.partition(fresh)
    params = jlora.combine(adapters, pretrained)
    print(jlora.summary(params))

    tx = jlora.optimizer(optax.adamw(1e-2))
    state = TrainState.create(apply_fn=model_with_lora.apply, params=params, tx=tx)
    state, losses = train(state, shift=3, steps=args.steps)
    print(f"adaptation: loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    trained = flatten_dict(state.params)
    base = flatten_dict(pretrained)
    unchanged = all(np.array_equal(trained[path], leaf) for path, leaf in base.items())
    print(f"base unchanged: {unchanged}")

    merged = jlora.merge(model_with_lora, state.params)  # a tree for the model as it was
    adapted = model_with_lora.apply({"params": state.params}, digits)
    out = model.apply({"params": merged}, digits)
    print(f"merged and adapted differ by at most {jnp.abs(out - adapted).max():.1e}")
    print(f"right digits: {jnp.mean(out.argmax(-1) == answers):.1%}")


if __name__ == "__main__":
    main()
