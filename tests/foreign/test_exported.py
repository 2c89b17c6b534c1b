"""Export Flax models of transformers: `make parity` loads what is written in PEFT."""

import dataclasses
import inspect
import json
from pathlib import Path

import jax
import models
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file
from subject import Linen, assert_close

import jlora
from jlora.peft import names

EXPORTED = Path(__file__).parents[2] / "build" / "foreign"
ROWS = models.table()
RANDOM = jlora.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
ARCHITECTURES = {
    "flax_llama": "LlamaForCausalLM",
    "flax_bert": "BertForMaskedLM",
    "flax_vit": "ViTForImageClassification",
    "flax_whisper": "WhisperForConditionalGeneration",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exported_for_peft(name):
    """Weights under torch's names, an adapter whose B is not zero, and the logits it gives."""
    row, out = ROWS[name], EXPORTED / name
    task = "CAUSAL_LM" if name == "flax_llama" else ""
    config = dataclasses.replace(RANDOM, task_type=task)
    injected = Linen(row, config)
    out.mkdir(parents=True, exist_ok=True)
    tensors = dict(map(_in_torch, *zip(*flatten_dict(injected.variables["params"]).items(),
                                       strict=True)))  # fmt: skip
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    settings = injected.module.config.to_dict() | {"architectures": [ARCHITECTURES[name]]}
    (out / "config.json").write_text(json.dumps(settings))
    tree = injected.tree(injected.adapters)
    jlora.export_peft(out / "adapter", injected.injected, config, params=tree)
    adapted, plain = injected.adapted(row.call, injected.adapters), injected.plain(row.call)
    assert np.abs(adapted - plain).max() > 1e-3 * np.abs(plain).max()
    inputs = {f"input_{i}": np.asarray(x) for i, x in enumerate(row.inputs()) if x is not None}
    np.savez(out / "logits.npz", **inputs, plain=plain, adapted=adapted)
    again = jlora.import_peft(out / "adapter", injected.injected, params=tree)
    assert_close(row.call(injected.injected, injected.given(again)), adapted, 1e-6)


def _in_torch(path, leaf):
    """A weight of a Flax layer as torch's has it."""
    leaf = np.asarray(leaf)
    if path[-1] == "kernel":
        leaf = leaf.transpose(leaf.ndim - 1, leaf.ndim - 2, *range(leaf.ndim - 2))
    named = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(path[-1], path[-1])
    return ".".join((*path[:-1], named)), np.ascontiguousarray(leaf)


def test_a_vit_has_the_names_of_transformers_5(tmp_path):
    """And those of before among its targets, for which PEFT then misses tensors, and says so."""
    injected = Linen(ROWS["flax_vit"], RANDOM)
    tree = injected.tree(injected.adapters)
    jlora.export_peft(tmp_path, injected.injected, RANDOM, params=tree)
    with safe_open(tmp_path / "adapter_model.safetensors", "np") as file:
        keys = set(file.keys())
    assert len(keys) == 2 * ROWS["flax_vit"].sites
    assert "base_model.model.vit.layers.0.attention.q_proj.lora_A.weight" in keys
    assert "base_model.model.vit.layers.1.mlp.fc2.lora_B.weight" in keys
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert {"q_proj", "o_proj", "fc1", "query", "dense"} <= set(targets)


def test_names_that_are_not_known_are_refused(tmp_path):
    from transformers import FlaxResNetForImageClassification, ResNetConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    wrapper = FlaxResNetForImageClassification(config, input_shape=(1, 16, 16, 3))
    lora = dataclasses.replace(RANDOM, target_modules=("convolution",))
    module = jlora.inject(wrapper.module, lora)
    images = jax.numpy.ones((1, 16, 16, 3))
    tree = module.init(jax.random.key(0), images)["params"]
    with pytest.raises(jlora.JloraError, match=r"of type 'resnet'.*peft_names = \{'regular"):
        jlora.export_peft(tmp_path, module, lora, params=tree)
    assert not list(tmp_path.iterdir())
    type(wrapper.module).peft_names = {r"\bembedder\.embedder\b": "embedder.stem"}
    try:
        jlora.export_peft(tmp_path, module, lora, params=tree)
    finally:
        del type(wrapper.module).peft_names
    with safe_open(tmp_path / "adapter_model.safetensors", "np") as file:
        assert any(".resnet.embedder.stem.convolution.lora_A" in key for key in file.keys())  # noqa: SIM118


SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    "vocab_size": 96, "num_key_value_heads": 4, "head_dim": 8, "rotary_dim": 8,
    "attention_types": [[["global", "local"], 1]], "num_labels": 5, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "max_position_embeddings": 64,
}  # fmt: skip


def test_the_names_of_all_known_types():
    """For `make parity`: what the layers of each are called in torch, as jlora has it."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_flax_auto as auto

    found = {}
    heads = (
        auto.FLAX_MODEL_MAPPING, auto.FLAX_MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.FLAX_MODEL_FOR_MASKED_LM_MAPPING, auto.FLAX_MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.FLAX_MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    )  # fmt: skip
    for kind in sorted(names.SAME | names.RENAMED.keys()):
        settings = type(AutoConfig.for_model(kind))
        taken = inspect.signature(settings.__init__).parameters
        more = {"num_labels", "pad_token_id", "bos_token_id", "eos_token_id"}
        config = {k: v for k, v in SIZES.items() if k in taken or k in more}
        for mapping in heads:
            if (cls := mapping.get(settings, None)) is None:
                continue
            model = cls(settings(**config), _do_init=False)
            shapes = jax.eval_shape(
                lambda m=model: m.init_weights(jax.random.key(0), m.input_shape)
            )
            modules = {".".join(path[:-1]) for path in flatten_dict(dict(shapes))}
            renames = names.names_of_model(model.module)
            found[cls.__name__] = {
                "type": kind, "config": config,
                "names": sorted(names.torch_name(m, renames) for m in modules),
            }  # fmt: skip
    assert {row["type"] for row in found.values()} == names.SAME | names.RENAMED.keys()
    EXPORTED.mkdir(parents=True, exist_ok=True)
    (EXPORTED / "names.json").write_text(json.dumps(found))
