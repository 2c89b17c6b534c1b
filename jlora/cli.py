"""The command line: one frozen dataclass for each command; its fields are the flags."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jlora import commands, config, conversion
from jlora.errors import JloraError, nearest

USAGE = """\
usage: jlora COMMAND [flags]        jlora COMMAND --help lists a command's flags

  fetch NAME --to DIR               download a model (smollm2, smollm2-gguf) or data (sentiment)
  convert FILE.gguf --to DIR        turn a GGUF file into a Hugging Face model directory
  train --model DIR --data DATA --output RUN
                                    fine-tune; flags beat --config FILE.toml, which beats defaults
  eval --model DIR --data DATA      loss, exact answers, likeliest labels
  generate --model DIR --prompt TEXT
                                    answer prompts
  quantize --model DIR --to DIR     write a model with 4-bit or 8-bit weights, as bitsandbytes does
  export --run RUN --to DIR         write a run's newest checkpoint as a PEFT adapter; with --target
                                    vllm, one that its server takes
  import --model DIR --adapter PEFT_DIR --to DIR
                                    check a PEFT adapter against a model, and write it as ours
  inspect --model DIR               show what the --lora flags adapt; with --model-config FILE, of a
                                    config.json without weights
"""

# Imports stand inside the commands, each of which needs only some of the package.


def fetch(settings: commands.FetchConfig) -> None:
    """Download what is asked for, unless it is there."""
    from jlora import fetch

    fetch.fetch(settings.name, settings.to)


def convert(settings: commands.ConvertConfig) -> None:
    """Convert a GGUF file."""
    from jlora.models import gguf

    gguf.convert(settings.gguf, settings.to)
    print(f"wrote {settings.to}")


def train(settings: config.TrainConfig) -> None:
    """Train, and print what report.json says. --config FILE.toml gives settings that flags beat."""
    from jlora.train import loop

    report = loop.train(settings, say=functools.partial(print, flush=True))
    print(json.dumps(report, indent=2))


def evaluate(settings: commands.EvaluateConfig) -> None:
    """Print a JSON object of measures."""
    from jlora import evaluate, injection
    from jlora.data import chat, source
    from jlora.generation import stop_ids
    from jlora.train import measure

    split = None if Path(settings.data).is_file() else "test"
    records = source.load_records(settings.data, split)[: settings.rows]
    labels = settings.labels or source.read_labels(settings.data)
    model, tokenizer = _load(settings)
    examples, encoded = chat.encode_all(records, tokenizer, settings.max_length)
    batches = measure.evaluation_batches(examples, settings.batch_size)
    answers = evaluate.answers(
        model,
        tokenizer,
        records,
        labels=labels or None,
        stop_ids=stop_ids(settings.model, tokenizer),
        batch_size=settings.batch_size,
    )
    result = {
        "rows": answers.rows,
        "rows_without_answer": encoded.dropped,
        "loss": measure.mean_loss(*injection.partition(model), batches),
        "exact_match": answers.exact,
        "label_accuracy": answers.label,
    }
    print(json.dumps(result, indent=2))


def generate(settings: commands.GenerateConfig) -> None:
    """Print the answer to each prompt."""
    from jlora.data import chat
    from jlora.generation import generate, stop_ids

    model, tokenizer = _load(settings)
    before: list[chat.Message] = []
    if settings.system:
        before.append({"role": "system", "content": settings.system})
    prompts = [
        chat.encode_prompt([*before, {"role": "user", "content": text}], tokenizer)
        for text in settings.prompt
    ]
    answers = generate(
        model,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=stop_ids(settings.model, tokenizer),
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        batch_size=min(len(prompts), 8),
    )
    for answer in answers:
        print(tokenizer.decode(answer.tolist(), skip_special_tokens=True))


def quantize(settings: commands.QuantizeConfig) -> None:
    """Write a quantised copy of a model directory."""
    from jlora.models import load

    load.quantize(settings.model, settings.to, settings.quant)
    before, after = (_weights_size(path) for path in (settings.model, settings.to))
    print(
        f"wrote {settings.to}: weights of {after / 1e9:.3g} GB, where they were {before / 1e9:.3g}"
    )


def _weights_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("model*.safetensors"))


def export(settings: commands.ExportConfig) -> None:
    """Write a PEFT directory from a run's newest checkpoint."""
    from jlora import adapters, injection, peft
    from jlora.models import load
    from jlora.peft import vllm
    from jlora.train.run import Run

    if (settings.to / peft.CONFIG_FILE).exists():
        raise JloraError(f"{settings.to} holds an adapter already; choose another --to")
    run = Run(settings.run)
    stored = adapters.read_newest_checkpoint(settings.run)
    used = conversion.read_toml(run.config_file)
    base = used["model"]
    model, weights = load.abstract(base), load.weights_of(base)
    said = f"wrote {settings.to}"
    if settings.target == "vllm":
        rank = vllm.max_lora_rank(stored.config, injection.plan(model, stored.config))
        said += f"; its server needs --max-lora-rank {rank} (the default is {vllm.DEFAULT_RANK})"
    peft.write_peft(settings.to, model, stored, base_model=base, weights=weights)
    print(said)


