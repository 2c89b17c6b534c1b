"""Models of other libraries, injected as they are; what is exported here, `make parity` reads."""

import warnings

import jax
import models
import numpy as np
import optax
import pytest
import tunix_nnx
from flax import nnx
from subject import Linen, assert_close, assert_same_bits, bits, subject, train

import jlora

LORA = jlora.LoraConfig(r=4, lora_alpha=8)
ROWS = models.table()
LEARNING_RATE, STEPS = 3e-2, 12


def test_the_table_is_of_fourteen_models_and_five_libraries():
    assert len(ROWS) >= 14
    assert len({row.library for row in ROWS.values()}) >= 5


@pytest.mark.parametrize("name", ROWS)
def test_model(name):
    row = ROWS[name]
    config = jlora.LoraConfig(r=4, lora_alpha=8, target_modules=row.target_modules)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        injected = subject(row, config)
        adapters = injected.adapters
        assert len(adapters) == 2 * row.sites
        assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == row.parameters

        # B is zero: bit by bit what the model computes without; compiled ones round otherwise.
        before = injected.plain(row.call)
        np.testing.assert_array_equal(injected.adapted(row.call, adapters), before)
        plain, adapted = compiled(injected, row.call)
        if row.decode is not None:
            plain_cached, cached = compiled(injected, row.decode)
            decoded = plain_cached(None)
            assert_close(decoded, before[:, : models.DECODED], 1e-4)
            assert_close(cached(adapters), decoded)

        trained, losses, grads = train(injected, STEPS, row.rate)
    assert losses[-1] < losses[0] - 0.1

    # A gradient reaches every factor, or its site is named.
    still = {path.rpartition("/")[0] for path, g in grads.items() if not np.abs(_array(g)).max()}
    assert still == set(row.unused)
    said = "\n".join(str(w.message) for w in warned)
    assert all(site in said for site in still)

    injected.assert_restored(trained)
    after, merged = adapted(trained), injected.merged(trained)
    assert np.abs(after - before).max() > 0.01 * np.abs(before).max()
    assert_close(plain(merged), after)
    if row.decode is not None:
        through_cache = cached(trained)
        assert_close(through_cache, after[:, : models.DECODED], 1e-4)
        assert_close(plain_cached(merged), through_cache)


def compiled(injected, run):
    """Run of the model as it was, for its parameters or others, and of the injected one."""
    plain = jax.jit(lambda params: injected.plain(run, params))
    return plain, jax.jit(lambda adapters: injected.adapted(run, adapters))


def _array(leaf):
    return jax.tree.leaves(leaf)[0]


@pytest.mark.parametrize("remat", ["BLOCK", "DECODER"])
@pytest.mark.parametrize("build", [tunix_nnx.llama3, tunix_nnx.qwen3])
def test_remat_and_the_optimizer_of_nnx(build, remat):
    """Train as a user of NNX writes the step: value_and_grad and Optimizer of the factors' type."""
    model, _ = build(remat=remat)
    row = ROWS[f"tunix_{build.__name__}"]
    graphdef, before = nnx.graphdef(model), bits(nnx.to_pure_dict(nnx.state(model)))
    plain = nnx.jit(lambda m: row.call(m, None))(model)
    with pytest.raises(jlora.JloraError, match=r"q_proj is there, but .* where `inputs` are given"):
        jlora.inject(model, jlora.LoraConfig(target_modules=("q_proj",)), rngs=nnx.Rngs(0))
    jlora.inject(model, LORA, rngs=nnx.Rngs(0), inputs=row.inputs())
    adapters, _ = jlora.partition(model)
    assert (len(adapters), sum(x.size for x in adapters.values())) == (
        2 * row.sites, row.parameters
    )  # fmt: skip
    assert adapters["layers/0/attn/q_proj/w_lora_a"].shape == (4, models.WIDTH)
    assert_close(nnx.jit(lambda m: row.call(m, None))(model), plain)
    optimizer = nnx.Optimizer(model, optax.adamw(LEARNING_RATE), wrt=nnx.LoRAParam)
    tokens = models.TOKENS

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = row.call(model, None)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        trained = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=trained)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    assert losses[-1] < losses[0] - 0.1
    logits = nnx.jit(lambda m: row.call(m, None))
    merged = jlora.merge(model)
    assert nnx.graphdef(merged) == graphdef
    assert_close(logits(merged), logits(model))
    assert np.abs(logits(merged) - plain).max() > 0.1
    jlora.eject(model)
    assert nnx.graphdef(model) == graphdef
    assert_same_bits(bits(nnx.to_pure_dict(nnx.state(model))), before)


def test_no_site_of_these_models_pays_for_a_whole_update(caplog):
    """Else the log would name it."""
    for name in ("tunix_llama3", "tunix_qwen3", "flax_gpt2"):
        injected = subject(ROWS[name], LORA)
        injected.adapted(ROWS[name].call, injected.adapters)
    assert caplog.text == ""


def test_the_wrapper_is_refused():
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(jlora.JloraError, match=r"wraps a Flax module: pass its \.module"):
        jlora.inject(FlaxLlamaForCausalLM(config, seed=0), LORA)


@pytest.mark.parametrize(
    ("name", "embedding"),
    [("flax_gpt2", "wte"), ("flax_bert", "word_embeddings"), ("flax_whisper", "embed_tokens")],
)
def test_a_tied_embedding_is_adapted_in_both_its_uses(name, embedding):
    config = jlora.LoraConfig(
        r=4, lora_alpha=8, target_modules=(embedding,), init_lora_weights=False
    )
    row = ROWS[name]
    injected = Linen(row, config)
    adapted = injected.adapted(row.call, injected.adapters)
    assert np.abs(adapted - injected.plain(row.call)).max() > 0.01
    assert_close(injected.plain(row.call, injected.merged(injected.adapters)), adapted)
