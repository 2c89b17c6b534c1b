"""The directory of a run: what lies in it, what it refuses, and the metrics file."""

import dataclasses
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w

from jlora import conversion, paths
from jlora.config import TrainConfig
from jlora.errors import JloraError
from jlora.files import TEMPLATE_FILE, new_directory, write_text

# What may differ between a run and its resumption, since no step depends on it.
_FREE = {"output", "resume", "scan_layers", "remat", "checkpoint_every", "keep_checkpoints"}


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

    def check(self, wanted: TrainConfig) -> None:
        """Refuse to overwrite a run, and to resume one that was another.

        Raises:
            JloraError: the directory holds something and `resume` is not set; `resume` is set and
                there is no run, or one with other settings (each is named).
        """
        if not wanted.resume:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                what = "a run" if self.config_file.is_file() else "files"
                raise JloraError(
                    f"{self.path} holds {what} already; choose another --output, or go on with a "
                    "run that was stopped by --resume"
                )
            return
        if not self.config_file.is_file():
            raise JloraError(f"--resume: {self.path} holds no run ({self.config_file} is absent)")
        first = paths.flatten(conversion.read_toml(self.config_file))
        now = paths.flatten(conversion.to_dict(wanted))
        # Settings that are newer than the run had their default then.
        least = TrainConfig(model=wanted.model, data=wanted.data, output=wanted.output)
        first = paths.flatten(conversion.to_dict(least)) | first
        differing = [
            f"  {key.replace('/', '.')}: {first.get(key)!r} then, {now.get(key)!r} now"
            for key in sorted(first.keys() | now.keys())
            if first.get(key) != now.get(key)
            and key not in _FREE
            # Where it is not given, that of the run's start goes on: see `told`.
            and not (key == "now" and wanted.now is None)
        ]
        if differing:
            raise JloraError(
                f"--resume: {self.path} was started with other settings:\n"
                + "\n".join(differing)
                + "\nresume with the same ones, or start a new run in another --output"
            )

    def told(self, wanted: TrainConfig) -> TrainConfig:
        """Return the settings with the time that templates are told: that of the run's start."""
        now = wanted.now
        if now is None and wanted.resume:
            now = conversion.read_toml(self.config_file).get("now")
        if now is None:
            now = datetime.now().isoformat(timespec="seconds")
        return dataclasses.replace(wanted, now=now)

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
