"""Hugging Face directories to models and back: every key accounted for, one tensor at a time."""

import dataclasses
import functools
import json
import re
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jlora import canonical, hub, injection, paths
from jlora.config import QuantConfig
from jlora.errors import JloraError
from jlora.files import TEMPLATE_FILE, demand_free, new_directory, save_tensors, write_text
from jlora.matching import dotted
from jlora.models import families
from jlora.models.directory import HEAD, Directory
from jlora.models.tensors import Tensors, has_weights
from jlora.models.transformer import CausalLM
from jlora.quant import bitsandbytes
from jlora.quant.array import QuantArray, WeightPath
from jlora.quant.quantize import empty, quantize_rows, stack, transpose_into

# What belongs to a model beside its weights: configurations, tokenizer, chat template.
_COPIED = {".json", ".jinja", ".txt", ".model"}
# What tells of weights, these or others, of an adapter, or of where the directory came from.
_NOT_COPIED = re.compile(r".*\.index\.json|adapter_.*|jlora_source\.json")


def load(
    model_dir: str | Path | Directory,
    *,
    dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: bool = False,
    quant: QuantConfig | None = None,
) -> CausalLM:
    """Read a model of the Llama family from a Hugging Face directory, or from its hub.

    Weights that bitsandbytes has quantised stay so, to the bit.

    Args:
        model_dir: holds config.json and model.safetensors, or its shards and their index; or a name
            on the hub, "org/name" or "org/name@revision".
        dtype: of the weights in memory and of computation; each tensor is converted as it is read.
        scan_layers: stack the layers and scan over them.
        remat: recompute each layer's activations in the backward pass.
        quant: quantise weights, each as it is read: memory never holds more than the quantised
            model and one or two tensors beside it (benchmarks/host_memory.py measures it).

    Raises:
        JloraError: files that are missing, truncated or no safetensors; keys that are missing or
            that nothing reads, and shapes that do not fit the configuration, all at once; what
            cannot be quantised, or is already.
    """
    if not isinstance(model_dir, Directory):
        model_dir = hub.find(model_dir).directory
    directory = Directory.open(model_dir)
    model = abstract(directory, dtype=dtype, scan_layers=scan_layers, remat=remat)
    stacks = injection.stacks(model)
    packed = mark(model, directory.tensors, quant)
    leaves, base = injection.partition(model, everything=True)
    check(directory, leaves, stacks)
    loaded = {
        path: _read_packed(path, leaf, stacks, directory, quant)
        if path in packed
        else _read(path, leaf, stacks, directory)
        for path, leaf in leaves.items()
    }
    return injection.combine(loaded, base)


def is_quantised(model_dir: Path | Directory) -> bool:
    """Return whether a directory holds weights that bitsandbytes quantised."""
    return bool(Directory.open(model_dir).tensors.quantised)


def _demand_plain(tensors: Tensors) -> None:
    if tensors.quantised:
        raise JloraError(
            f"{len(tensors.quantised)} weights are quantised already, "
            f"{min(tensors.quantised)} for one: leave quant out, or start from the original model"
        )


def mark(model: CausalLM, tensors: Tensors, quant: QuantConfig | None) -> set[str]:
    """Have the layers whose weights are or will be quantised say so; the paths of these weights.

    Raises:
        JloraError: what is quantised is no linear layer's weight; what cannot be, or is already.
    """
    if quant is not None:
        _demand_plain(tensors)
    known = {f"{dotted(name)}.weight" for site in injection.sites(model) for name in site.names}
    if strange := tensors.quantised - known:
        raise JloraError(
            f"{', '.join(sorted(strange)[:5])}: quantised, but no linear layer's weight: was the "
            "checkpoint damaged, or written for another model?"
        )
    if quant is not None:
        sites = injection.to_quantise(model, quant)
    else:
        sites = []
        for site in injection.sites(model):
            stored = [f"{dotted(name)}.weight" in tensors.quantised for name in site.names]
            if any(stored) and not all(stored):
                raise JloraError(
                    f"{site.path}: some layers of the checkpoint are quantised and some are not, "
                    "which cannot be stacked: load with scan_layers=False"
                )
            if any(stored):
                sites.append(site)
    injection.mark_quantised(model, sites)
    return {site.weight_path for site in sites}


