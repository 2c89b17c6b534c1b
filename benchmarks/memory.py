"""Memory of one training step on a chip that need not be there: compiled for it, never run.

    python benchmarks/memory.py --case all                                # the table below
    python benchmarks/memory.py --model llama2-7b --method qlora --target v5e    # any other

Needs the compilers of the extra "aot". Shapes of SHAPES, bfloat16, AdamW with float32 adapters,
layers scanned and recomputed. The figure is what the chip holds at once, in decimal GB: arguments
+ temporary + output - aliased. Each case is compiled in a process of its own, and the exit status
says whether all that have a limit kept it. Writes benchmarks/results/memory.json.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from record import versions, write
from shapes import SHAPES, abstract_model
from topologies import CHIPS, GB, compile_for

import jlora
from jlora import optim
from jlora.config import OptimConfig
from jlora.data.batching import Batch
from jlora.train.step import init_state, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is compiled, and for what."""

    model: str
    target: str
    method: str = "qlora"
    adapted: str = "all-linear"
    double_quant: bool = False
    batch: int = 1
    length: int = 1024
    rank: int = 16
    layers: int | None = None
    """None means all of the model's."""
    limit: float | None = None
    """GB; None means that the figure is only told."""


CASES = {
    "7b-bf16-qv-v5e": Case(
        model="llama2-7b", target="v5e", method="lora", adapted="q+v", limit=14.5
    ),
    "7b-nf4-qv-v5e": Case(model="llama2-7b", target="v5e", adapted="q+v", limit=5.6),
    "7b-nf4-2048-v5e": Case(
        model="llama2-7b", target="v5e", double_quant=True, length=2048, limit=5.9
    ),
    "7b-nf4-2048-h100": Case(
        model="llama2-7b", target="h100", double_quant=True, length=2048, limit=6.5
    ),
    "70b-nf4-v5p": Case(model="llama2-70b", target="v5p"),
    "70b-nf4-double-v5p": Case(model="llama2-70b", target="v5p", double_quant=True, limit=45),
    "70b-nf4-h100": Case(model="llama2-70b", target="h100", limit=48),
    "70b-nf4-double-h100": Case(model="llama2-70b", target="h100", double_quant=True, limit=48),
}

ADAPTED: dict[str, Any] = {"all-linear": "all-linear", "q+v": ("q_proj", "v_proj")}


def arguments(case: Case) -> tuple[Any, ...]:
    """A training step's function and the shapes of its arguments; allocates nothing."""
    config = SHAPES[case.model]
    if case.layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=case.layers)
    quant = jlora.QuantConfig(double_quant=case.double_quant) if case.method == "qlora" else None
    lora = jlora.LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, target_modules=ADAPTED[case.adapted]
    )
    model = abstract_model(
        config, lora, quant=quant, dtype=jnp.bfloat16, scan_layers=True, remat=True
    )
    trained, base = jlora.partition(model)
    tx = optim.adamw(OptimConfig(lr=1e-4, warmup_steps=0), steps=1000)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda trained, key: init_state(trained, tx, key), trained, key)
    tokens, mask = (
        jax.ShapeDtypeStruct((case.batch, case.length), dtype) for dtype in (jnp.int32, bool)
    )
    rows = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    batch = Batch(tokens=tokens, mask=mask, targets=mask, rows=rows)
    return make_train_step(tx), state, base, batch


def measure(case: Case) -> dict[str, Any]:
    """Compile a case in this process."""
    start = time.perf_counter()
    step = compile_for(CHIPS[case.target], *arguments(case), donate=(0,))
    seconds = time.perf_counter() - start
    found = step.memory_analysis()
    kinds = "argument", "temp", "output", "alias"
    sizes = {kind: getattr(found, f"{kind}_size_in_bytes") / GB for kind in kinds}
    sizes["total"] = sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"]
    return {kind: round(size, 3) for kind, size in sizes.items()} | {
        "chip_memory": round(CHIPS[case.target].memory / GB, 1),
        "compile_seconds": round(seconds, 1),
    }


def main() -> int:
    """Parse flags, compile each case in a process of its own, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, "all"], help="of the table")
    parser.add_argument("--model", choices=SHAPES)
    parser.add_argument("--target", choices=CHIPS)
    parser.add_argument("--method", choices=["qlora", "lora"], default="qlora")
    parser.add_argument("--adapted", choices=ADAPTED, default="all-linear")
    parser.add_argument("--double-quant", action="store_true")
    for name in ("batch", "length", "rank", "layers"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Case, name))
    parser.add_argument("--limit", type=float, help="GB")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is None and (args.model is None or args.target is None):
        parser.error("say --case, or --model and --target")
    if args.case == "all":
        cases = CASES
    elif args.case:
        cases = {args.case: CASES[args.case]}
    else:
        own = Case(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Case)})
        cases = {"-".join([own.model, own.method, own.target]): own}
    if args.worker:
        print(json.dumps(measure(next(iter(cases.values())))))
        return 0
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # look for no device
    results, kept = [], True
    for name, case in cases.items():
        flags = ["--case", name] if args.case else sys.argv[1:]
        child = subprocess.run(
            [sys.executable, __file__, *flags, "--worker"],
            capture_output=True,
            text=True,
            env=environment,
        )
        if child.returncode:
            sys.exit(f"{name} did not compile:\n{child.stderr[-4000:]}")
        found = json.loads(child.stdout.splitlines()[-1])
        within = case.limit is None or found["total"] <= case.limit
        verdict = f"limit {case.limit}: {'kept' if within else 'EXCEEDED'}"
        verdict = verdict if case.limit else "no limit"
        kept &= within
        results.append({"case": name, **dataclasses.asdict(case), **found, "within": within})
        print(
            f"{name:24} {found['total']:7.3f} GB (arguments {found['argument']:.3f}, temporary "
            f"{found['temp']:.3f}), {verdict}",
            flush=True,
        )
    about = {"versions": versions(["jax", "jaxlib", "libtpu", "flax", "optax"])}
    name = "memory" if args.case == "all" else f"memory-{next(iter(cases))}"
    write(
        name,
        " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
        about | {"cases": results},
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
