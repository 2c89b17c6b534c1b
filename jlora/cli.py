"""The command line: one frozen dataclass for each command; its fields are the flags."""

import dataclasses
import functools
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
                                    answer prompts; with --prompts FILE and --adapter NAME=DIR …,
                                    those of a file, each with its adapter
  quantize --model DIR --to DIR     write a model with 4-bit or 8-bit weights, as bitsandbytes does
  export --run RUN --to DIR         write a run's newest checkpoint as a PEFT adapter; with --target
                                    vllm, one that its server takes
  import --model DIR --adapter PEFT_DIR --to DIR
                                    check a PEFT adapter against a model, and write it as ours
  combine --adapters A B --weights 0.5 0.5 --to DIR
                                    make one adapter of several
  diff A B                          compare two adapters; exits with 1 where they differ
  inspect ADAPTER                   show an adapter's settings, layers, norms and files
  merge --model DIR --adapter A --to DIR
                                    write the model with the adapter in its weights
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
    from jlora import adapters, evaluate, injection
    from jlora.data import chat, source
    from jlora.generation import stop_ids
    from jlora.train import measure

    split = None if Path(settings.data).is_file() else "test"
    records = source.load_records(settings.data, split)[: settings.rows]
    labels = settings.labels or source.read_labels(settings.data)
    paths = [] if settings.adapter is None else [settings.adapter]
    model, tokenizer = _load(settings, paths)
    for path in paths:
        adapters.load_adapter(path, model, force=settings.force, allow_zero=settings.force)
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
    from jlora import prompts
    from jlora.data import chat
    from jlora.generation import generate, stop_ids

    paths = prompts.named(itertools.chain(*settings.adapter))
    asked = (
        prompts.read(settings.prompts, list(paths))
        if settings.prompts
        else prompts.ask(settings.prompt, list(paths))
    )
    model, tokenizer = _load(settings, paths.values())
    model, names = prompts.adapt(model, paths, asked, force=settings.force)
    answers = generate(
        model,
        [chat.encode_prompt(row.messages(settings.system), tokenizer) for row in asked],
        adapters=names,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=stop_ids(settings.model, tokenizer),
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        batch_size=min(len(asked), 8),
    )
    for row, answer in zip(asked, answers, strict=True):
        text = tokenizer.decode(answer.tolist(), skip_special_tokens=True)
        print(json.dumps(row.answered(text), ensure_ascii=False) if settings.prompts else text)


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
    from jlora import adapters, fingerprint, injection, peft
    from jlora.models import load
    from jlora.peft import vllm
    from jlora.train.run import Run

    if (settings.to / peft.CONFIG_FILE).exists():
        raise JloraError(f"{settings.to} holds an adapter already; choose another --to")
    stored = adapters.read_newest_checkpoint(settings.run)
    base = conversion.read_toml(Run(settings.run).config_file)["model"]
    model, weights = load.abstract(base), load.weights_of(base)
    adapters.check_base(stored, fingerprint.of_directory(Path(base)), force=settings.force)
    said = f"wrote {settings.to}"
    if settings.target == "vllm":
        rank = vllm.max_lora_rank(stored.config, injection.plan(model, stored.config))
        said += f"; its server needs --max-lora-rank {rank} (the default is {vllm.DEFAULT_RANK})"
    peft.write_peft(settings.to, model, stored, base_model=base, weights=weights)
    print(said)


def import_adapter(settings: commands.ImportConfig) -> None:
    """Write a PEFT adapter, checked against a model, as an adapter checkpoint."""
    from jlora import adapters, fingerprint, peft
    from jlora.models import load

    model, weights = load.abstract(settings.model), load.weights_of(settings.model)
    stored = peft.read_peft(settings.adapter)
    base = fingerprint.of_directory(settings.model)
    adapters.check_base(stored, base, force=settings.force)
    stored = peft.fit(stored, model, weights=weights, force=settings.force)
    dataclasses.replace(stored, base=base).save(settings.to)
    print(f"wrote {settings.to}: {len(stored.factors)} tensors, all that the model has a place for")


