"""What each command of the command line does with its settings.

Imports stand inside the functions, each of which needs only some of the package.
"""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jlora import commands, config, conversion, hub
from jlora.errors import JloraError


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
    from jlora.models.families import warn_of_length
    from jlora.train import measure

    split = None if Path(settings.data).is_file() else "test"
    records = source.load_records(settings.data, split, ignore=settings.ignore)[: settings.rows]
    labels = settings.labels or source.read_labels(settings.data)
    settings = dataclasses.replace(settings, model=hub.find(settings.model).directory)
    paths = [] if settings.adapter is None else [settings.adapter]
    model, tokenizer = load_base(settings, paths)
    for path in paths:
        adapters.load_adapter(path, model, force=settings.force, allow_zero=settings.force)
    examples, encoded = chat.encode_all(records, tokenizer, settings.max_length)
    print(f"data: {encoded}", file=sys.stderr)
    warn_of_length(model.config, max(len(row.tokens) for row in examples), "rows to evaluate")
    records = [record for record in records if record.trained]  # others have no answer to compare
    batches = measure.evaluation_batches(examples, settings.batch_size)
    with measure.progress(len(records)) as done:
        answers = evaluate.answers(
            model,
            tokenizer,
            records,
            labels=labels or None,
            stop_ids=stop_ids(settings.model, tokenizer),
            batch_size=settings.batch_size,
            done=done,
        )
    with measure.progress(len(examples)) as done:
        loss = measure.mean_loss(*injection.partition(model), batches, done=done)
    result = {
        "rows": answers.rows,
        "rows_without_answer": encoded.dropped,
        "loss": loss,
        "exact_match": answers.exact,
        "label_accuracy": answers.label,
    }
    print(json.dumps(result, indent=2))


def generate(settings: commands.GenerateConfig) -> None:
    """Print the answer to each prompt."""
    from jlora import prompts
    from jlora.data import chat
    from jlora.generation import generate, stop_ids

    settings = dataclasses.replace(settings, model=hub.find(settings.model).directory)
    paths = prompts.named(itertools.chain(*settings.adapter))
    asked = (
        prompts.read(settings.prompts, list(paths))
        if settings.prompts
        else prompts.ask(settings.prompt, list(paths))
    )
    model, tokenizer = load_base(settings, paths.values())
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
    from jlora.models.tensors import Tensors

    model = hub.find(settings.model).directory
    load.quantize(model, settings.to, settings.quant)
    before, after = (Tensors(path).size() for path in (model, settings.to))
    print(
        f"wrote {settings.to}: weights of {after / 1e9:.3g} GB, where they were {before / 1e9:.3g}"
    )


def export(settings: commands.ExportConfig) -> None:
    """Write a PEFT directory from a run's newest checkpoint."""
    from jlora import adapters, fingerprint, injection, peft
    from jlora.models import load
    from jlora.peft import vllm
    from jlora.train.run import Run

    if (settings.to / peft.CONFIG_FILE).exists():
        raise JloraError(f"{settings.to} holds an adapter already; choose another --to")
    stored = adapters.read_newest_checkpoint(settings.run)
    base = Run(settings.run).find_model(settings.model)
    model, weights = load.abstract(base.directory), load.weights_of(base.directory)
    known = fingerprint.of_directory(base.directory, model)
    adapters.check_base(stored, known, force=settings.force)
    said = f"wrote {settings.to} from {stored.where}"
    if settings.target == "vllm":
        rank = vllm.max_lora_rank(stored.config, injection.plan(model, stored.config))
        said += f"; its server needs --max-lora-rank {rank} (the default is {vllm.DEFAULT_RANK})"
    peft.write_peft(
        settings.to,
        model,
        stored,
        base_model=base.name,
        base_revision=base.commit,
        weights=weights,
    )
    print(said)


def import_adapter(settings: commands.ImportConfig) -> None:
    """Write a PEFT adapter, checked against a model, as an adapter checkpoint."""
    from jlora import adapters, fingerprint, peft
    from jlora.models import load

    directory = hub.find(settings.model).directory
    model, weights = load.abstract(directory), load.weights_of(directory)
    stored = peft.read_peft(settings.adapter)
    base = fingerprint.of_directory(directory, model)
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
    found = None if model is None else hub.find(model, weights=False)
    stored = combination.combine_adapters(**options)
    if found is None:
        stored.save(to)
    else:
        base = str(model.parent) if model.is_file() else found.name
        peft.write_peft(
            to,
            load.abstract(found.directory),
            stored,
            base_model=base,
            base_revision=found.commit,
        )
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

    settings = dataclasses.replace(settings, model=hub.find(settings.model).directory)
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
    model = load.abstract(hub.find(given, weights=False).directory if settings.model else given)
    plan = injection.plan(model, settings.lora)
    print(plan if settings.all_layers else plan.compact())
    _, base = injection.count(model)
    print(injection.summary_line(plan.parameters, base + plan.parameters))


def load_base(settings: Any, adapters: Iterable[Path]) -> tuple[Any, Any]:
    """The base, as these adapters had it, and tokenizer of a command that has --model."""
    from jlora.data import chat
    from jlora.models import families, load

    vocab_size = families.read_config(settings.model).vocab_size
    adapters = list(adapters)
    template, name = _template_of(settings.chat_template, adapters)
    tokenizer = chat.load_tokenizer(
        settings.model, vocab_size, template=template, template_name=name
    )
    dtype = load.compute_dtype(settings.dtype)
    quant = _quant_of(settings.model, adapters)
    return load.load(settings.model, dtype=dtype, quant=quant), tokenizer


def _template_of(given: Path | None, adapters: Sequence[Path]) -> tuple[str | None, str]:
    """Return the chat template to be used in place of the model's, and what messages call it.

    Raises:
        JloraError: adapters that were trained with different ones, and none that was given.
    """
    from jlora.files import read_template, read_template_of

    if given is not None:
        return read_template(given), str(given)
    found = {adapter: read_template_of(adapter) for adapter in adapters}
    if len(set(found.values())) > 1:
        own = [str(adapter) for adapter, template in found.items() if template is not None]
        raise JloraError(
            f"the adapters were trained with different chat templates ({', '.join(own)} with one "
            "of its own): use them one by one, or give one for all with --chat-template FILE"
        )
    adapter, template = next(iter(found.items()), (None, None))
    return template, f"of {adapter}"


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
