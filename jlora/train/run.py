"""The directory of a run: what lies in it, what it refuses, and the metrics file."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w

from jlora import conversion, hub, paths
from jlora.config import TrainConfig
from jlora.errors import JloraError
from jlora.files import TEMPLATE_FILE, new_directory, write_text
from jlora.places import local

# What may differ between a run and its resumption: what no step depends on, and what is compared by
# what it holds. Steps are left to `check_steps`.
_FREE = {"output", "resume", "scan_layers", "remat", "checkpoint_every", "keep_checkpoints"}
_FREE |= {"model", "data", "steps", "epochs"}


class Run:
    """Paths and files of one run. Nothing is written before `start`."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.toml"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.chat_template = path / TEMPLATE_FILE
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.loss_plot = path / "loss.png"
        self.samples = path / "samples.md"
        self.before = path / "before.json"
        self.report = path / "report.json"

    def settle(self, wanted: TrainConfig) -> TrainConfig:
        """Return the settings that the run has now: whether it goes on, its model, its time.

        `resume` is True or False in them. A resumed run has the model's commit and the time that
        templates are told from its start, where nothing else is asked for.

        Raises:
            JloraError: the directory holds something and the run is not to go on; or it is, and
                there is no run, or one with other settings (each is named).
        """
        local(self.path, "output")
        self._check_writable()
        resume = self.config_file.is_file() if wanted.resume == "auto" else wanted.resume
        wanted = dataclasses.replace(wanted, resume=resume)
        now = wanted.now or datetime.now().isoformat(timespec="seconds")
        if not resume:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                what = "a run" if self.config_file.is_file() else "files"
                raise JloraError(
                    f"{self.path} holds {what} already; choose another --output, or go on with a "
                    "run that was stopped by --resume"
                )
            return dataclasses.replace(wanted, now=now)
        if not self.config_file.is_file():
            raise JloraError(
                f"--resume: {self.path} holds no run ({self.config_file} is absent); --resume auto "
                "starts one where there is none"
            )
        first = self.settings()
        then, there = (paths.flatten(conversion.to_dict(each)) for each in (first, wanted))
        differing = [
            f"  {key.replace('/', '.')}: {then.get(key)!r} then, {there.get(key)!r} now"
            for key in sorted(then.keys() | there.keys())
            if then.get(key) != there.get(key)
            and key not in _FREE
            and not (key == "now" and wanted.now is None)
        ]
        if differing:
            raise JloraError(
                f"--resume: {self.path} was started with other settings:\n"
                + "\n".join(differing)
                + "\nresume with the same ones, or start a new run in another --output"
            )
        unsaid = hub.revision_of(wanted.model) is None and hub.same_name(wanted.model, first.model)
        return dataclasses.replace(
            wanted,
            model=first.model if unsaid else wanted.model,
            now=wanted.now or first.now or now,
        )

    def _check_writable(self) -> None:
        """Refuse a directory that cannot be made or written, before hours of work are lost to it.

        Raises:
            JloraError: it is within a file, or in a directory that this user may not write to.
        """
        known = next(each for each in (self.path, *self.path.absolute().parents) if each.exists())
        if known != self.path and not known.is_dir():
            raise JloraError(f"{self.path}: {known} is a file; choose another --output")
        if not os.access(known, os.W_OK):
            raise JloraError(
                f"{self.path}: {known} is not to be written to; choose another --output"
            )

    def settings(self) -> TrainConfig:
        """Return the settings in config.toml; those that are newer than it have their defaults.

        Raises:
            JloraError: there is no such file, or not one of a run.
        """
        values = conversion.read_toml(self.config_file)
        if "steps" in values:  # which counted where older runs wrote both
            values.pop("epochs", None)
        return conversion.from_dict(TrainConfig, values, where=str(self.config_file))

    def find_model(self, moved_to: Path | None = None) -> hub.Model:
        """Return the model of a run, where it is now.

        Raises:
            JloraError: it is not there.
        """
        model = moved_to or self.settings().model
        with self.elsewhere(model, "--model"):
            return hub.find(model)

    @contextmanager
    def elsewhere(self, place: str | Path, flag: str) -> Iterator[None]:
        """Add to an error, where a run goes on and `place` is not there, how to say where it is.

        Raises:
            JloraError: the block raised it.
        """
        try:
            yield
        except JloraError as error:
            if not self.config_file.is_file() or Path(place).exists():
                raise
            first = getattr(self.settings(), flag.removeprefix("--"))
            raise JloraError(
                f"{error}\nThe run in {self.path} began with {first}: if that was moved, say with "
                f"{flag} where it is now; it is compared by what it holds"
            ) from None

    def is_finished(self, wanted: TrainConfig) -> bool:
        """Say whether nothing is left to do of the settings `wanted`."""
        if not self.report.is_file():  # the last file that a run writes
            return False
        first = self.settings()
        return (first.steps, first.epochs) == (wanted.steps, wanted.epochs)

    def check_steps(self, done: int, steps: int) -> None:
        """Refuse to end a run before what it has done.

        Raises:
            JloraError: it has done more steps.
        """
        if done > steps:
            raise JloraError(
                f"--resume: {self.path} has done {done} steps, and is to end after {steps}: give "
                f"--steps {done} or more, or start a new run in another --output"
            )

    def check_unmoved(self, settings: TrainConfig) -> None:
        """Refuse another place of model or data while no checkpoint says what they held.

        Raises:
            JloraError: one of them is another.
        """
        first = self.settings()
        for name in ("model", "data"):
            then, there = str(getattr(first, name)), str(getattr(settings, name))
            if Path(then).resolve() != Path(there).resolve():
                raise JloraError(
                    f"--resume: {self.path} has no checkpoint yet, with which {there} could be "
                    f"compared: resume with --{name} {then}, or start a new run in another --output"
                )

    def go_on(self, settings: TrainConfig) -> None:
        """Keep the settings of a resumed run in config.toml; one that was finished no longer is."""
        if self.settings() == (kept := dataclasses.replace(settings, resume=False)):
            return
        self.report.unlink(missing_ok=True)
        write_text(self.config_file, tomli_w.dumps(conversion.to_dict(kept)))

    def start(
        self, config_used: TrainConfig, before: Mapping[str, Any], template: str | None
    ) -> None:
        """Make the directory with config.toml and before.json, at once, unless the run goes on.

        `template` is the chat template that was given, if one was.
        """
        if config_used.resume:
            return
        with new_directory(self.path) as stage:
            write_text(
                stage / self.config_file.name, tomli_w.dumps(conversion.to_dict(config_used))
            )
            write_text(stage / self.before.name, json.dumps(before, indent=2) + "\n")
            if template is not None:
                write_text(stage / self.chat_template.name, template)

    def keep_metrics(self, step: int, last: int) -> None:
        """Drop what is about to be measured again: all after `step`, and the loss after `last`."""
        kept = [
            json.dumps(line) + "\n"
            for line in self.read_metrics()
            if line["step"] <= step and not ("eval_loss" in line and line["step"] == last)
        ]
        write_text(self.metrics_file, "".join(kept))

    def add_metrics(self, values: Mapping[str, Any]) -> None:
        """Append one line. Values depend on the run's settings alone, never on its speed."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines; a last one that a kill cut short is left out."""
        if not self.metrics_file.is_file():
            return []
        text = self.metrics_file.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
