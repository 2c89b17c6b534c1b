r"""Time one LoRA or QLoRA training step on random weights: by default SmolLM2-135M, 4 x 256 tokens.

    python benchmarks/step.py --batch 4 --length 256 --rank 16
    python benchmarks/step.py --shape llama2-7b --method qlora --double-quant --dtype bfloat16 \
        --scan-layers --remat --batch 8 --length 1024
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.32 python benchmarks/step.py --shape llama2-70b ...  # of a GPU

Prints JSON: seconds of each step after the first, when the first was done, FLOPs of the compiled
step, and peak memory, of the device too where it tells. Other work on the machine can double such
times: compare medians of alternating runs, never two lone ones. step_vs.py does that.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax
import numpy as np
from record import peak_rss_bytes, versions
from shapes import SHAPES, abstract_model, random_leaves

import jlora
from jlora import canonical, cli, optim
from jlora.config import OptimConfig
from jlora.data.batching import Batch
from jlora.models.load import compute_dtype
from jlora.train.step import init_state, make_train_step


def main() -> None:
    """Parse flags, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--trained", type=int, default=None, help="trained tokens a row; all")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=None, help="fewer than the model's")
    parser.add_argument("--method", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--kind", choices=["nf4", "fp4", "int8"], default="nf4")
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--targets", nargs="*", default=None, help="modules; all linear ones")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--scan-layers", action="store_true")
    parser.add_argument("--remat", action="store_true")
    args = parser.parse_args()

    cli.use_compilation_cache()  # as every command does
    config = SHAPES[args.shape]
    if args.layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=args.layers)
    quant = None
    if args.method == "qlora":
        quant = jlora.QuantConfig(kind=args.kind, double_quant=args.double_quant)
    lora = jlora.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=args.targets or "all-linear"
    )
    options = {"dtype": compute_dtype(args.dtype), "scan_layers": args.scan_layers}
    model = abstract_model(config, lora, quant=quant, remat=args.remat, **options)
    trained, base = (random_leaves(tree, i) for i, tree in enumerate(jlora.partition(model)))
    tx = optim.adamw(OptimConfig(lr=1e-4, warmup_steps=0), steps=1000)
    lists = canonical.layer_lists(trained)
    state = init_state(canonical.restack(trained, lists), tx, jax.random.key(0))
    shape = (args.batch, args.length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
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
    memory = jax.devices()[0].memory_stats() or {}  # none on a CPU
    median = statistics.median(seconds[1:])
    result = {
        **vars(args),
        "dtype": str(options["dtype"]),
        "base_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(base)),
        "tokens_per_second": args.batch * args.length / median,
        "trainable_params": sum(leaf.size for leaf in trained.values()),
        "loss": float(metrics.loss),
        "seconds_per_step": seconds[1:],
        "first_step_at": first_step_at,
        "flops_per_step": cost.get("flops"),
        "peak_rss_bytes": peak_rss_bytes(),
        "device_peak_bytes": memory.get("peak_bytes_in_use"),
        "device_limit_bytes": memory.get("bytes_limit"),
        "device": jax.devices()[0].device_kind,
        "versions": versions(["jax", "jaxlib", "flax", "optax", "numpy"]),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