def import_adapter(settings: commands.ImportConfig) -> None:
    """Write a PEFT adapter, checked against a model, as an adapter checkpoint."""
    from jlora import checkpoint, peft
    from jlora.models import load

    model, weights = load.abstract(settings.model), load.weights_of(settings.model)
    stored = peft.fit(peft.read_peft(settings.adapter), model, weights=weights)
    checkpoint.write_adapter(settings.to, stored)
    print(f"wrote {settings.to}: {len(stored.factors)} tensors, all that the model has a place for")


def inspect(settings: commands.InspectConfig) -> None:
    """Print what would be trained: path, shape, rank, alpha and parameters; and PEFT's summary."""
    from jlora import injection
    from jlora.models import load

    given = settings.model or settings.model_config
    assert given is not None  # the settings see to it
    model = load.abstract(given)
    plan = injection.plan(model, settings.lora)
    print(plan if settings.all_layers else compact(plan))
    _, base = injection.count(model)
    print(injection.summary_line(plan.parameters, base + plan.parameters))


def compact(plan: Any) -> str:
    """The table of a plan with one row for all layers that differ in nothing but their index."""
    cells = [
        (t.site.path, str(t.site.shape), str(t.r), f"{t.alpha:g}", t.parameters)
        for t in plan.targets
    ]
    cells += [(path, str(shape), "", "", math.prod(shape)) for path, shape in plan.whole.items()]
    for path, picked in plan.tokens.items():
        cells.append((path, f"{len(picked)} rows", "", "", len(picked) * plan.widths[path]))
    groups: dict[tuple, list[int]] = {}
    for path, *rest in cells:
        before, *index, after = ["", *re.split(r"(?:^|(?<=/))(\d+)(?=/|$)", path, maxsplit=1)][-3:]
        groups.setdefault((before, after, *rest), []).extend(map(int, index))
    rows = [("path", "shape", "rank", "alpha", "parameters")]
    for (before, after, *rest, size), layers in groups.items():
        times = f"{len(layers)} × " if len(layers) > 1 else ""
        rows.append((before + _ranges(layers) + after, *rest, f"{times}{size:,d}"))
    rows.append(("total", "", "", "", f"{plan.parameters:,d}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, (str.ljust,) * 2 + (str.rjust,) * 3, strict=True) for row in rows)
    return "\n".join("  ".join(pad(cell, width) for cell, width, pad in line) for line in lines)


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] to "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "fetch": (commands.FetchConfig, fetch),
    "convert": (commands.ConvertConfig, convert),
    "train": (config.TrainConfig, train),
    "eval": (commands.EvaluateConfig, evaluate),
    "generate": (commands.GenerateConfig, generate),
    "quantize": (commands.QuantizeConfig, quantize),
    "export": (commands.ExportConfig, export),
    "import": (commands.ImportConfig, import_adapter),
    "inspect": (commands.InspectConfig, inspect),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exits with 2 on bad input, 128 + n when signal n stopped a training run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    try:
        name = arguments[0]
        if name not in COMMANDS:
            raise JloraError(
                f"no command {name!r}{nearest(name, COMMANDS) or '; see jlora --help'}"
            )
        settings = parse(name, arguments[1:])
        use_compilation_cache()
        COMMANDS[name][1](settings)
    except (JloraError, OSError) as error:  # an OSError names its file and what the system said
        print(f"jlora: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(name: str, arguments: Sequence[str]) -> Any:
    """Flags over the file given by --config (of a resumed run: its own) over defaults.

    Raises:
        JloraError: a file that is no TOML, or holds unknown keys or wrong values.
        SystemExit: flags that are unknown, absent or ill-formed; tyro has said which.
    """
    import tyro

    cls, run = COMMANDS[name]
    arguments, file = _take_config(list(arguments), name)
    default = _defaults(cls, file) if file else None
    return tyro.cli(
        cls, prog=f"jlora {name}", description=run.__doc__, args=arguments, default=default
    )


def _take_config(arguments: list[str], name: str) -> tuple[list[str], Path | None]:
    """The arguments without --config FILE, and the file."""
    if name != "train":
        return arguments, None
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            rest = arguments[i + 1 :] if equals else arguments[i + 2 :]
            value = value or "".join(arguments[i + 1 : i + 2])
            if not value:
                raise JloraError("--config needs a TOML file")
            return arguments[:i] + rest, Path(value)
    outputs = [b for a, b in itertools.pairwise(arguments) if a == "--output"]
    outputs += [a.partition("=")[2] for a in arguments if a.startswith("--output=")]
    if "--resume" in arguments and outputs:
        file = Path(outputs[-1], "config.toml")
        if not file.is_file():
            raise JloraError(f"--resume: {file.parent} holds no run (config.toml is absent)")
        return arguments, file
    return arguments, None


def _defaults(cls: type, file: Path) -> Any:
    """The configuration that `file` describes; what it leaves out and must be given stays open."""
    import tyro

    values = conversion.read_toml(file)
    absent = [name for name in conversion.required(cls) if name not in values]
    described: Any = conversion.from_dict(cls, values | dict.fromkeys(absent, ""), where=str(file))
    return dataclasses.replace(described, **dict.fromkeys(absent, tyro.MISSING))


def _load(settings: Any) -> tuple[Any, Any]:
    """Model, with its adapter, and tokenizer of a command that has --model and --adapter."""
    from jlora import adapters
    from jlora.data import chat
    from jlora.models import families, load

    vocab_size = families.read_config(settings.model).vocab_size
    tokenizer = chat.load_tokenizer(settings.model, vocab_size)
    dtype = load.compute_dtype(settings.dtype)
    model = load.load(settings.model, dtype=dtype, quant=_quant_of(settings))
    if settings.adapter is not None:
        adapters.load_adapter(settings.adapter, model)
    return model, tokenizer


def _quant_of(settings: Any) -> config.QuantConfig | None:
    """How a run that --adapter names quantised the base that its adapter was trained on."""
    from jlora.models import load
    from jlora.train.run import Run

    if settings.adapter is None or not (file := Run(settings.adapter).config_file).is_file():
        return None
    used = conversion.read_toml(file)
    if used.get("method") != "qlora" or load.is_quantised(settings.model):
        return None
    return conversion.from_dict(config.QuantConfig, used["quant"], where=str(file))


def use_compilation_cache() -> None:
    """Keep compiled programs between processes, unless JAX_COMPILATION_CACHE_DIR says where."""
    import jax  # has read the environment by now: setting a variable would come too late

    options: Any = jax.config
    if options.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jlora" / "xla"
        options.update("jax_compilation_cache_dir", str(cache))
        # JAX's own limit of 1 s leaves out many small programs that add up to seconds.
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            options.update("jax_persistent_cache_min_compile_time_secs", 0.05)


if __name__ == "__main__":
    main()
