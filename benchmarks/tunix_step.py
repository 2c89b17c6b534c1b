"""A counterpart of step.py: one QLoRA training step in google-tunix and qwix, on random weights.

    .venv-foreign/bin/python benchmarks/tunix_step.py --batch 4 --length 256 --rank 16

Prints the JSON that step_vs.py reads of all sides: SmolLM2-135M's shape, computed in float32, NF4
in tiles of 64 as bitsandbytes has them.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx
from record import peak_rss_bytes, versions
from tunix.models.llama3.model import Llama3, ModelConfig

SMOLLM2_135M = {
    "num_layers": 30,
    "vocab_size": 49152,
    "embed_dim": 576,
    "hidden_dim": 1536,
    "num_heads": 9,
    "head_dim": 64,
    "num_kv_heads": 3,
    "rope_theta": 100000,
    "norm_eps": 1e-5,
    "weight_tying": True,
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Parse flags, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()

    model = Llama3(ModelConfig(**SMOLLM2_135M), rngs=nnx.Rngs(0))
    provider = qwix.LoraProvider(
        module_path="|".join(f".*{name}" for name in LINEAR),
        rank=args.rank,
        alpha=2.0 * args.rank,
        weight_qtype="nf4",
        tile_size=64,
    )
    inputs = model.get_model_input()
    model = qwix.apply_lora_to_model(model, provider, **inputs, rngs=nnx.Rngs(1))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))  # as our step does
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    shape = (args.batch, args.length)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, SMOLLM2_135M["vocab_size"])
    positions = jnp.broadcast_to(jnp.arange(args.length), shape)
    causal = jnp.tril(jnp.ones((args.length,) * 2, bool))
    mask = jnp.broadcast_to(causal, (args.batch, *causal.shape))

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
        def loss_fn(model: nnx.Module) -> jax.Array:
            logits = model(tokens, positions, None, mask)[0][:, :-1].astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        state = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(loss_fn, argnums=state)(model)
        optimizer.update(model, grads)
        return loss

    seconds = []
    for i in range(args.steps + 1):
        start = time.perf_counter()
        loss = float(step(model, optimizer, tokens))
        seconds.append(time.perf_counter() - start)
        if i == 0:
            first_step_at = time.time()
    trained = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    result = {
        "trainable_params": sum(leaf.size for leaf in trained),
        "loss": loss,
        "seconds_per_step": seconds[1:],
        "first_step_at": first_step_at,
        "peak_rss_bytes": peak_rss_bytes(),
        "versions": versions(["google-tunix", "qwix", "jax", "jaxlib", "flax", "optax"]),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
