r"""How much host memory it takes to load a model quantised to NF4, and to train on it.

    python benchmarks/host_memory.py --model models/smollm2
    python benchmarks/host_memory.py --synthetic llama2-7b --train

The first loads a model in both layouts of its layers, to float32 and to bfloat16. The second writes
random bfloat16 weights of a known shape below build/ (Llama-2-7B: 13.5 GB), loads them, takes one
QLoRA step if told to, and removes them. Each case is a process of its own.

What counts is the most that was resident, as Linux's kernel knows it: no sample misses a short
peak. Pages of mapped files are part of it, so that anonymous memory is never more. It is taken
above what was resident when one small tensor had been quantised. The exit status is 1 where a case
breaks a limit; these are in the result.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import record
from flax import nnx
from safetensors.numpy import save_file
from shapes import SHAPES

import jlora
from jlora import optim
from jlora.config import OptimConfig
from jlora.data.batching import Batch
from jlora.models import families, load
from jlora.models.tensors import Tensors
from jlora.quant.quantize import quantize_rows
from jlora.train.step import init_state, make_train_step

SLACK = 1.3
"""Times the quantised model and its two largest tensors as they lie on disk."""
RESIDENT = {"llama2-7b": 8e9}
"""The whole process, while it loads a model of this shape."""
MACHINE = 24e9
"""The whole process, while it trains."""
SHARD = 2e9


def main() -> None:
    """Run the cases, check them, write the result and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="a Hugging Face directory")
    source.add_argument("--synthetic", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=None, help="fewer than the shape has")
    parser.add_argument("--train", action="store_true", help="take a step of QLoRA too")
    parser.add_argument("--length", type=int, default=128, help="tokens of the step")
    one = parser.add_argument_group("one case in this process, printed and not written")
    one.add_argument("--dtype", choices=["float32", "bfloat16"], default=None)
    one.add_argument("--scan-layers", action="store_true")
    one.add_argument("--warm-up", type=Path, help="a model that is loaded before")
    args = parser.parse_args()

    if args.model and args.dtype:
        print(json.dumps(case(args), indent=2))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the weights are removed
    if args.model:
        name = f"host_memory_{args.model.resolve().name}"
        cases = [
            run(args, args.model, dtype, scan)
            for dtype in ("float32", "bfloat16")
            for scan in (False, True)
        ]
    else:
        config = SHAPES[args.synthetic]
        if args.layers:
            config = dataclasses.replace(config, num_hidden_layers=args.layers)
        name = "_".join(["host_memory", args.synthetic, *([str(args.layers)] * bool(args.layers))])
        build = record.ROOT / "build"  # a directory for temporary files may be in memory
        build.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=build) as scratch:
            write_model(Path(scratch), config)
            cases = [run(args, Path(scratch), "float32", scan=True)]
    result = {"slack": SLACK, "cases": cases, "broken": [x for c in cases for x in broken(c, args)]}
    command = " ".join(["python", "benchmarks/host_memory.py", *sys.argv[1:]])
    print(json.dumps(result, indent=2))
    print(f"written to {record.write(name, command, result)}")
    sys.exit(1 if result["broken"] else 0)