def compute_dtype(name: str, *, exact: bool = False) -> Any:
    """The dtype called `name`.

    "auto" is bfloat16, but float32 on CPU, where XLA has no fast bfloat16, and where the weights
    themselves are trained (`exact`): bfloat16 would round small updates away.
    """
    if name == "auto":
        name = "float32" if exact or jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def abstract(
    model_dir: str | Path | Directory,
    *,
    dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: bool = False,
) -> CausalLM:
    """Return the model of a directory, or of a config.json, with shapes for weights.

    That is what names and counts need. Where there are weights, they say if the head is tied.
    """
    if not isinstance(model_dir, Directory) and has_weights(Path(model_dir)):
        model_dir = Directory.open(model_dir)
    if isinstance(model_dir, Directory):
        config = model_dir.config
    else:
        config = families.read_config(Path(model_dir))
    # One key for all: nnx.Rngs counts its draws, and traced that takes seconds for many layers.
    key = jax.random.key(0)
    rngs: Any = types.SimpleNamespace(params=lambda: key)
    return nnx.eval_shape(
        lambda: CausalLM(config, rngs=rngs, dtype=dtype, scan_layers=scan_layers, remat=remat)
    )


def weights_of(model_dir: str | Path | Directory) -> Callable[[str], np.ndarray | None]:
    """Return what reads a leaf of a directory's model by its canonical path, without the rest.

    The directory is opened when the first leaf is asked for, and once. Of what is quantised the
    reader gives None.
    """
    opened = functools.cache(lambda: Directory.open(model_dir))
    return lambda path: opened().read(path)


def views(directory: Directory, model: CausalLM) -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) of each parameter as it lies on disk, to look at few of its values.

    Args:
        directory: a model's.
        model: its model with its layers unrolled; may be abstract.

    Yields:
        What reads values as they are looked at; of what is quantised a jax.ShapeDtypeStruct.

    Raises:
        JloraError: weights that are not the model's, as for `load`.
    """
    tensors = directory.tensors
    leaves, _ = injection.partition(model, everything=True)
    check(directory, leaves, {})
    for path, leaf in leaves.items():
        name, transposed = directory.name(path)
        if name in tensors.quantised:
            yield path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        else:
            yield path, tensors.view(name).T if transposed else tensors.view(name)


def save(model: CausalLM, to: Path, *, source: Path, chat_template: str | None = None) -> None:
    """Write a Hugging Face directory: the model's weights in its dtype, the rest from `source`.

    Quantised weights are written as bitsandbytes does, for transformers to load.

    Args:
        model: its weights go to model.safetensors, under Hugging Face's names.
        to: appears whole or not at all.
        source: the directory that the model was loaded from.
        chat_template: is written in place of that of `source`.
    """
    leaves, _ = injection.partition(model, everything=True)
    tensors: dict[str, np.ndarray] = {}
    packed: dict[str, QuantArray] = {}
    for path, leaf in canonical.unstack(leaves, injection.stacks(model)).items():
        name, transposed = families.hf_name(path)
        if isinstance(leaf, QuantArray):
            packed[name] = leaf
            module = name.removesuffix("weight")
            parts = bitsandbytes.to_tensors(leaf, path=name)
            tensors |= {f"{module}{part}": value for part, value in parts.items()}
        else:
            array = np.asarray(leaf)
            tensors[name] = np.ascontiguousarray(array.T if transposed else array)
    with new_directory(to) as scratch:
        quantised = None  # the model may be merged by now
        if packed:
            sites = [site for site in injection.sites(model) if site.kind == "linear"]
            linear = {f"{dotted(name)}.weight" for site in sites for name in site.names}
            quantised = families.quantization_config(
                packed, skipped=linear, dtype=jnp.dtype(model.dtype).name
            )
        copy_beside(source, scratch, quantization_config=quantised)
        if chat_template is not None:
            write_text(scratch / TEMPLATE_FILE, chat_template)
        save_tensors(tensors, scratch / "model.safetensors")


def copy_beside(source: Path, to: Path, **changes: Any) -> None:
    """Copy what belongs to a model beside its weights: tokenizer, template, configurations.

    Args:
        source: its directory.
        to: another.
        **changes: keys of config.json that have other values there; None leaves a key out.
    """
    for file in source.iterdir():
        if file.is_file() and file.suffix in _COPIED and not _NOT_COPIED.fullmatch(file.name):
            shutil.copy(file, to)
    before = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in before.items() if key not in changes}
    config |= {key: value for key, value in changes.items() if value is not None}
    if config != before:
        write_text(to / "config.json", json.dumps(config, indent=2) + "\n")


def quantize(model_dir: Path, to: Path, quant: QuantConfig) -> None:
    """Write a directory whose linear layers are quantised; all else is as it was.

    Args:
        model_dir: a Hugging Face directory.
        to: appears whole or not at all.
        quant: which layers, and how.

    Raises:
        JloraError: as `load`; a weight that bitsandbytes' layout has no place for.
    """
    demand_free(to)  # before the work
    directory = Directory.open(model_dir)
    tensors = directory.tensors
    _demand_plain(tensors)
    dtypes = {tensors.dtype(name) for name, shape in tensors.shapes().items() if shape is not None}
    if len(dtypes) > 1:
        raise JloraError(
            f"the weights in {model_dir} are of several dtypes, {', '.join(sorted(dtypes))}; "
            "convert them to one"
        )
    model = load(directory, dtype=jnp.dtype(dtypes.pop()), quant=quant)
    save(model, to, source=model_dir)


def check(directory: Directory, leaves: dict[str, Any], stacks: dict[str, int]) -> None:
    """Demand each weight of the model, in its shape, and no other.

    Raises:
        JloraError: all differences at once.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for path, shape in _layer_shapes(leaves, stacks):
        expected |= directory.expected(path, shape)
    found = {
        name: expected.get(name, ()) if shape is None else shape
        for name, shape in directory.tensors.shapes().items()
    }
    remedy = "config.json and the weights must be of one model: fetch or convert it again"
    if HEAD in expected and HEAD not in found and not directory.config.tie_word_embeddings:
        remedy = (
            f"config.json does not tie the output head (tie_word_embeddings), and {HEAD} is not "
            "there: where the head is the embedding, say true there; else fetch the model again"
        )
    paths.check_same(expected, found, what=f"the checkpoint in {directory.path}", remedy=remedy)


