"""PEFT directories out."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora import canonical, config, fingerprint, injection, paths
from jlora.adapter import Site
from jlora.checkpoint import StoredAdapter, gather
from jlora.files import TEMPLATE_FILE, save_tensors, write_text
from jlora.peft.config import CONFIG_FILE, to_settings
from jlora.peft.fused import split, torch_layers
from jlora.peft.names import demand_known
from jlora.peft.read import METADATA, WEIGHTS_FILE, modules_of
from jlora.peft.tensors import (
    Weights,
    base_weights,
    check_exportable,
    demand_unrolled,
    table,
    tied_heads,
)
from jlora.places import local
from jlora.targets import Plan


def export_peft(
    path: str | Path,
    model: Any,
    config: config.LoraConfig,
    *,
    params: Any = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    chat_template: str | None = None,
) -> None:
    """Write the adapters of `model` as a PEFT directory.

    Factors of linear layers, embeddings and convolutions, biases, modules to save and token rows,
    all in float32. PEFT's copies of base weights (of a targeted `embed_tokens` or `lm_head`) are
    left out; PEFT does not ask for them. A tied embedding that is trained as a whole is written
    under the output head's name too, with ensure_weight_tying: PEFT would otherwise part the two.

    Names are the model's own, with dots, or what a class attribute of the model makes of them:
    `peft_names = {"[.]attention[.]query$": ".attn.q_proj"}`, regular expressions and what replaces
    them. Flax models of transformers 4 need none: names are those of torch in transformers 5, which
    has renamed some layers (of ViT), and a type whose names are not known is refused. A layer that
    is several in Hugging Face's model is written as these where the model's class says so:
    `fused_layers = {"qkv_proj": {"q_proj": 8, "k_proj": 4, "v_proj": 4}}`, with the number of
    outputs that each has, in their order.

    Args:
        path: a directory; an adapter that it holds already is replaced.
        model: a model that `inject` has been given; or an injected Linen module that has been
            traced (by `init`, say).
        config: the configuration that it was given.
        params: the Linen module's tree of parameters.
        base_model: name or directory of the base model, for those who load the adapter.
        base_revision: of a name on the hub: its branch, tag or commit.
        chat_template: what it was trained with in place of the model's own; is written beside it,
            where transformers looks for it.

    Raises:
        JloraError: the model holds no adapters, or others than `config` says, or such as the
            format has no place for: all by name, with the reason.
    """
    if params is None:
        stored = gather(model, config)
        stored = dataclasses.replace(stored, chat_template=chat_template)
        write_peft(path, model, stored, base_model=base_model, base_revision=base_revision)
        return
    plan, sites = injection.planned(model, params)
    demand_unrolled(sites)
    stored = gather(model, config, params)
    stored = dataclasses.replace(stored, chat_template=chat_template)
    base = (base_model, base_revision)
    _write(Path(path), stored, plan, sites, base, model, params, None)


def write_peft(
    path: str | Path,
    model: Any,
    stored: StoredAdapter,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    weights: Weights | None = None,
) -> None:
    """`export_peft` for an adapter as read from disk; `model` may be abstract.

    Args:
        path: as for `export_peft`.
        model: the NNX model, injected or not.
        stored: the adapter.
        base_model: as for `export_peft`.
        base_revision: as for `export_peft`.
        weights: reads a leaf of the base, for rows of an embedding where `model` is abstract.

    Raises:
        JloraError: leaves that do not fit the model and their configuration.
    """
    plan, sites = injection.plan(model, stored.config), injection.sites(model)
    base = (base_model, base_revision)
    _write(Path(path), stored, plan, sites, base, model, None, weights)


def _write(
    path: Path,
    stored: StoredAdapter,
    plan: Plan,
    sites: Sequence[Site],
    base_model: tuple[str | None, str | None],
    model: Any,
    params: Any,
    weights: Weights | None,
) -> None:
    path = local(path)
    demand_known(model)
    check_exportable(plan, sites)
    leaves, read = base_weights(model, params)
    stacks = injection.stacks(model) if params is None else {}
    known = table(plan, sites, stacks, added=params is not None, tied=tied_heads(model, sites))
    paths.check_same(
        known.leaves,
        {name: tuple(leaf.shape) for name, leaf in stored.factors.items()},
        what=f"the adapter in {stored.where}",
        remedy="it was trained on another model, or its configuration was edited",
    )
    tensors = {}
    for entry in known.entries:
        leaf = np.asarray(stored.factors[entry.leaf]).astype(np.float32)
        tensors[entry.key] = entry.to_torch(leaf, weights or read)
        if entry.twin is not None:
            tensors[entry.twin] = tensors[entry.key].copy()
    own = [layer for leaf in leaves for layer in canonical.layer_paths(leaf, stacks)]
    fused = torch_layers(model, sites, own)
    tensors = split(tensors, fused)
    settings = to_settings(
        stored.config,
        plan,
        sites,
        modules_of(leaves),
        stacks,
        fused=fused,
        tied=any(entry.twin for entry in known.entries),
        base_model=base_model,
    )
    known_base = {} if stored.base is None else {"base": fingerprint.to_json(stored.base)}
    metadata = {METADATA: json.dumps(known_base)} if known_base else None
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path) as scratch:
        file, text = Path(scratch, WEIGHTS_FILE), Path(scratch, CONFIG_FILE)
        save_tensors(tensors, file, metadata)
        text.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(file, path / WEIGHTS_FILE)
        os.replace(text, path / CONFIG_FILE)
    if stored.chat_template is not None:
        write_text(path / TEMPLATE_FILE, stored.chat_template)
