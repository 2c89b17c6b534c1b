"""Training steps in alternation, ours and others': speed, memory, and time to the first step.

    make bench          LoRA, ours and PEFT's
    make bench-qlora    QLoRA on NF4, our LoRA, and google-tunix with qwix on NF4

Each round runs every side as a process of its own, one after the other, and turns their order
round. What counts are ratios of a round's medians: other work on the machine changes from minute
to minute. A process of ours, not counted, fills an empty compilation cache first.
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
SIDES = {
    "lora": ("step.py",),
    "qlora": ("step.py", "--method=qlora"),
    "peft": ("peft_step.py",),
    "tunix-nf4": ("tunix_step.py",),
}


def main() -> None:
    """Run the rounds, write the result, print its summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", nargs="+", default=["lora", "peft"], choices=SIDES,
                        help="the first is what the others are compared with")  # fmt: skip
    parser.add_argument("--peft-python", help="of where PEFT is installed")
    parser.add_argument("--tunix-python", help="of where google-tunix is installed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a process")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()

    flags = [f"--{name}={getattr(args, name)}" for name in ("steps", "batch", "length", "rank")]
    pythons = {"peft": args.peft_python, "tunix-nf4": args.tunix_python}
    if absent := [s for s in args.sides if s in pythons and not pythons[s]]:
        parser.error(f"{', '.join(absent)}: say where with --peft-python and --tunix-python")
    commands = {}
    for side in args.sides:
        script, *own = SIDES[side]
        commands[side] = [pythons.get(side, sys.executable), str(HERE / script), *own, *flags]
    first, *others = args.sides
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"XDG_CACHE_HOME": cache}  # where the command line has it
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            environment.pop(name, None)  # a cache of the user's own would be neither empty nor ours
        cold = run(commands[first], environment)
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
        raise SystemExit("the sides do not train the same number of parameters")

    def ratios(of: str) -> dict[str, dict[str, float]]:
        """Each other side's figure over the first's in each round: above 1, the first is better."""
        return {s: spread([r[s][of] / r[first][of] for r in rounds]) for s in others}

    tokens = args.batch * args.length
    summary: dict[str, Any] = {
        "shape": {"model": "SmolLM2-135M", "batch": args.batch, "length": args.length,
                  "rank": args.rank, "targets": "all-linear", "dtype": "float32"},
        "compared_with": first,
        "speed_ratio": ratios("median"),
        "first_step_ratio_warm_cache": ratios("first_step"),
        "memory_ratio": ratios("peak_rss_bytes"),
        "first_step_seconds_empty_cache": cold["first_step"],
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
    command = " ".join(["python", "benchmarks/step_vs.py", *sys.argv[1:]])
    file = record.write("_vs_".join(["step", *args.sides]), command, summary | {"rounds": rounds})
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
