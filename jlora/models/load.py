"""Hugging Face directories to models and back: every key accounted for, one tensor at a time."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from jlora import canonical, injection, paths
from jlora.errors import JloraError
from jlora.files import new_directory, save_tensors
from jlora.models import families
from jlora.models.transformer import CausalLM

# What belongs to a model beside its weights: configurations, tokenizer, chat template.
_COPIED = {".json", ".jinja", ".txt", ".model"}

# Buffers that old checkpoints carry and that the configuration determines.
_RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def load(
    model_dir: str | Path,
    *,
    dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: bool = False,
) -> CausalLM:
    """Read a model of the Llama family from a Hugging Face directory.

    Args:
        model_dir: holds config.json and model.safetensors, or its shards and their index.
        dtype: of the weights in memory and of computation; each tensor is converted as it is read.
        scan_layers: stack the layers and scan over them.
        remat: recompute each layer's activations in the backward pass.

    Raises:
        JloraError: files that are missing, truncated or no safetensors; keys that are missing or
            that nothing reads, and shapes that do not fit the configuration, all at once.
    """
    model_dir = Path(model_dir)
    empty = abstract(model_dir, dtype=dtype, scan_layers=scan_layers, remat=remat)
    leaves, base = injection.partition(empty, everything=True)
    stacks = injection.stacks(empty)
    with ExitStack() as files:
        tensors = {name: file for name, file in _open(model_dir, files)}
        _check(model_dir, leaves, stacks, tensors, empty.config.tie_word_embeddings)
        loaded = {path: _read(path, leaf, stacks, tensors) for path, leaf in leaves.items()}
    return injection.combine(loaded, base)


def compute_dtype(name: str, *, exact: bool = False) -> Any:
    """The dtype called `name`.

    "auto" is bfloat16, but float32 on CPU, where XLA has no fast bfloat16, and where the weights
    themselves are trained (`exact`): bfloat16 would round small updates away.
    """
    if name == "auto":
        name = "float32" if exact or jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def abstract(
    model_dir: str | Path,
    *,
    dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: bool = False,
) -> CausalLM:
    """The model of a directory with shapes for weights: what names and counts need."""
    config = families.read_config(Path(model_dir))
    return nnx.eval_shape(
        lambda: CausalLM(
            config, rngs=nnx.Rngs(0), dtype=dtype, scan_layers=scan_layers, remat=remat
        )
    )


def save(model: CausalLM, to: Path, *, source: Path) -> None:
    """Write a Hugging Face directory: the model's weights in its dtype, the rest from `source`.

    Args:
        model: its weights go to model.safetensors, under Hugging Face's names.
        to: appears whole or not at all.
        source: the directory that the model was loaded from.
    """
    leaves, _ = injection.partition(model, everything=True)
    tensors = {}
    for path, leaf in canonical.unstack(leaves, injection.stacks(model)).items():
        name, transposed = families.hf_name(path)
        array = np.asarray(leaf)
        tensors[name] = np.ascontiguousarray(array.T if transposed else array)
    with new_directory(to) as scratch:
        for file in source.iterdir():
            other = file.name.startswith("model.safetensors") or file.name == "jlora_source.json"
            if file.is_file() and file.suffix in _COPIED and not other:
                shutil.copy(file, scratch)
        save_tensors(tensors, scratch / "model.safetensors")


def _open(model_dir: Path, files: ExitStack) -> Iterator[tuple[str, Any]]:
    """(tensor name, open file) for every tensor of the checkpoint."""
    index = model_dir / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise JloraError(f"{index} is not a safetensors index; fetch it again") from None
    if absent := [name for name in names if not (model_dir / name).is_file()]:
        raise JloraError(
            f"{model_dir} lacks {', '.join(absent)}; weights must be safetensors: fetch or convert "
            "the model again"
        )
    for name in names:
        try:
            file = files.enter_context(safe_open(model_dir / name, framework="np"))
        except (SafetensorError, OSError) as error:
            raise JloraError(
                f"{model_dir / name} is truncated or no safetensors file ({error}); fetch it again"
            ) from None
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            yield key, file


def _check(
    model_dir: Path, leaves: dict[str, Any], stacks: dict[str, int], tensors: dict, tied: bool
) -> None:
    expected = {}
    for path, shape in _layer_shapes(leaves, stacks):
        name, transposed = families.hf_name(path)
        expected[name] = tuple(reversed(shape)) if transposed else shape
    found = {
        name: tuple(file.get_slice(name).get_shape())
        for name, file in tensors.items()
        if not _RECOMPUTED.fullmatch(name) and not (tied and name == "lm_head.weight")
    }
    paths.check_same(
        expected,
        found,
        what=f"the checkpoint in {model_dir}",
        remedy="config.json and the weights must be of one model: fetch or convert it again",
    )


def _layer_shapes(
    leaves: dict[str, Any], stacks: dict[str, int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path, leaf in leaves.items():
        layers = canonical.layer_paths(path, stacks)
        for layer in layers:
            yield layer, leaf.shape if layers == [path] else leaf.shape[1:]


def _read(path: str, leaf: Any, stacks: dict[str, int], tensors: dict) -> jnp.ndarray:
    """One leaf in its own dtype; a stacked one is filled layer by layer."""
    layers = canonical.layer_paths(path, stacks)
    if layers == [path]:
        return jnp.asarray(_tensor(path, tensors), dtype=leaf.dtype)
    stacked = np.empty(leaf.shape, leaf.dtype)
    for i, layer in enumerate(layers):
        stacked[i] = _tensor(layer, tensors)
    return jnp.asarray(stacked)


def _tensor(path: str, tensors: dict) -> np.ndarray:
    name, transposed = families.hf_name(path)
    array = tensors[name].get_tensor(name)
    return array.T if transposed else array