def combine(settings: commands.CombineConfig) -> None:
    """Write a combination of adapters: in Orbax, or with --model in the PEFT format."""
    from jlora import combination, peft
    from jlora.models import load

    if settings.to.exists():
        raise JloraError(f"{settings.to} exists already; choose another --to")
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    to, model = options.pop("to"), options.pop("model")
    stored = combination.combine_adapters(**options)
    if model is None:
        stored.save(to)
    else:
        base = str(model.parent if model.is_file() else model)
        peft.write_peft(to, load.abstract(model), stored, base_model=base)
    print(f"wrote {to}")


def diff(settings: commands.DiffConfig) -> None:
    """Print how two adapters differ. Exits with 0 where both hold the same bits, else 1."""
    from jlora import comparison

    found = comparison.compare(settings.a, settings.b)
    print(found.table(all_layers=settings.all_layers))
    raise SystemExit(0 if found.same else 1)


def merge(settings: commands.MergeConfig) -> None:
    """Write a model directory with the adapter in its weights, and say what rounding cost."""
    from jlora import merging

    print(merging.merge(settings, quant=_quant_of(settings.model, [settings.adapter])))
    print(f"wrote {settings.to}")


def inspect(settings: commands.InspectConfig) -> None:
    """Print what an adapter is; or what would be trained, and PEFT's summary."""
    if settings.adapter is not None:
        from jlora import description

        print(description.describe(settings.adapter, all_layers=settings.all_layers))
        return
    from jlora import injection
    from jlora.models import load

    given = settings.model or settings.model_config
    assert given is not None  # the settings see to it
    model = load.abstract(given)
    plan = injection.plan(model, settings.lora)
    print(plan if settings.all_layers else plan.compact())
    _, base = injection.count(model)
    print(injection.summary_line(plan.parameters, base + plan.parameters))


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "fetch": (commands.FetchConfig, fetch),
    "convert": (commands.ConvertConfig, convert),
    "train": (config.TrainConfig, train),
    "eval": (commands.EvaluateConfig, evaluate),
    "generate": (commands.GenerateConfig, generate),
    "quantize": (commands.QuantizeConfig, quantize),
    "export": (commands.ExportConfig, export),
    "combine": (commands.CombineConfig, combine),
    "diff": (commands.DiffConfig, diff),
    "merge": (commands.MergeConfig, merge),
    "import": (commands.ImportConfig, import_adapter),
    "inspect": (commands.InspectConfig, inspect),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exits with 2 on bad input, 128 + n when signal n stopped a training run.

    `diff` exits with 1 where the adapters differ.
    """
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
        with log_to_stderr():
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


def _load(settings: Any, adapters: Iterable[Path]) -> tuple[Any, Any]:
    """The base, as these adapters had it, and tokenizer of a command that has --model."""
    from jlora.data import chat
    from jlora.models import families, load

    vocab_size = families.read_config(settings.model).vocab_size
    tokenizer = chat.load_tokenizer(settings.model, vocab_size)
    dtype = load.compute_dtype(settings.dtype)
    quant = _quant_of(settings.model, adapters)
    return load.load(settings.model, dtype=dtype, quant=quant), tokenizer


def _quant_of(model: Path, adapters: Iterable[Path]) -> config.QuantConfig | None:
    """How the runs among adapters quantised the base that they were trained on.

    Raises:
        JloraError: not all alike.
    """
    from jlora.models import load
    from jlora.train.run import Run

    found: dict[config.QuantConfig | None, Path] = {}
    for adapter in adapters:
        if (file := Run(adapter).config_file).is_file() and not load.is_quantised(model):
            used = conversion.read_toml(file)
            quant = used["quant"] if used.get("method") == "qlora" else None
            found.setdefault(
                quant and conversion.from_dict(config.QuantConfig, quant, where=str(file)), adapter
            )
    if len(found) > 1:
        raise JloraError(
            "the adapters were trained on bases quantised in different ways: "
            + "; ".join(f"{path} on {quant or 'plain weights'}" for quant, path in found.items())
            + "; use them one by one"
        )
    return next(iter(found), None)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show what the library logs, such as the norm of an adapter."""
    log, handler = logging.getLogger("jlora"), logging.StreamHandler(sys.stderr)
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # some library gives the root logger a handler too
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


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