def _layer_shapes(
    leaves: dict[str, Any], stacks: dict[str, int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path, leaf in leaves.items():
        layers = canonical.layer_paths(path, stacks)
        for layer in layers:
            yield layer, leaf.shape if layers == [path] else leaf.shape[1:]


def _read(path: str, leaf: Any, stacks: dict[str, int], directory: Directory) -> jax.Array:
    """One leaf in its own dtype, filled layer by layer if it is stacked."""
    layers = canonical.layer_paths(path, stacks)
    whole = empty(leaf.shape, leaf.dtype)
    for layer, part in zip(layers, [whole] if layers == [path] else whole, strict=True):
        name, transposed = directory.name(layer)
        if transposed:
            transpose_into(part, directory.tensors.read(name))
        else:
            part[...] = directory.tensors.read(name)
    return jax.device_put(whole)


def _read_packed(
    path: str, leaf: Any, stacks: dict[str, int], directory: Directory, quant: QuantConfig | None
) -> QuantArray:
    """One quantised leaf: quantised now, layer by layer, or as it lies on disk."""
    tensors = directory.tensors

    def one(layer: str) -> QuantArray:
        name, _ = directory.name(layer)
        if quant is None:
            size, out = leaf.shape[-2:]
            return tensors.read_quantised(name, (out, size), leaf.dtype)
        q = quantize_rows(
            tensors.read(name),
            kind=quant.kind,
            block_size=quant.block_size,
            double_quant=quant.double_quant,
            path=name,
        )
        return dataclasses.replace(q, dtype=leaf.dtype)

    layers = canonical.layer_paths(path, stacks)
    each = map(one, layers)
    q = next(each) if layers == [path] else stack(each, len(layers))
    return jax.device_put(dataclasses.replace(q, path=WeightPath(path)))
