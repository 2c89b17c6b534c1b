"""Frozen configurations: the only home of defaults. Unknown keys are errors that suggest a name."""

import dataclasses
import datetime
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic

from jlora.errors import JloraError, nearest

ALL_LINEAR = "all-linear"
QUANT_KINDS = ("nf4", "fp4", "int8")
CombinationType = Literal[
    "svd", "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
BLOCK_SIZES = tuple(2**i for i in range(5, 13))  # bitsandbytes'

C = TypeVar("C")


class Strict:
    """A dataclass that is read from files and flags: keys that it does not have are refused."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")
    in_buckets: ClassVar[tuple[str, ...]] = ()
    """Paths that may be URLs of buckets; see `jlora.places`."""


def check_least(config: Any, least: Mapping[str, float]) -> None:
    """Demand that fields are at least so large; None is left alone."""
    problems = [
        f"{name} must be at least {bound}, got {value}"
        for name, bound in least.items()
        if (value := getattr(config, name)) is not None and not value >= bound
    ]
    if problems:
        raise JloraError("; ".join(problems))


# Settings of PEFT's LoraConfig that jlora doesn't have, and what they are where they do nothing.
_PEFT_ONLY: dict[str, Any] = {
    "alora_invocation_tokens": None, "arrow_config": None, "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "fan_in_fan_out": False,
    "layer_replication": None, "layers_pattern": None, "loftq_config": {}, "lora_bias": False,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core",
    "target_parameters": None, "use_bdlora": None, "use_dora": False, "use_qalora": False,
}  # fmt: skip


def _names_strangers(cls: type[C]) -> type[C]:
    """Let a dataclass say what is wrong with arguments that it has no field for.

    Settings of PEFT that are at their default are passed over.
    """
    original: Any = cls.__init__
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        problems = []
        for name in [name for name in kwargs if name not in known]:
            value = kwargs.pop(name)
            if name not in _PEFT_ONLY:
                problems.append(f"unknown field {name!r}{nearest(name, known)}")
            elif value != _PEFT_ONLY[name]:
                problems.append(f"PEFT's {name} = {value!r} is not supported yet")
        if problems:
            raise JloraError(f"{cls.__name__}: " + "; ".join(problems))
        original(self, *args, **kwargs)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


_TUPLES = (
    "target_modules", "exclude_modules", "layers_to_transform", "modules_to_save",
    "trainable_token_indices",
)  # fmt: skip


def _one_as_several(value: Any) -> Any:
    """Return a whole number as a tuple of it, and what has no items as None, as PEFT reads them."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return None if value in ((), []) else value


@_names_strangers
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Strict):
    """Which layers get low-rank factors, and how large. Names and meanings are PEFT's.

    W' = W + scaling * B A with A of shape (r, in) and B of shape (out, r), scaling = lora_alpha / r
    (Hu et al. 2021, arXiv:2106.09685), or lora_alpha / sqrt(r) with `use_rslora`
    (Kalajdzievski 2023, arXiv:2312.03732).
    """

    r: int = 8
    """Rank of the update; a site may have its own through `rank_pattern`."""
    lora_alpha: int | float = 8
    """Numerator of the scaling."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """Names (matching whole trailing components), one regular expression that matches the full
    name, or "all-linear": every linear layer but the output head."""
    exclude_modules: str | tuple[str, ...] | None = None
    """Modules left out, matched like `target_modules`."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of A while training."""
    layers_to_transform: Annotated[
        tuple[int, ...] | None, pydantic.BeforeValidator(lambda value: _one_as_several(value))
    ] = None
    """Only these layers, or this one; None means all, as an empty list does."""
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Name or regular expression -> rank; the first that matches the end of a name wins."""
    alpha_pattern: dict[str, int | float] = dataclasses.field(default_factory=dict)
    """Name or regular expression -> alpha; the first that matches the end of a name wins."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) rather than by lora_alpha / r."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """True: A uniform within ±1/sqrt(in), B zero. "gaussian": A normal with deviation 1/r, B zero.
    False: as True but with B random too, so that the adapter does something from the start."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Train also the biases: all of the model's, or those of adapted layers."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules that are trained, and saved, as a whole; matched like `target_modules`."""
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    """Rows of the embedding that are trained: of the only one, or of those named."""
    task_type: str = "CAUSAL_LM"
    """Copied into the exported adapter_config.json; "" is PEFT's null, for models of your own."""

    def __post_init__(self) -> None:
        for name in _TUPLES:
            value: Any = getattr(self, name)
            if isinstance(value, int | list | set):  # as PEFT's users write them
                value = (value,) if isinstance(value, int) else tuple(value)
                object.__setattr__(self, name, value)
        object.__setattr__(self, "layers_to_transform", _one_as_several(self.layers_to_transform))
        problems = []
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, rank in ranks.items():
            if not isinstance(rank, int) or rank < 1:
                problems.append(f"{name} must be a positive integer, got {rank!r}")
        alphas = {"lora_alpha": self.lora_alpha}
        alphas |= {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if not 0 < alpha < math.inf:
                problems.append(f"{name} must be positive, got {alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.init_lora_weights not in (True, False, "gaussian"):
            problems.append(
                f"init_lora_weights must be true, false or 'gaussian', got "
                f"{self.init_lora_weights!r}"
            )
        rows = self.trainable_token_indices or ()
        for some in rows.values() if isinstance(rows, dict) else (rows,):
            if twice := sorted({i for i in some if some.count(i) > 1}):
                problems.append(f"trainable_token_indices has {twice} more than once")
        if self.bias not in ("none", "all", "lora_only"):
            problems.append(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        saved: object = self.modules_to_save
        if isinstance(saved, str):
            problems.append(f"modules_to_save must be a list, got {saved!r}")
        if not self.target_modules:
            problems.append(f"target_modules is empty; name layers or say {ALL_LINEAR!r}")
        targets = self.target_modules if isinstance(self.target_modules, tuple) else ()
        if both := [name for name in targets if name in (self.modules_to_save or ())]:
            problems.append(
                f"{', '.join(both)} cannot be both in target_modules, which get factors, and in "
                "modules_to_save, which are trained as a whole"
            )
        task_type: object = self.task_type
        if not isinstance(task_type, str):  # PEFT's None is no text for TOML
            problems.append(f"task_type must be a string, got {task_type!r}")
        if problems:
            raise JloraError("LoraConfig: " + "; ".join(problems))

    def scaling(self, r: int, alpha: float) -> float:
        """The factor on B A for a site of rank `r` and numerator `alpha`."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig(Strict):
    """How the weights of chosen linear layers are quantised; what is not chosen stays as it is.

    NF4 and double quantisation are those of QLoRA (Dettmers et al. 2023, arXiv:2305.14314), int8
    that of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), for the weights alone. What a layer
    computes in is its own dtype.
    """

    kind: Literal["nf4", "fp4", "int8"] = "nf4"
    """nf4 and fp4: 4 bits, and a scale for each block; int8: a scale for each output."""
    block_size: int = 64
    """Values along the inputs of one output that share a scale; int8 has no blocks."""
    double_quant: bool = False
    """Quantise the scales too, in 8 bits: 0.37 bits less a weight."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """Which layers; names are matched as by `LoraConfig.target_modules`."""
    exclude_modules: str | tuple[str, ...] | None = None
    """Layers left out, matched alike."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value: Any = getattr(self, name)
            if isinstance(value, list | set):
                object.__setattr__(self, name, tuple(value))
        problems = []
        if self.kind not in QUANT_KINDS:
            problems.append(f"kind must be one of {QUANT_KINDS}, got {self.kind!r}")
        if self.block_size not in BLOCK_SIZES:
            problems.append(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size!r}")
        usual = self.block_size == QuantConfig.block_size
        if self.kind == "int8" and (self.double_quant or not usual):
            problems.append("int8 has one scale an output: no block_size and no double_quant")
        if not self.target_modules:
            problems.append(f"target_modules is empty; name layers or say {ALL_LINEAR!r}")
        if problems:
            raise JloraError("QuantConfig: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderConfig(Strict):
    """How records become batches."""

    ignore: tuple[str, ...] = ()
    """Keys of records and turns that are left out, as if they were not there."""
    max_length: int = 1024
    """Tokens kept of a record; the rest is cut away and counted."""
    batch_size: int = 16
    """Rows in a step."""
    max_shapes: int = 4
    """Most lengths that batches are padded to; each is compiled once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig(Strict):
    """AdamW with a linear warm-up and a cosine fall to zero."""

    lr: float = 2e-4
    """Peak learning rate."""
    warmup_steps: int | None = None
    """Steps from zero to the peak; None means a twentieth of all."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
        check_least(self, {"lr": 0, "warmup_steps": 0, "eps": 0, "weight_decay": 0})
        if not self.max_grad_norm > 0:
            raise JloraError(f"max_grad_norm must be positive, got {self.max_grad_norm}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Strict):
    """What is measured before and after training."""

    loss_rows: int = 256
    """Rows of the valid split whose loss is measured."""
    answer_rows: int = 500
    """Rows of the test split that are answered; 0 skips it."""
    every: int = 0
    """Steps between evaluation losses while training; 0 means only before and after."""
    samples: int = 5
    """Outputs shown before and after."""
    max_new_tokens: int = 64
    """Longest of these outputs, in tokens."""

    def __post_init__(self) -> None:
        least = {"loss_rows": 0, "answer_rows": 0, "every": 0, "samples": 0, "max_new_tokens": 1}
        check_least(self, least)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Strict):
    """One training run: `jlora train`."""

    model: Path
    """Hugging Face model directory, or a name on its hub: org/name or org/name@revision."""
    data: str
    """Directory with train/valid/test files, one JSON, JSONL or Parquet file, or a hub name."""
    valid_fraction: float = 0.0
    """Fraction of the training rows that is not trained on but whose loss is measured, where the
    data has no valid split. Rows with the same conversation stay together."""
    test_fraction: float = 0.0
    """Fraction of them that is answered instead, where the data has no test split."""
    output: Path
    """Directory of the run; must not hold one yet, unless with --resume."""
    method: Literal["lora", "qlora", "full"] = "lora"
    """Train low-rank factors, or these on a quantised base, or every weight."""
    resume: bool | Literal["auto"] = False
    """Go on from the last checkpoint in the output directory. auto: or start, where it holds no run
    yet; for scripts that are run again until they are through."""
    steps: int | None = None
    """Optimiser steps. None: as many as `epochs` has."""
    epochs: float | None = None
    """Passes over the training rows, in place of `steps`. None: one, where `steps` is None too."""
    chat_template: Path | None = None
    """File of a chat template (Jinja) to use in place of the model's own. It goes with the run, and
    with what the run exports."""
    now: str | None = None
    """Date and time that the chat template is told if it asks (strftime_now), as
    2026-01-31T12:00:00. None: those of the run's start."""
    seed: int = 0
    """Seed of the initial factors, the order of rows, the rows that --valid-fraction and
    --test-fraction take, and dropout."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base weights and of computation. auto: bfloat16, but float32 on CPU and for --method
    full, where bfloat16 would round small updates away."""
    scan_layers: bool | None = None
    """Stack the layers and scan over them: compiles fast. None: on accelerators only, since a CPU
    runs unrolled layers faster."""
    remat: bool = False
    """Recompute each layer's activations in the backward pass: less memory, more time."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loader: LoaderConfig = dataclasses.field(default_factory=LoaderConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        least = {"steps": 1, "epochs": 0, "seed": 0, "checkpoint_every": 1, "keep_checkpoints": 1}
        check_least(self, least)
        check_least(self, {"valid_fraction": 0, "test_fraction": 0})
        if not self.valid_fraction + self.test_fraction < 1:
            raise JloraError(
                f"valid_fraction = {self.valid_fraction} and test_fraction = {self.test_fraction} "
                "leave nothing to train on: together they must be below 1"
            )
        if self.steps is not None and self.epochs is not None:
            raise JloraError(
                f"steps = {self.steps} and epochs = {self.epochs} each say how long to train; give "
                "one of them"
            )
        if self.epochs is not None and not math.isfinite(self.epochs):
            raise JloraError(f"epochs must be finite, got {self.epochs}")
        try:
            datetime.datetime.fromisoformat(self.now or "2026-01-31")
        except ValueError:
            raise JloraError(
                f"now must be a date and time as 2026-01-31T12:00:00, got {self.now!r}"
            ) from None
