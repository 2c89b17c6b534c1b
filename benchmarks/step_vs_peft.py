"""Our training step against PEFT's, in alternation: speed, memory, and time to the first step.

    make bench

Each round runs step.py and peft_step.py as processes of their own, one after the other, and swaps
their order. What counts are ratios of a round's two medians: other work on the machine changes
from minute to minute. Our first process, not counted, fills an empty compilation cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

HERE = Path(__file__).parent


def main() -> None:
    """Run the rounds, write the result, print its summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft-python", required=True, help="of where PEFT is installed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a process")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()

    flags = [f"--{name}={getattr(args, name)}" for name in ("steps", "batch", "length", "rank")]
    commands = {
        "jlora": [sys.executable, str(HERE / "step.py"), *flags],
        "peft": [args.peft_python, str(HERE / "peft_step.py"), *flags],
    }
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"XDG_CACHE_HOME": cache}  # where the command line has it
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            environment.pop(name, None)  # a cache of the user's own would be neither empty nor ours
        cold = run(commands["jlora"], environment)
        rounds = []
        for number in range(args.rounds):
            order = list(commands)[:: 1 if number % 2 else -1]
            done = {name: run(commands[name], environment) for name in order}
            rounds.append(done)
            print(f"round {number + 1}: " + ", ".join(
                f"{name} {done[name]['median']:.2f} s a step, first after "
                f"{done[name]['first_step']:.1f} s" for name in commands
            ), flush=True)  # fmt: skip
    if len({r[name]["trainable_params"] for r in rounds for name in commands}) != 1:
        raise SystemExit("the two sides do not train the same number of parameters")

    def ratios(of: str) -> list[float]:
        """PEFT's figure over ours in each round: above 1 is better for us."""
        return [r["peft"][of] / r["jlora"][of] for r in rounds]

    tokens = args.batch * args.length
    summary: dict[str, Any] = {
        "shape": {"model": "SmolLM2-135M", "batch": args.batch, "length": args.length,
                  "rank": args.rank, "targets": "all-linear", "dtype": "float32"},
        "speed_ratio": spread(ratios("median")),
        "first_step_ratio_warm_cache": spread(ratios("first_step")),
        "memory_ratio": spread(ratios("peak_rss_bytes")),
        "jlora_first_step_seconds_empty_cache": cold["first_step"],
    }  # fmt: skip
    for name in commands:
        summary[name] = {
            "seconds_per_step": spread([r[name]["median"] for r in rounds]),
            "tokens_per_second": tokens / statistics.median(r[name]["median"] for r in rounds),
            "first_step_seconds": spread([r[name]["first_step"] for r in rounds]),
            "peak_rss_bytes": max(r[name]["peak_rss_bytes"] for r in rounds),
            "loss": rounds[0][name]["loss"],
            "versions": rounds[0][name]["versions"],
        }
    command = " ".join(["python benchmarks/step_vs_peft.py --peft-python", args.peft_python,
                        f"--rounds={args.rounds}", *flags])  # fmt: skip
    file = record.write("step_vs_peft", command, summary | {"rounds": rounds})
    print(json.dumps(summary, indent=2))
    print(f"written to {file}")


def run(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """One process's JSON, with its median step and the seconds from its start to its first step."""
    began = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    result["median"] = statistics.median(result["seconds_per_step"])
    result["first_step"] = result.pop("first_step_at") - began
    return result


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
