"""Layers of a stack that differ in rank or scaling, or are left out: as in the unrolled model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora import canonical, injection
from jlora.models.transformer import CausalLM, ModelConfig

SHAPE = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    inv_freq=(1.0, 0.3, 0.1, 0.03),
    tie_word_embeddings=False,
)
STACKS = {"model/layers": 3}
TOKENS = jnp.arange(10).reshape(2, 5)
RANDOM = jlora.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
CONFIGS = {
    "rank": dataclasses.replace(RANDOM, rank_pattern={r"layers\.1\..*q_proj": 2}),
    "alpha": dataclasses.replace(RANDOM, alpha_pattern={r"layers\.2\..*": 3}),
    "layers": dataclasses.replace(RANDOM, layers_to_transform=(0, 2)),
    "all three": dataclasses.replace(
        RANDOM,
        use_rslora=True,
        rank_pattern={r"layers\.1\..*_proj": 6},
        alpha_pattern={r"layers\.2\..*": 3},
        layers_to_transform=(1, 2),
    ),
}


def model(*, stacked: bool) -> CausalLM:
    """The same weights in either layout."""
    leaves, base = injection.partition(CausalLM(SHAPE, rngs=nnx.Rngs(0)), everything=True)
    if stacked:
        empty = CausalLM(SHAPE, rngs=nnx.Rngs(0), scan_layers=True)
        _, base = injection.partition(empty, everything=True)
        leaves = canonical.restack(leaves, STACKS)
    return injection.combine(leaves, base)


@pytest.fixture(params=list(CONFIGS))
def config(request) -> jlora.LoraConfig:
    return CONFIGS[request.param]


@pytest.fixture
def pair(config) -> tuple[CausalLM, CausalLM]:
    """Unrolled and stacked, injected with the same key."""
    both = (model(stacked=False), model(stacked=True))
    return tuple(jlora.inject(m, config, rngs=nnx.Rngs(7)) for m in both)


def test_factors_outputs_and_counts_are_those_of_the_unrolled_model(config, pair):
    unrolled, stacked = pair
    assert jlora.summary(stacked) == jlora.summary(unrolled)
    assert np.abs(unrolled(TOKENS) - model(stacked=False)(TOKENS)).max() > 1e-2
    np.testing.assert_allclose(stacked(TOKENS), unrolled(TOKENS), atol=1e-5)
    factors, _ = jlora.partition(unrolled)
    padded, _ = jlora.partition(stacked)
    ranks = injection.plan(stacked, config).ranks
    assert ranks
    own = canonical.unstack(padded, STACKS, ranks)
    assert own.keys() == factors.keys()
    for path, leaf in own.items():
        np.testing.assert_array_equal(leaf, factors[path], err_msg=path)
    for path, leaf in canonical.restack(own, STACKS, ranks).items():
        np.testing.assert_array_equal(leaf, padded[path], err_msg=path)


def test_padding_gets_no_gradient_and_the_rest_gets_its_own(config, pair):
    grads = []
    for m in pair:
        adapters, base = jlora.partition(m)
        loss = lambda a, base=base: (jlora.combine(a, base)(TOKENS) ** 2).mean()  # noqa: E731
        grads.append(jax.jit(jax.grad(loss))(adapters))
    ranks = injection.plan(pair[1], config).ranks
    own = canonical.unstack(grads[1], STACKS, ranks)
    for path, leaf in own.items():
        scale = np.abs(grads[0][path]).max()
        assert scale > 0
        np.testing.assert_allclose(leaf, grads[0][path], atol=1e-5 * max(scale, 1e-3))
    for path, by_layer in ranks.items():
        for i, r in enumerate(by_layer):
            assert not np.any(grads[1][path][i, r:]), path


def test_merged(pair):
    for m in pair:
        expected = m(TOKENS)
        np.testing.assert_allclose(jlora.merge(m)(TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["orbax", "peft"])
@pytest.mark.parametrize("source", [0, 1], ids=["unrolled", "stacked"])
def test_files_fit_either_layout(config, pair, source, form, tmp_path):
    if form == "orbax":
        jlora.save_adapter(tmp_path / "adapter", pair[source], config)
    else:
        jlora.export_peft(tmp_path / "adapter", pair[source], config)
    for one in pair:
        loaded = jlora.load_adapter(tmp_path / "adapter", model(stacked=one is pair[1]))
        np.testing.assert_array_equal(loaded(TOKENS), one(TOKENS))


def test_linen_stacks_are_adapted_alike():
    from flax import linen as nn

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4, name="up")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return scan(name="layers")(x, None)[0]

    config = jlora.LoraConfig(target_modules=("up",), layers_to_transform=(1,), r=2)
    with pytest.raises(jlora.JloraError, match="layers_to_transform"):
        jlora.inject(Stack(), config).init(jax.random.key(0), jnp.ones((2, 4)))
