"""What a run measures of itself: loss and answers before and after, samples, speed, the curve."""

import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jlora import evaluate, injection
from jlora.config import TrainConfig
from jlora.data import chat, source
from jlora.data.batching import Batch, Batches
from jlora.data.chat import Example
from jlora.data.records import Record
from jlora.data.split import SPLITS
from jlora.errors import JloraError
from jlora.evaluate import Done
from jlora.generation import generate, stop_ids
from jlora.train.run import Run
from jlora.train.step import eval_step


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model at one moment; None for what the data has no split for."""

    loss: float | None
    """Mean over the trained tokens of the valid split, nats."""
    exact: float | None
    """Fraction of the test split answered to the letter."""
    label: float | None
    """Fraction whose reference is the likeliest of the labels."""
    samples: list[str]


class Measure:
    """Takes the measures that `settings.eval` asks for, on data read once.

    The valid split is used for the loss, the test split for answers (and the labels in labels.txt
    beside the data), and samples are shown of the test, valid or training split.

    Args:
        settings: of the run.
        model_dir: the model's directory.
        tokenizer: the model's.
        splits: name of each split -> its records.
    """

    def __init__(
        self,
        settings: TrainConfig,
        model_dir: Path,
        tokenizer: Any,
        splits: Mapping[str, Sequence[Record]],
    ):
        self.settings, self.tokenizer, self.splits = settings, tokenizer, splits
        wanted = settings.eval
        # A record whose turns are all context has no answer to compare with.
        train, valid, test = (
            [record for record in splits.get(name, ()) if record.trained] for name in SPLITS
        )
        self.valid = valid = valid[: wanted.loss_rows]
        self.labels = source.read_labels(settings.data)
        self.questions = test[: wanted.answer_rows]
        self.shown = (test or valid or train)[: wanted.samples]
        self.stop_ids = stop_ids(model_dir, tokenizer)
        self.batches = None
        if valid:
            examples, _ = chat.encode_all(valid, tokenizer, settings.loader.max_length)
            self.batches = evaluation_batches(examples, settings.loader.batch_size)
        self.loss_rows, self.answer_rows = len(valid), len(self.questions)

    def fingerprint(self) -> str:
        """Return what changes when a row that is measured does, or the labels."""
        rows = [[(r.messages, r.tools) for r in rows] for rows in (self.valid, self.questions)]
        labels = self.labels if self.questions else None
        return hashlib.sha256(json.dumps([rows, labels]).encode()).hexdigest()

    def never_met(self) -> list[str]:
        """Return the keys to be left out that no record of any split has."""
        every = itertools.chain(*self.splits.values())
        met = {name.split(" ")[0] for record in every for name in record.left_out}
        return [key for key in self.settings.loader.ignore if key not in met]

    def before(self, run: Run, model: Callable[[], Any]) -> Measured:
        """Measure the untrained model; a resumed run reads what it wrote the first time."""
        if run.before.is_file():
            return Measured(**json.loads(run.before.read_text(encoding="utf-8")))
        return self.after(model())

    def after(self, model: Any) -> Measured:
        """Measure the model as it is."""
        trained, base = injection.partition(model)
        answers = None
        with progress(self.answer_rows) as done:
            if self.questions:
                answers = evaluate.answers(
                    model,
                    self.tokenizer,
                    self.questions,
                    labels=self.labels,
                    stop_ids=self.stop_ids,
                    done=done,
                )
        prompts = [chat.prompt_tokens(record, self.tokenizer) for record in self.shown]
        samples = []
        if prompts:
            new = generate(
                model,
                prompts,
                max_new_tokens=self.settings.eval.max_new_tokens,
                stop_ids=self.stop_ids,
                batch_size=len(prompts),
            )
            samples = [self.tokenizer.decode(t.tolist(), skip_special_tokens=True) for t in new]
        return Measured(
            loss=self.loss(trained, base),
            exact=answers.exact if answers else None,
            label=answers.label if answers else None,
            samples=samples,
        )

    def loss(self, trained: Mapping[str, Any], base: Any) -> float | None:
        """Mean loss of the valid split, or None without one."""
        if self.batches is None:
            return None
        with progress(self.loss_rows) as done:
            return mean_loss(trained, base, self.batches, done=done)

    def table(self, before: Measured, after: Measured) -> str:
        """What was measured before and after, a line each, and on how many rows."""
        lines = [f"{'':24}{'before':>10}{'after':>10}"]
        for name, field, form, rows in (
            ("exact answers", "exact", ".1%", self.answer_rows),
            ("likeliest label right", "label", ".1%", self.answer_rows),
            ("evaluation loss", "loss", ".4f", self.loss_rows),
        ):
            was, now = getattr(before, field), getattr(after, field)
            if was is not None and now is not None:
                lines.append(f"{name:24}{was:>10{form}}{now:>10{form}}   of {rows} rows")
        return "\n".join(lines)

    def samples_text(self, before: Measured, after: Measured) -> str:
        """samples.md: prompts, references, and the outputs before and after."""
        parts = ["# Outputs before and after training"]
        # Not strict: a run may be resumed with other samples than it had before.
        for record, was, now in zip(self.shown, before.samples, after.samples, strict=False):
            asked = record.messages[max(chat.last_answer(record) - 1, 0)]["content"]
            lines = {"reference": chat.answer_text(record), "before": was, "after": now}
            listed = [f"- **{title}**: {_indented(text)}" for title, text in lines.items()]
            parts.append("\n".join([_quoted(asked), *listed]))
        return "\n\n".join(parts) + "\n"


def evaluation_batches(examples: Sequence[Example], batch_size: int) -> Batches:
    """Every row once, in few shapes."""
    return Batches(examples, batch_size, max_shapes=2, shuffle=False)


@contextmanager
def progress(rows: int) -> Iterator[Done]:
    """Show on a terminal how many of so many rows are measured, and nothing elsewhere.

    Yields:
        what is to be called with the number of rows that were measured since the last call.
    """
    bar = tqdm(total=rows, unit="row", desc="measuring", disable=None, leave=False, file=sys.stderr)
    with bar:
        yield bar.update


def mean_loss(
    trained: Mapping[str, Any], base: Any, batches: Batches, *, done: Done = lambda rows: None
) -> float:
    """Mean loss over all trained tokens of one epoch of `batches`, nats.

    Args:
        trained: the leaves that are trained.
        base: the rest of the model.
        batches: what is measured.
        done: is called with the number of rows of each batch that is measured.

    Raises:
        JloraError: it is not finite.
    """
    sums = []
    for i in range(batches.batches_per_epoch):
        batch = batches.batch_at(i)
        sums.append(jax.block_until_ready(eval_step(trained, base, batch)))
        done(int((batch.rows >= 0).sum()))
    loss, tokens = np.sum(np.asarray(sums, np.float64), axis=0)
    if not np.isfinite(loss):
        raise JloraError(f"the evaluation loss is {loss}: the model's outputs are not finite")
    return float(loss / tokens)


def fingerprint(examples: Sequence[Example]) -> str:
    """Changes when any training token or its mask does."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.tokens.tobytes())
        digest.update(example.trained.tobytes())
    return digest.hexdigest()


