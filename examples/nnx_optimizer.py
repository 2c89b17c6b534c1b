"""LoRA on an NNX model of one's own, in one's own loop with nnx.Optimizer.

A small convolutional network learns to tell in which of four directions a grating runs. Then
low-rank factors, and nothing else, learn to tell how wide its bars are.

    python examples/nnx_optimizer.py
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jlora

SIZE, CLASSES, BATCH = 16, 4, 64


class Classifier(nnx.Module):
    """Images to the logits of four classes."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (5, 5), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(32 * (SIZE // 4) ** 2, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(64, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """(B, 16, 16, 1) -> (B, 4)."""
        x = nnx.gelu(self.conv2(nnx.gelu(self.conv1(images))))
        x = nnx.gelu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.head(self.dropout(x))


def batch(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Noisy gratings, their directions and the widths of their bars."""
    keys = jax.random.split(key, 4)
    directions = jax.random.randint(keys[0], (BATCH,), 0, CLASSES)
    widths = jax.random.randint(keys[1], (BATCH,), 0, CLASSES)
    angle = directions * jnp.pi / CLASSES
    pixels = jnp.arange(SIZE)
    along = jnp.cos(angle)[:, None, None] * pixels[:, None] + (
        jnp.sin(angle)[:, None, None] * pixels
    )
    phase = jax.random.uniform(keys[2], (BATCH, 1, 1), maxval=2 * jnp.pi)
    waves = jnp.sin(along * 2 * jnp.pi / (widths + 3)[:, None, None] + phase)
    return (waves + 0.3 * jax.random.normal(keys[3], waves.shape))[..., None], directions, widths


def cross_entropy(model: Classifier, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def train(model: Classifier, optimizer: nnx.Optimizer, task: str, steps: int) -> list[float]:
    """The user's own loop; returns the loss of each step."""

    @nnx.jit
    def step(model: Classifier, optimizer: nnx.Optimizer, key: jax.Array) -> jax.Array:
        images, directions, widths = batch(key)
        labels = directions if task == "directions" else widths
        wrt = nnx.DiffState(0, optimizer.wrt)
        loss, grads = nnx.value_and_grad(cross_entropy, argnums=wrt)(model, images, labels)
        optimizer.update(model, grads)
        return loss

    model.train()  # dropout on: the model's own, and the adapters'
    losses = [step(model, optimizer, jax.random.key(i)) for i in range(steps)]
    model.eval()
    return [float(loss) for loss in losses]


def main() -> None:
    """Pretrain, inject, train, save, load on a fresh base, merge, eject."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--pretrain-steps", type=int, default=100)
    flags.add_argument("--steps", type=int, default=300)
    args = flags.parse_args()

    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(2e-3), wrt=nnx.Param)
    losses = train(model, optimizer, "directions", args.pretrain_steps)
    print(f"pretraining: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    pretrained = nnx.clone(model)

    config = jlora.LoraConfig(
        r=4, lora_alpha=8, target_modules=["conv1", "conv2", "hidden", "head"], lora_dropout=0.05
    )
    print(jlora.plan_targets(model, config))
    model = jlora.inject(model, config, rngs=nnx.Rngs(1))
    print(jlora.summary(model))
    optimizer = nnx.Optimizer(model, optax.adamw(4e-3), wrt=nnx.LoRAParam)
    losses = train(model, optimizer, "widths", args.steps)
    print(f"adaptation: loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    images, _, widths = batch(jax.random.key(2**31))
    adapted = nnx.jit(Classifier.__call__)(model, images)
    with tempfile.TemporaryDirectory() as directory:
        jlora.save_adapter(Path(directory, "adapter"), model, config)
        loaded = jlora.load_adapter(Path(directory, "adapter"), nnx.clone(pretrained))
    same = np.array_equal(nnx.jit(Classifier.__call__)(loaded, images), adapted)
    print(f"loaded on a fresh base, the same output: {same}")

    merged = jlora.merge(model)  # a new model; this one stays
    difference = jnp.abs(merged(images) - adapted).max()
    print(f"merged and adapted differ by at most {difference:.1e}")
    print(f"right widths: {jnp.mean(merged(images).argmax(-1) == widths):.1%}")

    jlora.eject(model)
    before, after = (jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (pretrained, model))
    unchanged = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    print(f"base unchanged: {unchanged}")


if __name__ == "__main__":
    main()
