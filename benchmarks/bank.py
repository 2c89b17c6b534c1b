"""Rows on 16 adapters of a bank against the same rows on one adapter; and switching between them.

    python benchmarks/bank.py

SmolLM2-135M's shape, random weights, float32. One side is the ordinary injected model, the other a
bank of 16 adapters of its rank, of which each of 16 rows uses its own. Both read 16 x 128 tokens,
and then decode a number of tokens a row; rounds alternate their order, and what counts is the ratio
of a round's two times. Each row's logits are compared with those of its adapter alone.

Switching is timed on the host (`set_active` and `partition`) in a bank of adapters of ranks 4 to
64, each of which is then run, and programs that are compiled meanwhile are counted.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from typing import Any

import jax
import numpy as np
import record
from shapes import SHAPES, abstract_model, random_leaves
from step_vs import spread

import jlora
from jlora.generation import Sampling, decode, prefill, stop_array


def main() -> None:
    """Run both parts, write the result, print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16, help="after the first")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--scan-layers", action="store_true")
    parser.add_argument("--no-write", action="store_true", help="print the result only")
    args = parser.parse_args()

    result: dict[str, Any] = {"settings": vars(args)}
    for rank in args.ranks:
        result[f"rank {rank}"] = by_row(args, rank)
        print(f"rank {rank}:", json.dumps(result[f"rank {rank}"], indent=2), flush=True)
    result["switching"] = switching(args)
    print("switching:", json.dumps(result["switching"], indent=2))
    result["versions"] = record.versions(["jax", "jaxlib", "flax", "numpy"])
    if not args.no_write:
        print(f"written to {record.write('bank', 'python benchmarks/bank.py', result)}")


def by_row(args: argparse.Namespace, rank: int) -> dict[str, Any]:
    """Prefill and decoding of both sides, in alternation."""
    alone = [adapted(args, rank, seed) for seed in range(args.rows)]
    bank, names = banked(alone, rank)
    sides = {"bank": bank.partition(names), "one": jlora.partition(alone[0])}
    shape = (args.rows, args.length)
    vocab = SHAPES[args.shape].vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, shape, np.int32)
    sampling = Sampling(jax.random.key(0), np.float32(0), np.float32(1))
    rest = (np.arange(args.rows, dtype=np.int32), stop_array([]), sampling)
    slots = args.length + args.new_tokens + 1

    def read(side: Any, rows: slice = slice(None)) -> Any:
        return prefill(*side, tokens[rows], np.ones(shape, bool)[rows], slots=slots)

    def write(side: Any, prompt: Any) -> Any:
        return decode(*side, prompt, *rest, max_new_tokens=args.new_tokens + 1)

    prompts = {name: read(side) for name, side in sides.items()}  # both compile
    for name, side in sides.items():
        jax.block_until_ready(write(side, prompts[name]))
    errors, effects = [], []
    for row, model in enumerate(alone):
        logits = read(jlora.partition(model), slice(row, row + 1)).logits[0]
        errors.append(float(abs(prompts["bank"].logits[row] - logits).max()))
        effects.append(float(abs(prompts["one"].logits[row] - logits).max()))
    seconds: dict[str, dict[str, list[float]]] = {
        part: {name: [] for name in sides} for part in ("prefill", "decode")
    }
    for number in range(args.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            seconds["prefill"][name].append(timed(read, sides[name]))
            seconds["decode"][name].append(timed(write, sides[name], prompts[name]))
    return {
        "largest_difference_from_adapter_alone": max(errors),
        "smallest_difference_from_first_adapter": min(effects[1:]),
        **{
            f"{part}_ratio": spread([a / b for a, b in zip(s["bank"], s["one"], strict=True)])
            for part, s in seconds.items()
        },
        "seconds": {
            f"{part}_{name}": statistics.median(times)
            for part, s in seconds.items()
            for name, times in s.items()
        },
    }


def switching(args: argparse.Namespace, times: int = 50) -> dict[str, Any]:
    """Host time of a switch, and programs compiled after the first adapter has been run."""
    ranks = np.linspace(4, 64, 16).astype(int).tolist()
    bank, names = banked([adapted(args, r, seed) for seed, r in enumerate(ranks)], 64)
    tokens = np.zeros((1, 8), np.int32)
    compiled: list[str] = []

    def run() -> None:
        jax.block_until_ready(prefill(*bank.partition(), tokens, tokens == 0, slots=9))

    run()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    for name in names:
        bank.set_active(name)
        run()
    seconds = []
    for name in itertools.islice(itertools.cycle(names), times * len(names)):
        start = time.perf_counter()
        bank.set_active(name)
        bank.partition()
        seconds.append(time.perf_counter() - start)
    return {
        "ranks": ranks,
        "compiled": len(compiled),
        "milliseconds": spread([s * 1e3 for s in seconds]),
    }


def adapted(args: argparse.Namespace, rank: int, seed: int) -> Any:
    """A model with random adapters, whose base is the same arrays in all of them."""
    adapters, base = split(args.shape, rank, args.scan_layers)
    leaves = base_leaves(args.shape, args.scan_layers)
    small = jax.tree.map(lambda x: x * 0.1, random_leaves(adapters, seed + 1))
    return jlora.combine(small, jax.tree.unflatten(jax.tree.structure(base), leaves))


@functools.cache
def base_leaves(shape: str, scan_layers: bool) -> list[jax.Array]:
    """Random arrays for a base, which adapters of all ranks share."""
    return jax.tree.leaves(random_leaves(split(shape, 1, scan_layers)[1], 0))


@functools.cache
def split(shape: str, rank: int, scan_layers: bool) -> tuple[Any, Any]:
    """Shapes of adapters and base."""
    lora = jlora.LoraConfig(r=rank, lora_alpha=rank)
    options = {"dtype": np.float32, "scan_layers": scan_layers}
    return jlora.partition(abstract_model(SHAPES[shape], lora, quant=None, remat=False, **options))


def banked(models: list[Any], rank: int) -> tuple[jlora.Bank, list[str]]:
    """A bank of the adapters of models that share a base."""
    bare = jlora.eject(jlora.combine(*jlora.partition(models[0])))
    bank = jlora.Bank(bare, jlora.LoraConfig(r=rank), capacity=len(models))
    for number, model in enumerate(models):
        bank.add(f"adapter {number}", model)
    return bank, list(bank.names)


def timed(run: Any, *args: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
