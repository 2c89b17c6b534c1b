"""Models of other libraries, injected as they are; what is exported here, `make parity` reads."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

import jlora

LORA = jlora.LoraConfig(r=4, lora_alpha=8)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, models.VOCAB, (2, 8)))
LEARNING_RATE, STEPS = 3e-2, 20
EXPORTED = Path(__file__).parents[2] / "build" / "foreign"


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


def bits(tree):
    return jax.tree.map(np.array, tree)


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def assert_close(got, expected):
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def injected_linen(name, config=LORA):
    """The module, its own parameters, the injected module, and its tree on these parameters."""
    module, params, call = models.MODELS[name]()
    injected = jlora.inject(module, config)
    fresh = injected.init(
        jax.random.key(1), TOKENS, jnp.ones_like(TOKENS), models.positions(TOKENS)
    )
    tree = unflatten_dict(flatten_dict(fresh["params"]) | flatten_dict(params))
    return module, params, injected, tree, call


@pytest.mark.parametrize(
    ("name", "sites", "parameters"), [("flax_llama", 14, 3_712), ("flax_gpt2", 8, 4_096)]
)
def test_linen(name, sites, parameters):
    module, params, injected, tree, call = injected_linen(name)
    before = bits(params)
    adapters, base = jlora.partition(tree)
    assert len(adapters) == 2 * sites
    assert sum(leaf.size for leaf in adapters.values()) == parameters
    plain, adapted = (jax.jit(lambda p, m=m: call(m, p, TOKENS)) for m in (module, injected))
    np.testing.assert_array_equal(call(injected, tree, TOKENS), call(module, params, TOKENS))
    assert_close(adapted(tree), plain(params))
    tx = optax.adamw(LEARNING_RATE)
    state = tx.init(adapters)

    @jax.jit
    def step(adapters, state):
        def loss(adapters):
            return loss_of(call(injected, jlora.combine(adapters, base), TOKENS))

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    losses = []
    for _ in range(STEPS):
        adapters, state, loss = step(adapters, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    tree = jlora.combine(adapters, base)
    merged = jlora.merge(injected, tree)
    assert_same_bits(bits(params), before)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert_close(plain(merged), adapted(tree))
    assert np.abs(plain(merged) - plain(params)).max() > 0.1
    assert jlora.eject(injected) == module


@pytest.mark.parametrize("remat", [None, "BLOCK", "DECODER"])
@pytest.mark.parametrize(
    ("name", "sites", "parameters"), [("tunix_llama3", 14, 3_712), ("tunix_qwen3", 14, 4_096)]
)
def test_nnx(name, sites, parameters, remat):
    model, _, call = models.MODELS[name](remat=remat)
    graphdef, before = nnx.graphdef(model), bits(nnx.to_pure_dict(nnx.state(model)))
    logits = nnx.jit(lambda m: call(m, None, TOKENS))
    plain, eagerly = logits(model), call(model, None, TOKENS)
    with pytest.raises(jlora.JloraError, match=r"q_proj is there, but .* where `inputs` are given"):
        jlora.inject(model, jlora.LoraConfig(target_modules=("q_proj",)), rngs=nnx.Rngs(0))
    jlora.inject(model, LORA, rngs=nnx.Rngs(0), inputs=models.inputs(TOKENS))
    adapters, _ = jlora.partition(model)
    assert len(adapters) == 2 * sites
    assert sum(leaf.size for leaf in adapters.values()) == parameters
    assert adapters["layers/0/attn/q_proj/w_lora_a"].shape == (4, models.WIDTH)
    np.testing.assert_array_equal(call(model, None, TOKENS), eagerly)
    assert_close(logits(model), plain)
    optimizer = nnx.Optimizer(model, optax.adamw(LEARNING_RATE), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        trained = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(lambda m: loss_of(call(m, None, TOKENS)), argnums=trained)(
            model
        )
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    assert losses[-1] < losses[0] - 0.1
    merged = jlora.merge(model)
    assert nnx.graphdef(merged) == graphdef
    assert_close(logits(merged), logits(model))
    assert np.abs(logits(merged) - plain).max() > 0.1
    jlora.eject(model)
    assert nnx.graphdef(model) == graphdef
    assert_same_bits(bits(nnx.to_pure_dict(nnx.state(model))), before)


def test_no_site_of_these_models_pays_for_a_whole_update(caplog):
    """Else the log would name it."""
    for name in ("tunix_llama3", "tunix_qwen3"):
        model, _, call = models.MODELS[name]()
        jlora.inject(model, LORA, rngs=nnx.Rngs(0), inputs=models.inputs(TOKENS))
        call(model, None, TOKENS)
    _, _, injected, tree, call = injected_linen("flax_gpt2")
    call(injected, tree, TOKENS)
    assert caplog.text == ""


def test_the_wrapper_is_refused():
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(jlora.JloraError, match=r"wraps a Flax module: pass its \.module"):
        jlora.inject(FlaxLlamaForCausalLM(config, seed=0), LORA)


def test_a_tied_embedding_is_adapted_in_both_its_uses():
    config = jlora.LoraConfig(r=4, lora_alpha=8, target_modules=("wte",), init_lora_weights=False)
    module, params, injected, tree, call = injected_linen("flax_gpt2", config)
    adapted, merged = call(injected, tree, TOKENS), jlora.merge(injected, tree)
    assert np.abs(adapted - call(module, params, TOKENS)).max() > 0.01
    assert_close(call(module, merged, TOKENS), adapted)


def test_exported_for_peft():
    """Weights under torch's names, an adapter whose B is not zero, and the logits it gives."""
    config = jlora.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
    module, params, injected, tree, call = injected_linen("flax_llama", config)
    EXPORTED.mkdir(parents=True, exist_ok=True)
    names = {"kernel": "weight", "embedding": "weight", "weight": "weight"}
    tensors = {
        ".".join((*path[:-1], names[path[-1]])): np.ascontiguousarray(
            np.asarray(leaf).T if path[-1] == "kernel" else leaf
        )
        for path, leaf in flatten_dict(params).items()
    }
    save_file(tensors, EXPORTED / "model.safetensors", metadata={"format": "pt"})
    settings = module.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (EXPORTED / "config.json").write_text(json.dumps(settings))
    jlora.export_peft(EXPORTED / "adapter", injected, config, params=tree)
    adapted, plain = call(injected, tree, TOKENS), call(module, params, TOKENS)
    assert np.abs(adapted - plain).max() > 1e-3 * np.abs(plain).max()
    logits = {"tokens": np.asarray(TOKENS), "plain": plain, "adapted": adapted}
    np.savez(EXPORTED / "logits.npz", **logits)
