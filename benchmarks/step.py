"""Time one LoRA training step on random weights; shapes default to SmolLM2-135M at 4 x 256 tokens.

    python benchmarks/step.py --batch 4 --length 256 --rank 16

Prints JSON: seconds of each step after the first, when the first was done, FLOPs of the compiled
step, and peak memory. Other work on the machine can double such times: compare medians of
alternating runs, never two lone ones. step_vs_peft.py does that against PEFT.
"""

import argparse
import json
import time

import jax
import numpy as np
from flax import nnx
from record import peak_rss_bytes, versions

import jlora
from jlora import canonical, cli, optim
from jlora.config import OptimConfig
from jlora.data.batching import Batch
from jlora.models.transformer import CausalLM, ModelConfig
from jlora.train.step import init_state, make_train_step

SMOLLM2_135M = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    inv_freq=tuple(1e5 ** (-np.arange(0, 64, 2) / 64)),
    tie_word_embeddings=True,
)


def main() -> None:
    """Parse flags, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--trained", type=int, default=None, help="trained tokens a row; all")
    parser.add_argument("--scan-layers", action="store_true")
    args = parser.parse_args()

    cli.use_compilation_cache()  # as every command does
    model = CausalLM(SMOLLM2_135M, rngs=nnx.Rngs(0), scan_layers=args.scan_layers)
    jlora.inject(model, jlora.LoraConfig(r=args.rank, lora_alpha=2 * args.rank), rngs=nnx.Rngs(1))
    trained, base = jlora.partition(model)
    tx = optim.adamw(OptimConfig(lr=1e-4, warmup_steps=0), steps=1000)
    lists = canonical.layer_lists(trained)
    state = init_state(canonical.restack(trained, lists), tx, jax.random.key(0))
    shape = (args.batch, args.length)
    tokens = np.random.default_rng(0).integers(0, SMOLLM2_135M.vocab_size, shape, np.int32)
    targets = np.arange(args.length) >= args.length - (args.trained or args.length)
    batch = Batch(
        tokens=tokens,
        mask=np.ones(shape, bool),
        targets=np.broadcast_to(targets, shape),
        rows=np.arange(args.batch, dtype=np.int32),
    )
    step = make_train_step(tx, lists).lower(state, base, batch).compile()
    cost = step.cost_analysis() or {}
    seconds = []
    for i in range(args.steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, base, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
        if i == 0:
            first_step_at = time.time()
    result = {
        "batch": args.batch,
        "length": args.length,
        "rank": args.rank,
        "scan_layers": args.scan_layers,
        "trainable_params": sum(leaf.size for leaf in trained.values()),
        "loss": float(metrics.loss),
        "seconds_per_step": seconds[1:],
        "first_step_at": first_step_at,
        "flops_per_step": cost.get("flops"),
        "peak_rss_bytes": peak_rss_bytes(),
        "device": jax.devices()[0].device_kind,
        "versions": versions(["jax", "jaxlib", "flax", "optax", "numpy"]),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
