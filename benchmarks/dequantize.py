"""Dequantising a weight, against doubling the array that it gives: what memory alone takes.

    python benchmarks/dequantize.py

Each round runs everything once, in turn, compiled. What counts are medians of a round's ratios to
`w * 2` in float32: other work on the machine changes from moment to moment.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record

from jlora.quant.quantize import quantize

FORMS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4_double_quant": {"double_quant": True},
    "fp4": {"kind": "fp4"},
    "int8": {"kind": "int8"},
}


def main() -> None:
    """Run the rounds, write the result, print its summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--size", type=int, default=4096, help="of a square weight")
    args = parser.parse_args()

    values = np.random.default_rng(0).standard_normal((args.size, args.size), np.float32)
    w = jnp.asarray(values)
    runs = {"twice": compiled(lambda w: w * 2, w)}
    for name, options in FORMS.items():
        q = quantize(w, **options)
        for dtype in (jnp.float32, jnp.bfloat16):
            run = compiled(lambda q, dtype=dtype: q.dequantize(dtype), q)
            runs[f"{name}_to_{jnp.dtype(dtype).name}"] = run
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)

    summary = {
        "shape": [args.size, args.size],
        "seconds_of_twice": statistics.median(seconds["twice"]),
        "ratio_to_twice": {
            name: spread([a / b for a, b in zip(took, seconds["twice"], strict=True)])
            for name, took in seconds.items()
            if name != "twice"
        },
        "versions": record.versions(["jax", "jaxlib", "numpy"]),
    }
    command = f"python benchmarks/dequantize.py --rounds={args.rounds} --size={args.size}"
    file = record.write("dequantize", command, summary)
    print(json.dumps(summary, indent=2))
    print(f"written to {file}")


def compiled(function: Callable[..., jax.Array], argument: Any) -> Callable[[], None]:
    """The function of that argument, compiled and run once, to be run to its end."""
    run = jax.jit(function)

    def once() -> None:
        run(argument).block_until_ready()

    once()
    return once


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "lower_quartile": low, "upper_quartile": high}


if __name__ == "__main__":
    main()
