"""One training run, from a model directory and records to an adapter, read from top to bottom."""

import dataclasses
import json
import math
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from jlora import canonical, checkpoint, conversion, fingerprint, hub, injection, optim, peft
from jlora.config import QuantConfig, TrainConfig
from jlora.data import chat, split
from jlora.data.batching import Batch, Batches
from jlora.errors import JloraError
from jlora.files import read_template, write_text
from jlora.models import families, load
from jlora.models.directory import Directory
from jlora.train import measure
from jlora.train.checkpoint import RunCheckpoints
from jlora.train.run import Run
from jlora.train.step import Metrics, init_state, make_train_step

PADDING_LIMIT = 0.2


class Stopped(SystemExit):
    """A signal ended the run after a checkpoint; the exit status is 128 + the signal's number."""


class Pending(NamedTuple):
    """A step whose metrics are not read yet, so that the device need not wait for the host."""

    step: int
    batch: Batch
    metrics: Metrics


def train(settings: TrainConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run `settings`, write the run's directory, and return what report.json says.

    Raises:
        JloraError: bad input, before anything is written; a loss or gradient that is not finite,
            naming step and rows, with all earlier checkpoints kept.
        Stopped: SIGTERM or SIGINT came; the state was saved first.
    """
    run = Run(settings.output)
    adapts = settings.method != "full"
    dtype = load.compute_dtype(settings.dtype, exact=not adapts)
    settings = dataclasses.replace(settings, dtype=dtype.name)  # "auto" may differ at a resumption
    settings = run.settle(settings)
    if settings.resume and run.is_finished(settings):
        say(f"{run.path} is finished: this is what it left\n\n{run.samples.read_text('utf-8')}")
        return json.loads(run.report.read_text(encoding="utf-8"))
    with run.elsewhere(settings.data, "--data"):
        splits = split.read(
            settings.data,
            ignore=settings.loader.ignore,
            valid_fraction=settings.valid_fraction,
            test_fraction=settings.test_fraction,
            seed=settings.seed,
        )
    with run.elsewhere(settings.model, "--model"):
        base_model = hub.find(settings.model)
    settings = dataclasses.replace(settings, model=Path(base_model.pinned))
    directory = Directory.open(base_model.directory)  # says best what is wrong with it
    template = run.chat_template if run.chat_template.is_file() else settings.chat_template
    tokenizer = chat.load_tokenizer(
        directory.path,
        directory.config.vocab_size,
        template=None if template is None else read_template(template),
        template_name=str(template),
        now=datetime.fromisoformat(settings.now or ""),
    )
    examples, encoded = chat.encode_all(splits["train"], tokenizer, settings.loader.max_length)
    families.warn_of_length(
        directory.config, max(len(example.tokens) for example in examples), "training rows"
    )
    batches = Batches(
        examples,
        settings.loader.batch_size,
        max_shapes=settings.loader.max_shapes,
        seed=settings.seed,
    )
    steps = _steps(settings, batches)
    tx, rate = optim.adamw(settings.optim, steps), optim.schedule(settings.optim, steps)
    measured = measure.Measure(settings, directory.path, tokenizer, splits)
    say(f"training data: {encoded}; {_padding(batches, settings.loader.max_shapes)}")
    if strangers := measured.never_met():
        say(f"--loader.ignore: no record has {', '.join(strangers)}")
    if settings.valid_fraction or settings.test_fraction:
        say(
            f"of the rows in {settings.data} "
            + ", ".join(f"{len(records)} are for {name}" for name, records in splits.items())
        )
    if len(splits) == 1:
        say(
            "there is no valid or test split: no loss or answers are measured before and after "
            "(--valid-fraction 0.1 and --test-fraction 0.1 part some of the rows off for it)"
        )
    say(f"the first row, what is trained in [[ ]]:\n{chat.show_mask(examples[0], tokenizer)}")

    on_cpu = jax.default_backend() == "cpu"
    scan = not on_cpu if settings.scan_layers is None else settings.scan_layers
    options: dict[str, Any] = {"dtype": dtype, "scan_layers": scan, "remat": settings.remat}
    if adapts:  # a target that matches nothing is known before any weight is read
        plan = injection.plan(load.abstract(directory, **options), settings.lora)
        peft.check_exportable(plan)
    model: Any = load.load(directory, **options, quant=_quant(settings, directory))
    key_init, key_dropout = jax.random.split(jax.random.key(settings.seed))
    if adapts:
        injection.inject(model, settings.lora, rngs=key_init)
        counts = injection.count(model)
    else:
        counts = (injection.count(model)[1],) * 2
    say(injection.summary_line(*counts))
    trained_on = fingerprint.of(model)
    stacks = injection.stacks(model)
    trained, base = injection.partition(model, everything=settings.method == "full")
    del model  # the first step consumes its trained leaves
    # Factors are small; a second copy of every weight would not be.
    lists = canonical.layer_lists(trained) if adapts else {}
    state = init_state(canonical.restack(trained, lists), tx, key_dropout)
    del trained

    def leaves() -> dict[str, Any]:
        """What is trained, in the model's shape."""
        return canonical.unstack(state.trained, lists)

    known_before = run.before.is_file()
    if not known_before:
        say("measuring the model as it is …")
    before = measured.before(run, lambda: injection.combine(leaves(), base))
    if before.loss is not None and not known_before:
        say(f"step 0 of {steps}: evaluation loss {before.loss:.4f}")
    run.start(settings, dataclasses.asdict(before), tokenizer.template)
    checkpoints = RunCheckpoints(
        run.checkpoints,
        stacks | lists,
        settings.keep_checkpoints,
        plan.ranks if adapts else None,
    )
    data_key, measured_key = measure.fingerprint(examples), measured.fingerprint()
    rows_seen = 0
    if checkpoints.latest_step() is not None:
        state, meta = checkpoints.restore(state)
        known_data = meta["data"]
        for what, then, now in (
            ("training", known_data["fingerprint"], data_key),
            ("valid or test", known_data.get("measured", measured_key), measured_key),
        ):
            if then != now:
                raise JloraError(
                    f"--resume: the {what} rows of {settings.data} are not those that the run "
                    "began with; restore them, or start a new run"
                )
        known = checkpoint.base_of(meta, run.checkpoints)
        if differs := known.differences(trained_on) if known else []:
            title = f"--resume: {run.path} was trained on another base than {base_model.pinned}:"
            lines = [title, *(f"  {line}" for line in differs)]
            raise JloraError("\n".join([*lines, "restore that model, or start a new run"]))
        run.check_steps(int(state.step), steps)
        rows_seen = known_data["rows_seen"]
        say(f"going on after step {int(state.step)} of {steps}")
    elif settings.resume:
        run.check_unmoved(settings)
    first = int(state.step)
    if settings.resume:
        if (planned := _steps(run.settings(), batches)) != steps:
            was = optim.schedule(settings.optim, planned)(max(first - 1, 0))
            say(
                f"the run was to end after step {planned}, and is now to end after step {steps}: "
                f"the learning rate warms up and falls over all {steps} steps, so it goes on at "
                f"{rate(first):.3g}, where it was {was:.3g}"
            )
        run.go_on(settings)
    run.keep_metrics(first, steps)

    def meta_of(step: int) -> dict[str, Any]:
        position = {
            "epoch": step // batches.batches_per_epoch,
            "batch": step % batches.batches_per_epoch,
            "rows_seen": rows_seen,
            "fingerprint": data_key,
            "measured": measured_key,
        }
        kind = checkpoint.lora_meta(settings.lora, trained_on) | {"method": settings.method}
        return kind | {"step": step, "data": position, "train": conversion.to_dict(settings)}

    def read(done: Pending) -> None:
        """Note and show a step's metrics; stop the run if they are not finite."""
        loss, norm = float(done.metrics.loss), float(done.metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            where = [examples[row].where for row in done.batch.rows if row >= 0]
            raise JloraError(
                f"step {done.step}: loss {loss}, gradient norm {norm}; rows of this step: "
                f"{', '.join(where)}. Look at these rows, or lower optim.lr; earlier checkpoints "
                f"are kept in {run.checkpoints}"
            )
        run.add_metrics(
            {
                "step": done.step,
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": float(rate(done.step - 1)),
                "tokens": int(done.batch.mask.sum()),
                "trained_tokens": int(done.batch.targets.sum()),
            }
        )
        bar.set_postfix(loss=f"{loss:.4f}", tok_s=f"{clock.rate():.0f}")
        if bar.disable and done.step % 10 == 0:  # no terminal, where a bar would show
            speed = f", {clock.rate():.0f} tokens/s" if clock.rate() else ""
            say(f"step {done.step} of {steps}: loss {loss:.4f}{speed}")

    train_step = make_train_step(tx, lists)
    clock = measure.Clock()
    pending: Pending | None = None
    bar = tqdm(total=steps, initial=first, unit="step", disable=None, file=sys.stderr)
    with closing(checkpoints), bar, stop_signals() as signals:
        for step in range(first + 1, steps + 1):
            batch = batches.batch_at(step - 1)
            state, metrics = train_step(state, base, batch)
            rows_seen += int((batch.rows >= 0).sum())
            if pending is not None:
                read(pending)
            pending = Pending(step, batch, metrics)
            if on_cpu:  # the host's work would take the step's own cores
                jax.block_until_ready(metrics)
            clock.tick(batch)
            bar.update()
            stop = bool(signals)  # looked at once: a signal that comes below waits for a step
            save = step == steps or step % settings.checkpoint_every == 0 or stop
            evaluate = settings.eval.every and step % settings.eval.every == 0 and step < steps
            if save or evaluate:
                read(pending)  # nothing that is not finite is ever saved
                pending = None
            if evaluate and (loss := measured.loss(leaves(), base)) is not None:
                run.add_metrics({"step": step, "eval_loss": loss})
                with bar.external_write_mode():  # on a terminal, above the bar
                    say(f"step {step} of {steps}: evaluation loss {loss:.4f}")
            if save:
                checkpoints.save(state, meta_of(step))
            if stop or (signals and step == steps):
                checkpoints.close()
                say(f"{signals[0].name}: saved step {step} of {steps}; go on with --resume")
                raise Stopped(128 + signals[0].value)
            clock.restart()

    say("measuring the trained model …")
    final = injection.combine(leaves(), base)
    after = measured.after(final)
    if after.loss is not None:
        run.add_metrics({"step": steps, "eval_loss": after.loss})
        say(f"step {steps} of {steps}: evaluation loss {after.loss:.4f}")
    if adapts:
        peft.export_peft(
            run.adapter,
            final,
            settings.lora,
            base_model=base_model.name,
            base_revision=base_model.commit,
            chat_template=tokenizer.template,
        )
        output = run.adapter / peft.WEIGHTS_FILE
    else:
        shutil.rmtree(run.model, ignore_errors=True)  # of a process that was stopped right here
        load.save(final, run.model, source=directory.path, chat_template=tokenizer.template)
        output = run.model / "model.safetensors"
    measure.plot_loss(run.read_metrics(), before.loss, run.loss_plot)
    write_text(run.samples, measured.samples_text(before, after))
    report = {
        "method": settings.method,
        "trainable_params": counts[0],
        "all_params": counts[1],
        "accuracy_before": before.exact,
        "accuracy_after": after.exact,
        "label_accuracy_before": before.label,
        "label_accuracy_after": after.label,
        "answer_rows": measured.answer_rows,
        "eval_loss_before": before.loss,
        "eval_loss_after": after.loss,
        "loss_rows": measured.loss_rows,
        "steps": steps,
        "rows_seen": rows_seen,
        "tokens_per_second": clock.rate() or None,
        "padding": batches.padding_fraction(),
        "adapter_bytes": output.stat().st_size,
        "peak_rss_bytes": peak_rss_bytes(),
        "output": str(output.parent),
    }
    write_text(run.report, json.dumps(report, indent=2) + "\n")
    say(run.samples.read_text(encoding="utf-8"))
    if len(splits) > 1:
        say(measured.table(before, after))
    say(f"\nthe {'adapter' if adapts else 'model'} lies in {output.parent}")
    return report


def _steps(settings: TrainConfig, batches: Batches) -> int:
    """Return how many steps a run has in all."""
    if settings.steps is not None:
        return settings.steps
    epochs = 1.0 if settings.epochs is None else settings.epochs
    return math.ceil(epochs * batches.batches_per_epoch)


def _quant(settings: TrainConfig, directory: Directory) -> QuantConfig | None:
    """How weights are to be quantised as they are read.

    Raises:
        JloraError: they are already, and the settings ask for something else.
    """
    asked = settings.quant != QuantConfig()
    if not load.is_quantised(directory):
        if asked and settings.method != "qlora":
            raise JloraError("--quant is how --method qlora quantises; this is another method")
        return settings.quant if settings.method == "qlora" else None
    if settings.method == "full":
        raise JloraError(
            f"--method full: the weights in {directory.path} are quantised, and codes cannot be "
            "trained; use --method qlora, or the original model"
        )
    if asked:
        raise JloraError(
            f"--quant: the weights in {directory.path} are quantised already, and are used as they "
            "are; leave it out, or use the original model"
        )
    return None


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGTERM and SIGINT, so that a step can end and be saved; a second one kills."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, handlers[number])

    watched = (signal.SIGTERM, signal.SIGINT)
    try:
        handlers: dict[int, Any] = {n: signal.signal(n, note) for n in watched}
    except ValueError:  # not in the main thread: signals are the caller's
        handlers = {}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def peak_rss_bytes() -> int:
    """Most memory that this process had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _padding(batches: Batches, max_shapes: int) -> str:
    padding = batches.padding_fraction()
    line = f"lengths {[length for _, length in batches.shapes]}, {padding:.1%} padding"
    if padding > PADDING_LIMIT and len(batches.shapes) == max_shapes:
        line += f" (over {PADDING_LIMIT:.0%}: raise loader.max_shapes above {max_shapes})"
    return line
