"""A few rows times a 4-bit weight: the fused kernel, XLA's way, a bfloat16 weight, and the limit.

    python benchmarks/decode_matmul.py [--rows 1] [--output build/decode_matmul.json]

XLA's way is to dequantise the weight and multiply by it. The limit is the time to read codes and
scales once at the memory's bandwidth. A timed call multiplies by many weights, one after the
other, so that none is still in a cache: each input depends on the output before, at no cost that
the ways differ in. The ways alternate; reported are medians, and medians of each round's ratios.

On a GPU or TPU the kernel is also compared with XLA's result in float32. On a CPU there is no
kernel to time, and the shapes are small. Needs JAX alone, not what jlora needs.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import record
import topologies
from jax import Array

BLOCK = 64
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
SMALL = [(512, 512), (512, 1536)]
BACKENDS = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}


def main() -> None:
    """Time each shape, print a line for each, write all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--megabytes", type=int, default=512, help="codes that a call reads")
    parser.add_argument("--bandwidth", type=float, help="GB/s, of a chip that we do not know")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()

    device = jax.devices()[0]
    known = {chip.device_kind: chip.bandwidth for chip in topologies.CHIPS.values()}
    bandwidth = args.bandwidth * 1e9 if args.bandwidth else known.get(device.device_kind)
    kernel = load(BACKENDS[device.platform]) if device.platform in BACKENDS else None
    dtype = jnp.bfloat16 if kernel else jnp.float32
    if kernel is None:
        print(f"no fused kernel for {device.platform}: XLA's way alone, on small shapes")
        args.megabytes = min(args.megabytes, 4)
    if bandwidth is None:
        print(f"bandwidth of {device.device_kind!r} unknown: no limit (--bandwidth)")

    results = []
    for n_in, n_out in SHAPES if kernel else SMALL:
        results.append(shape(kernel, n_in, n_out, dtype, bandwidth, args))
        print(line(results[-1]), flush=True)
    report = {
        "device": device.device_kind,
        "versions": record.versions(["jax", "jaxlib"]),
        "command": " ".join(["python", *sys.argv]),
        "rows": args.rows,
        "block_size": BLOCK,
        "dtype": jnp.dtype(dtype).name,
        "bandwidth": bandwidth,
        "shapes": results,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def load(name: str) -> Any:
    """A kernel's module, without the package around it: that would need what it depends on."""
    file = Path(__file__).parents[1] / "jlora" / "quant" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shape(
    kernel: Any, n_in: int, n_out: int, dtype: Any, bandwidth: float | None, args: Any
) -> dict[str, Any]:
    """Seconds a product, by each way."""
    copies = max(2, round(args.megabytes * 1e6 / (n_in * n_out / 2)))
    keys = jax.random.split(jax.random.key(0), copies)
    weights = [quantised(key, n_in, n_out) for key in keys]
    x = jax.random.normal(keys[0], (args.rows, n_in)).astype(dtype)
    ways: dict[str, Callable[[Array, Any], Array]] = {"xla": through_xla, "dense": jnp.dot}
    result: dict[str, Any] = {"in": n_in, "out": n_out, "weights": copies}
    if kernel and kernel.supported(args.rows, n_in, n_out, BLOCK, dtype):
        fused = functools.partial(through_kernel, kernel)
        ways = {"fused": fused, **ways}
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(through_xla)(x.astype(jnp.float32), weights[0])
        close = jax.jit(fused)(x, weights[0]).astype(jnp.float32)
        result["error"] = float(abs(close - exact).max() / abs(exact).max())

    dense = [jnp.zeros((n_in, n_out), dtype) for _ in weights]
    calls = {way: jax.jit(functools.partial(chain, ways[way])) for way in ways}
    inputs = {way: dense if way == "dense" else weights for way in ways}
    for way in ways:  # compiles
        jax.block_until_ready(calls[way](x, inputs[way]))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(args.rounds):
        for way in list(ways)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(calls[way](x, inputs[way]))
            seconds[way].append((time.perf_counter() - start) / copies)
    result["seconds"] = {way: statistics.median(times) for way, times in seconds.items()}
    if "fused" in ways:
        result["speedup"] = {
            way: statistics.median(
                t / f for t, f in zip(seconds[way], seconds["fused"], strict=True)
            )
            for way in ("xla", "dense")
        }
    if bandwidth:
        result["limit"] = sum(a.nbytes for a in weights[0]) / bandwidth
    return result


def quantised(key: Array, n_in: int, n_out: int) -> tuple[Array, Array]:
    """Random codes and scales."""
    codes = jax.random.bits(key, (n_in // 2, n_out), jnp.uint8)
    return codes, jax.random.uniform(key, (n_in // BLOCK, n_out))


def chain(way: Callable[[Array, Any], Array], x: Array, weights: list[Any]) -> Array:
    """Each weight in turn; a little of each output is added to the next input, all columns of it,
    so that none can be left out.
    """
    rows, n_in = x.shape
    for weight in weights:
        y = way(x, weight)
        y = jnp.pad(y, ((0, 0), (0, -y.shape[1] % n_in))).reshape(rows, -1, n_in)
        x = x + (1e-3 * y.sum(1)).astype(x.dtype)
    return x


def through_kernel(kernel: Any, x: Array, weight: tuple[Array, Array]) -> Array:
    """The fused product."""
    return kernel.matmul(x, *weight, codebook=NF4, block_size=BLOCK)


def through_xla(x: Array, weight: tuple[Array, Array]) -> Array:
    """The weight is dequantised, then multiplied."""
    codes, absmax = weight
    pairs = codes.reshape(absmax.shape[0], -1, codes.shape[1])
    values = look_up(jnp.concatenate([pairs & 15, pairs >> 4], axis=1))
    w = (values * absmax[:, None]).astype(x.dtype).reshape(-1, codes.shape[1])
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def look_up(nibbles: Array) -> Array:
    """Values of a codebook: a gather on GPUs, elsewhere a tree of selects, whichever is faster."""
    if jax.default_backend() == "gpu":
        return jnp.take(jnp.array(NF4, jnp.float32), nibbles.astype(jnp.int32))
    values = [jnp.float32(v) for v in NF4]
    for bit in (1, 2, 4, 8):
        odd = (nibbles & bit) != 0
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def line(result: dict[str, Any]) -> str:
    """One shape, for people."""
    times = ", ".join(f"{way} {1e6 * s:.1f} us" for way, s in result["seconds"].items())
    parts = [f"{result['in']} x {result['out']}: {times}"]
    if "limit" in result and "fused" in result["seconds"]:
        share = result["limit"] / result["seconds"]["fused"]
        parts.append(
            f"limit {1e6 * result['limit']:.1f} us, of which the kernel reaches {share:.0%}"
        )
    if "speedup" in result:
        parts.append(f"{result['speedup']['xla']:.1f} times XLA's speed")
        parts.append(f"error {result['error']:.1e}")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