class Clock:
    """Tokens a second over the steps alone; the first step of each shape, which compiles, is not
    counted, nor is what happens between steps (evaluation, checkpoints).
    """

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()
        self.tokens, self.seconds = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """A step begins."""
        self.began = time.perf_counter()

    def tick(self, batch: Batch) -> None:
        """A step of `batch` has ended."""
        if batch.tokens.shape in self.shapes:
            self.tokens += int(batch.mask.sum())
            self.seconds += time.perf_counter() - self.began
        self.shapes.add(batch.tokens.shape)

    def rate(self) -> float:
        """Real tokens a second, padding not counted; 0 before the first counted step."""
        return self.tokens / self.seconds if self.seconds else 0.0


def plot_loss(metrics: Sequence[Mapping[str, Any]], before: float | None, file: Path) -> None:
    """Draw the training loss, a running mean of it, and the evaluation losses, to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [m["step"] for m in metrics if "loss" in m]
    losses = [m["loss"] for m in metrics if "loss" in m]
    evals = [] if before is None else [(0, before)]
    evals += [(m["step"], m["eval_loss"]) for m in metrics if "eval_loss" in m]
    window = max(len(steps) // 20, 1)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(steps, losses, color="0.8", label="loss of a step")
    axes.plot(steps[window - 1 :], smooth, label=f"mean of {window} steps")
    if evals:
        axes.plot(*zip(*evals, strict=True), "o-", label="evaluation loss")
    axes.set(xlabel="step", ylabel="nats a token", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _quoted(text: str) -> str:
    return "".join(f"> {line}\n" for line in text.splitlines())


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n  ") or "(nothing)"
