"""An adapter into the weights of a Hugging Face directory: few rows at a time, from file to file.

Each weight is added to in float32 and rounded once. What that rounds away is measured against what
training saw, for which weights that were quantised in training are quantised again.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora import adapter, adapters, fingerprint, injection, verify
from jlora.adapter import LORA_A, LORA_B, LORA_TOKENS
from jlora.checkpoint import StoredAdapter
from jlora.commands import MergeConfig
from jlora.config import QuantConfig
from jlora.data import chat
from jlora.errors import JloraError
from jlora.files import TEMPLATE_FILE, demand_free, new_directory, write_tensors, write_text
from jlora.models import load
from jlora.models.directory import Directory
from jlora.models.tensors import INDEX, Tensors
from jlora.quant import checks
from jlora.quant.array import QuantArray
from jlora.quant.quantize import quantize_rows
from jlora.targets import Plan

_BLOCK = 2**22  # values of a weight that are held in float32


@dataclasses.dataclass
class Merged:
    """What was merged, and what rounding made of it. `str` says it in lines."""

    into: str
    """"original" or "dequantized": the weights that were added to."""
    changed: int = 0
    """How many weights the adapter changes."""
    delta: float = 0
    """Frobenius norm of the change."""
    weights: float = 0
    """That of the weights that it changes."""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """For each choice of `into` that there was: norm of what was (or would be) written less what
    training saw, over all weights that are adapted or quantised."""
    unseen: bool = False
    """Whether training saw other weights than there are: not quantised, or otherwise."""
    verified: verify.Verified | None = None

    def __str__(self) -> str:
        share = f" ({self.delta / self.weights:.2%} of |W|)" if self.weights else ""
        lines = [f"merged {self.changed} weights: |ΔW| = {self.delta:.4g}{share}"]
        for into, error in self.errors.items():
            share = f" ({error / self.delta:.2%} of |ΔW|)" if self.delta else ""
            kind = f"into the {into} weights" if len(self.errors) > 1 else "rounding"
            written = ", as written" if len(self.errors) > 1 and into == self.into else ""
            saw = "W + ΔW" if self.unseen else "what training saw"
            lines.append(f"{kind}: off by {error:.4g}{share} from {saw}{written}")
        if self.unseen:
            lines.append(
                "the adapter was trained on weights that were not quantised, or otherwise than "
                "these: what that costs is in the merged model, and not in these lines"
            )
        return "\n".join(lines if self.verified is None else [*lines, str(self.verified)])


def merge(settings: MergeConfig, *, quant: QuantConfig | None = None) -> Merged:
    """Write a model directory with the adapter in its weights: shards and names as they were.

    Beside the adapter, which has whole what was saved as a whole, a few blocks of rows are in
    memory, and a quantised weight's codes. What the adapter replaces is mapped while its norm is
    taken.

    Args:
        settings: from where to where; into which weights, where there is a choice.
        quant: how the base was quantised in training, of an adapter that does not say so itself.

    Raises:
        JloraError: an adapter that is of another base, or does not fit, or changes nothing; no
            choice of weights where there are two; logits that differ by more than the bound.
            Nothing is left behind then.
    """
    demand_free(settings.to)  # before the work
    model_dir = settings.model
    directory = Directory.open(model_dir)
    tensors = directory.tensors
    stored = adapters.read(settings.adapter)
    if stored.base is not None:
        quant = stored.base.quant_config()
    if tensors.quantised:
        quant = None
    into = _choose(settings, bool(tensors.quantised), quant)
    model = load.abstract(directory)
    prompts = None
    if settings.verify is not None:
        tokenizer = chat.load_tokenizer(
            model_dir, model.config.vocab_size, template=stored.chat_template
        )
        prompts = verify.read_prompts(settings.verify, tokenizer)
    base = fingerprint.of_directory(directory, model)
    adapters.check_base(stored, base, force=settings.force)
    leaves, _ = injection.partition(model, everything=True)
    places = {}
    for path, leaf in leaves.items():
        _, transposed = directory.name(path)
        for name, shape in directory.expected(path, leaf.shape):  # a tied head's copy stays one
            places[name] = _Place(path, transposed, shape)
    packed = load.mark(model, tensors, quant)
    read = load.weights_of(directory)
    stored, plan = adapters.fitted(stored, model, weights=read, force=settings.force)
    checks.whole([path for path in plan.whole if path in packed])
    whole = {path: leaf for path, leaf in load.views(directory, model) if path in plan.whole}
    found = adapters.norms(stored, whole)
    adapters.report(stored, found, allow_zero=settings.force)
    weights = _Weights(settings, directory, places, stored, plan, packed, quant, into)
    with new_directory(settings.to) as stage:
        changes: dict[str, Any] = {"quantization_config": None}
        if settings.dtype != "auto":
            changes |= {"dtype": None, "torch_dtype": settings.dtype}
        load.copy_beside(model_dir, stage, **changes)
        if stored.chat_template is not None:
            write_text(stage / TEMPLATE_FILE, stored.chat_template)
        _write(stage, tensors, weights, indexed=tensors.indexed)
        merged = Merged(into, len(found), math.hypot(*found.values()), *weights.measured())
        saw = None if stored.base is None else stored.base.quant
        merged.unseen = saw is not None and any(own != saw for own in weights.stored_as)
        if prompts is not None:
            seen = quant if into == "dequantized" else None
            merged.verified = verify.compare(
                lambda: load.load(directory, quant=seen),
                stored,
                stage,
                prompts,
                eps=weights.eps,
                bound=settings.verify_bound,
                force=settings.force,
            )
    return merged


class _Place(NamedTuple):
    """Where a tensor is in the model."""

    path: str
    transposed: bool
    shape: tuple[int, ...]
    """On disk."""


def _choose(settings: MergeConfig, quantised: bool, quant: QuantConfig | None) -> str:
    """Into which weights to merge.

    Raises:
        JloraError: they are not there, or were not chosen though there are two.
    """
    into = settings.into
    if quantised and into == "original":
        raise JloraError(
            f"--into original: the weights in {settings.model} are quantised, and the original "
            "ones are not there; give the directory that they were quantised from as --model"
        )
    if quantised:
        return "dequantized"
    if quant is None and into == "dequantized":
        raise JloraError(
            "--into dequantized: the adapter was trained on weights that were not quantised, and "
            f"neither are those in {settings.model}; leave it out"
        )
    if quant is not None and into is None:
        raise JloraError(
            f"the adapter was trained on weights quantised to {quant.kind}, and "
            f"{settings.model} holds the original ones: say which to merge into. --into "
            "dequantized is what training saw, so that the merged model answers as the adapted one "
            "did. --into original keeps the weights from before they were quantised, for which "
            "the adapter was not trained. The error of each is printed"
        )
    return into or "original"


def _write(stage: Path, tensors: Tensors, weights: "_Weights", *, indexed: bool) -> None:
    """Write the shards, and their index where there was one."""
    where: dict[str, str] = {}
    size = 0
    for file, names in tensors.files().items():
        layout = {name: (weights.dtype(name), weights.shape(name)) for name in names}
        write_tensors(stage / file, layout, weights.pieces)
        where |= dict.fromkeys(names, file)
        size += sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    if indexed:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        write_text(stage / INDEX, json.dumps(index, indent=2) + "\n")


class _Weights:
    """The merged tensors of a directory, and sums of squares of what was read and rounded."""

    def __init__(
        self,
        settings: MergeConfig,
        directory: Directory,
        places: Mapping[str, _Place],
        stored: StoredAdapter,
        plan: Plan,
        packed: set[str],
        quant: QuantConfig | None,
        into: str,
    ):
        self.settings, self.tensors, self.places = settings, directory.tensors, places
        self.embedding, _ = directory.name("model/embed_tokens/embedding")
        self.factors, self.plan = stored.factors, plan
        self.packed, self.quant, self.into = packed, quant, into
        self.targets = {target.site.weight_path: target for target in plan.targets}
        self.tokens = {f"{path}/embedding": path for path in plan.tokens}
        self.stored_as: list[dict[str, Any]] = []
        """How each weight that is quantised on disk is, as a fingerprint says it."""
        self.eps = 0.0
        """Of the coarsest dtype that a changed weight was rounded to."""
        self.read = 0.0
        self.errors = dict.fromkeys(("dequantized", "original") if quant else (into,), 0.0)

    def measured(self) -> tuple[float, dict[str, float]]:
        """|W| of what the adapter changes, and the errors."""
        return math.sqrt(self.read), {name: math.sqrt(x) for name, x in self.errors.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that a tensor is written in."""
        place = self.places.get(name)
        return self.tensors.view(name).shape if place is None else place.shape

    def dtype(self, name: str) -> Any:
        """The dtype that a tensor is written in: its own unless another was asked for."""
        like = self.embedding if name in self.tensors.quantised else name
        own = jnp.dtype(self.tensors.dtype(like))
        given = self.settings.dtype
        return jnp.dtype(given) if given != "auto" and jnp.issubdtype(own, jnp.floating) else own

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The rows of a tensor as they are written, in order."""
        dtype, shape = self.dtype(name), self.shape(name)
        path, transposed, _ = self.places.get(name, _Place("", False, shape))
        adapted = path in {*self.targets, *self.factors, *self.tokens}
        q = self._quantised(name, path)
        for rows in _blocks(shape):
            if not adapted and q is None:
                yield _rounded(self.tensors.read(name, rows), dtype, name)
                continue
            base = {}
            if name not in self.tensors.quantised:
                base["original"] = self.tensors.read(name, rows).astype(np.float32)
            if q is not None:
                base["dequantized"] = _dequantized(q, rows)
            seen = "original" if q is None else "dequantized"
            self.read += _squares(base[seen]) if adapted else 0
            values = {into: self._changed(w, path, rows, transposed) for into, w in base.items()}
            written = {into: _rounded(value, dtype, name) for into, value in values.items()}
            for into in self.errors:
                value = written[into if into in base else seen]
                self.errors[into] += _squares(value.astype(np.float32) - values[seen])
            self.eps = max(self.eps, float(jnp.finfo(dtype).eps))
            yield written[self.into if self.into in base else seen]

    def _quantised(self, name: str, path: str) -> QuantArray | None:
        """The codes of a weight that is quantised, or was in training."""
        if path not in self.packed:
            return None
        if self.quant is None:
            out, size = self.shape(name)
            q = self.tensors.read_quantised(name, (out, size), np.float32)
            self.stored_as.append(fingerprint.quant_of(q))
        else:
            q = quantize_rows(
                self.tensors.read(name),
                kind=self.quant.kind,
                block_size=self.quant.block_size,
                double_quant=self.quant.double_quant,
                path=name,
            )
        nothing: Any = dict.fromkeys(("nested_codes", "nested_absmax", "offset"))
        return dataclasses.replace(q, absmax=np.asarray(q.scales()), **nothing)

    def _changed(self, weight: np.ndarray, path: str, rows: slice, transposed: bool) -> np.ndarray:
        """Some rows of a weight, float32, with what the adapter makes of them."""
        if path in self.factors:  # trained as a whole
            value = np.asarray(self.factors[path], np.float32)
            return (value.T if transposed else value)[rows]
        if target := self.targets.get(path):
            a, b = (self.factors[target.site.leaf(factor)] for factor in (LORA_A, LORA_B))
            if transposed:
                b = b[:, rows]
                shape = (target.site.shape[0], len(weight))
            else:
                a = a[:, rows]
                shape = (len(weight), target.site.shape[1])
            site = dataclasses.replace(target.site, shape=shape)
            delta = np.asarray(adapter.delta_weight(site, a, b, target.scaling))
            weight = weight + (delta.T if transposed else delta)
        if parent := self.tokens.get(path):
            added = np.asarray(self.factors[f"{parent}/{LORA_TOKENS}"], np.float32)
            weight = weight.copy()
            for row, more in zip(self.plan.tokens[parent], added, strict=True):
                if rows.start <= row < rows.stop:
                    weight[row - rows.start] += more
        return weight


def _rounded(values: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """Values in the dtype that they are written in.

    Raises:
        JloraError: some are beyond it.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype, copy=False)
    if rounded is not values and (np.isfinite(values) & ~np.isfinite(rounded)).any():
        raise JloraError(
            f"{name}: values beyond the largest of {dtype}, {float(jnp.finfo(dtype).max):.4g}; "
            "write them with --dtype float32 or bfloat16"
        )
    return rounded


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows that together are all of an array, few enough at a time."""
    count = shape[0] if shape else 1
    step = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def _dequantized(q: QuantArray, rows: slice) -> np.ndarray:
    """float32 rows (out) of the checkpoint's weight (out, in)."""
    size = (rows.stop - rows.start,)
    own: Any = {"codes": q.codes[..., rows], "absmax": q.absmax[..., rows], "out_shape": size}
    return np.asarray(dataclasses.replace(q, **own).dequantize(jnp.float32)).T


def _squares(x: Any) -> float:
    return float(np.square(x, dtype=np.float32).sum(dtype=np.float64))