def run(args: argparse.Namespace, model_dir: Path, dtype: str, scan: bool) -> dict[str, Any]:
    """One case's JSON, from a process of its own."""
    command = [sys.executable, __file__, f"--model={model_dir}", f"--dtype={dtype}"]
    command += ["--scan-layers"] * scan + ["--train"] * args.train + [f"--length={args.length}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return result


def broken(result: dict[str, Any], args: argparse.Namespace) -> Iterator[str]:
    """Which limits a case breaks."""
    if result["load"]["grown_bytes"] > result["limit_bytes"]:
        yield f"loading grew by {result['load']['grown_bytes']}, over {result['limit_bytes']}"
    resident = RESIDENT.get(args.synthetic, math.inf)
    if result["load"]["resident_bytes"] > resident:
        yield f"{result['load']['resident_bytes']} were resident while loading, over {resident}"
    if args.train and result["step"]["resident_bytes"] > MACHINE:
        yield f"{result['step']['resident_bytes']} were resident while training, over {MACHINE}"


def case(args: argparse.Namespace) -> dict[str, Any]:
    """Load, and train if told to: what of that was resident at most."""
    options = {"dtype": jnp.dtype(args.dtype), "scan_layers": args.scan_layers}
    options |= {"remat": args.train, "quant": jlora.QuantConfig()}
    jax.device_put(quantize_rows(np.ones((64, 128), np.float32)))
    if args.warm_up:
        jlora.load(args.warm_up, **options)
    tensors = Tensors(args.model)
    sizes = {
        name: (math.prod(shape), jnp.dtype(tensors.dtype(name)).itemsize)
        for name, shape in tensors.shapes().items()
        if shape is not None
    }
    largest = sorted(math.prod(size) for size in sizes.values())[-2:]
    model, loading = peak(lambda: jlora.load(args.model, **options))
    quantised = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    parameters = sum(count for count, _ in sizes.values())
    result = {
        "dtype": args.dtype,
        "scan_layers": args.scan_layers,
        "parameters": parameters,
        "on_disk_bytes": sum(math.prod(size) for size in sizes.values()),
        "quantised_bytes": quantised,
        "two_largest_tensors_bytes": sum(largest),
        "limit_bytes": round(SLACK * (quantised + sum(largest))),
        "load": loading,
        "parameters_per_second": parameters / loading["seconds"],
        "versions": record.versions(["jax", "jaxlib", "flax", "numpy", "safetensors"]),
    }
    if args.train:
        metrics, stepping = peak(lambda: step(model, args.length))
        result["step"] = metrics | stepping
    return result


def step(model: nnx.Module, length: int) -> dict[str, Any]:
    """One step on a row of random tokens, rank 16 on all linear layers."""
    lora = jlora.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    trained, base = jlora.partition(jlora.inject(model, lora, rngs=nnx.Rngs(0)))
    tx = optim.adamw(OptimConfig(lr=1e-4, warmup_steps=0), steps=1000)
    state = init_state(trained, tx, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length), np.int32)
    true = np.ones(tokens.shape, bool)
    batch = Batch(tokens=tokens, mask=true, targets=true, rows=np.zeros(1, np.int32))
    compiled = make_train_step(tx).lower(state, base, batch).compile()
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(compiled(state, base, batch))
    return {
        "rank": 16,
        "length": length,
        "remat": True,
        "trainable_params": sum(leaf.size for leaf in state.trained.values()),
        "loss": float(metrics.loss),
        "grad_norm": float(metrics.grad_norm),
        "step_seconds": time.perf_counter() - start,
    }


def peak(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns; its seconds, the most bytes resident, and by how much these grew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory freed before would be used again unseen
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM is VmRSS again
    before, start = resident("VmHWM"), time.perf_counter()
    result = jax.block_until_ready(work())
    seconds, most = time.perf_counter() - start, resident("VmHWM")
    about = {"seconds": seconds, "resident_bytes": most, "grown_bytes": most - before}
    return result, about | {"anonymous_bytes_after": resident("RssAnon")}


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def write_model(to: Path, config: Any) -> None:
    """Random bfloat16 weights in shards with their index, and a config.json."""
    shape = {k: v for k, v in dataclasses.asdict(config).items() if k != "inv_freq"}
    about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | shape
    (to / "config.json").write_text(json.dumps(about), encoding="utf-8")
    leaves, _ = jlora.partition(load.abstract(to), everything=True)
    names = {path: families.hf_name(path) for path in leaves}
    size = 2 * sum(leaf.size for leaf in leaves.values())
    free = shutil.disk_usage(to).free
    print(f"writing {size / 1e9:.1f} GB of weights to {to}, where {free / 1e9:.0f} GB are free")
    if free < size + SHARD:
        raise SystemExit(f"{to} has too little space: {free / 1e9:.1f} GB")
    noise = np.random.default_rng(0).standard_normal(10_000_019, np.float32) * np.float32(0.02)
    noise = noise.astype(ml_dtypes.bfloat16)
    shard: dict[str, np.ndarray] = {}
    of: dict[str, str] = {}
    for path, leaf in leaves.items():
        name, transposed = names[path]
        tensor = np.resize(noise, leaf.shape[::-1] if transposed else leaf.shape)
        shard[name] = np.ones_like(tensor) if tensor.ndim == 1 else tensor
        last = len(of) + len(shard) == len(leaves)
        if last or sum(x.nbytes for x in shard.values()) > SHARD:
            file = f"model-{len(set(of.values())):05}.safetensors"
            save_file(shard, to / file)
            of |= dict.fromkeys(shard, file)
            shard = {}
    index = json.dumps({"weight_map": of})
    (to / "model.safetensors.index.json").write_text(index, encoding="utf-8")


if __name__ == "__main__":
    main()
