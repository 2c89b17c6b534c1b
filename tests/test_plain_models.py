"""Models whose own code uses weights in plain parameters, in both flavours."""

import logging
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora
from jlora import injection
from jlora.errors import JloraError
from jlora.injection import lowrank

CONFIG = jlora.LoraConfig(r=2, lora_alpha=4, target_modules=r"heads|out\.w|down|table")
WIDTH, VOCAB = 8, 12
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (3, 5)))


class Out(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(rngs.normal((2, 4, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("btnh,nhd->btd", x, self.w[...])


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Param(rngs.normal((VOCAB, WIDTH)))
        self.heads = nnx.Param(rngs.normal((WIDTH, 2, 4)))
        self.out = Out(rngs)
        self.down = nnx.Param(rngs.normal((WIDTH, WIDTH)))
        self.scale = nnx.Param(jnp.ones((1, WIDTH)))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return self.encode(tokens) @ self.table[...].T

    def encode(self, tokens: jax.Array) -> jax.Array:
        x = self.table[...][tokens] * self.scale[...]
        x = x + self.out(jnp.einsum("btd,dnh->btnh", x, self.heads[...]))
        return x + jax.nn.gelu(x) @ self.down[...].T


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        init = nn.initializers.normal(1.0)
        table = self.param("table", init, (VOCAB, WIDTH))
        x = table[tokens] * self.param("scale", nn.initializers.ones, (1, WIDTH))
        heads = jnp.einsum("btd,dnh->btnh", x, self.param("heads", init, (WIDTH, 2, 4)))
        x = x + LinenOut(name="out")(heads)
        x = x + jax.nn.gelu(x) @ self.param("down", init, (WIDTH, WIDTH)).T
        return x @ table.T


class LinenOut(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.param("w", nn.initializers.normal(1.0), (2, 4, WIDTH))
        return jnp.einsum("btnh,nhd->btd", x, w)


SHAPES = {
    "table": ((2, VOCAB), (2, WIDTH)),
    "heads": ((2, WIDTH), (2, 2, 4)),
    "out/w": ((2, 2, 4), (2, WIDTH)),
    "down": ((2, WIDTH), (2, WIDTH)),
}


def filled(shapes: dict[str, Any]) -> dict[str, jax.Array]:
    random = np.random.default_rng(1)
    return {
        path: jnp.asarray(random.normal(size=s, scale=0.3), jnp.float32)
        for path, s in shapes.items()
    }


def factor_shapes() -> dict[str, tuple[int, ...]]:
    both = {f"{path}_lora_a": a for path, (a, _) in SHAPES.items()}
    return both | {f"{path}_lora_b": b for path, (_, b) in SHAPES.items()}


def explicit(weights: dict[str, jax.Array], factors: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """W + 2 BA, written out for each weight; `down` is used transposed."""
    a = {path: factors[f"{path}_lora_a"] for path in SHAPES}
    b = {path: factors[f"{path}_lora_b"] for path in SHAPES}
    deltas = {
        "table": jnp.einsum("rv,rd->vd", a["table"], b["table"]),
        "heads": jnp.einsum("rd,rnh->dnh", a["heads"], b["heads"]),
        "out/w": jnp.einsum("rnh,rd->nhd", a["out/w"], b["out/w"]),
        "down": jnp.einsum("ri,ro->oi", a["down"], b["down"]),
    }
    return {path: weights[path] + 2 * delta for path, delta in deltas.items()}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    own = {path: leaf for path, leaf in flat.items() if "/" not in path}
    return own | {"out": {"w": flat["out/w"]}}


def assert_close(got: jax.Array, expected: jax.Array) -> None:
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.fixture
def linen() -> tuple[LinenModel, Any, Any]:
    """The module, the injected one, and the tree that its init makes."""
    module = LinenModel()
    injected = jlora.inject(module, CONFIG)
    return module, injected, injected.init(jax.random.key(0), TOKENS)["params"]


@pytest.fixture
def nnx_model() -> NnxModel:
    model = NnxModel(nnx.Rngs(0))
    return jlora.inject(model, CONFIG, rngs=nnx.Rngs(1), inputs=(TOKENS,))


def test_linen_equals_the_explicit_sum(linen):
    module, injected, tree = linen
    adapters, base = jlora.partition(tree)
    assert {path: leaf.shape for path, leaf in adapters.items()} == factor_shapes()
    plain = dict(base.rest)
    own = module.apply({"params": nested(plain)}, TOKENS)
    np.testing.assert_array_equal(injected.apply({"params": tree}, TOKENS), own)
    values = filled(factor_shapes())

    def adapted(factors):
        return injected.apply({"params": jlora.combine(factors, base)}, TOKENS)

    def summed(factors):
        return module.apply({"params": nested(plain | explicit(plain, factors))}, TOKENS)

    assert_close(jax.jit(adapted)(values), summed(values))
    assert np.abs(adapted(values) - own).max() > 1
    grads, expected = (jax.grad(lambda f, g=g: g(f).sum())(values) for g in (adapted, summed))
    for path, grad in grads.items():
        assert_close(grad, expected[path])
    merged = jlora.merge(injected, jlora.combine(values, base))
    assert_close(module.apply({"params": merged}, TOKENS), adapted(values))
    assert jlora.eject(injected) == module


def test_nnx_equals_the_explicit_sum(nnx_model):
    plain_model = NnxModel(nnx.Rngs(0))
    np.testing.assert_array_equal(nnx_model(TOKENS), plain_model(TOKENS))
    np.testing.assert_array_equal(nnx_model.encode(TOKENS), plain_model.encode(TOKENS))
    assert nnx_model.calls[...] == 1
    adapters, base = jlora.partition(nnx_model)
    assert {path: leaf.shape for path, leaf in adapters.items()} == factor_shapes()
    values = filled(factor_shapes())
    weights, rest = injection.partition(plain_model, everything=True)

    def adapted(factors):
        return jlora.combine(factors, base)(TOKENS)

    def summed(factors):
        return injection.combine(weights | explicit(weights, factors), rest)(TOKENS)

    assert_close(jax.jit(adapted)(values), summed(values))
    grads, expected = (jax.grad(lambda f, g=g: g(f).sum())(values) for g in (adapted, summed))
    for path, grad in grads.items():
        assert_close(grad, expected[path])
    model = jlora.combine(values, base)
    assert_close(jlora.merge(model)(TOKENS), adapted(values))


def test_nnx_splits_clones_pickles_and_is_ejected(nnx_model):
    out = nnx_model(TOKENS)
    assert isinstance(nnx_model, NnxModel)
    for copy in (
        nnx.merge(*nnx.split(nnx_model)),
        nnx.clone(nnx_model),
        pickle.loads(pickle.dumps(nnx_model)),
    ):
        np.testing.assert_array_equal(copy(TOKENS), out)
    jlora.eject(nnx_model)
    plain = NnxModel(nnx.Rngs(0))
    nnx_model.calls[...] = 0
    assert nnx.graphdef(nnx_model) == nnx.graphdef(plain)


def test_saved_and_loaded(linen, nnx_model, tmp_path):
    _, injected, tree = linen
    adapters, base = jlora.partition(tree)
    values = filled({path: leaf.shape for path, leaf in adapters.items()})
    changed = jlora.combine(values, base)
    jlora.save_adapter(tmp_path / "linen", injected, CONFIG, params=changed)
    loaded = jlora.load_adapter(tmp_path / "linen", injected, params=tree)
    np.testing.assert_array_equal(
        injected.apply({"params": loaded}, TOKENS), injected.apply({"params": changed}, TOKENS)
    )
    injection.update(nnx_model, values)
    jlora.save_adapter(tmp_path / "nnx", nnx_model, CONFIG)
    fresh = jlora.inject(NnxModel(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(2), inputs=(TOKENS,))
    jlora.load_adapter(tmp_path / "nnx", fresh)
    np.testing.assert_array_equal(fresh(TOKENS), nnx_model(TOKENS))
    with pytest.raises(JloraError, match=r"the PEFT format has no place for:\n.*plain parameter"):
        jlora.export_peft(tmp_path / "peft", nnx_model, CONFIG)


def test_a_restored_tree_needs_no_init_in_this_process(linen):
    """The uses are then found at the first call."""
    _, injected, tree = linen
    adapters, base = jlora.partition(tree)
    tree = jlora.combine(filled(factor_shapes()), base)
    expected = injected.apply({"params": tree}, TOKENS)
    again = jlora.inject(LinenModel(), CONFIG)
    np.testing.assert_array_equal(again.apply({"params": tree}, TOKENS), expected)
    assert adapters


def test_without_inputs_the_weights_of_nnx_are_not_found():
    model = NnxModel(nnx.Rngs(0))
    with pytest.raises(JloraError, match="no layer of a type that can be adapted"):
        jlora.inject(model, CONFIG, rngs=nnx.Rngs(0))
    assert "table" in str(jlora.plan_targets(model, CONFIG, TOKENS))


def test_a_scale_is_no_target(linen):
    config = jlora.LoraConfig(target_modules=("scale",))
    with pytest.raises(JloraError, match="target_modules: 'scale'"):
        jlora.inject(NnxModel(nnx.Rngs(0)), config, rngs=nnx.Rngs(0), inputs=(TOKENS,))
    with pytest.raises(JloraError, match="target_modules: 'scale'"):
        jlora.inject(LinenModel(), config).init(jax.random.key(0), TOKENS)


def test_dropout_is_refused_since_the_inputs_are_the_models_own():
    config = jlora.LoraConfig(target_modules=("down",), lora_dropout=0.1)
    with pytest.raises(JloraError, match=r"lora_dropout is not supported .* plain parameters"):
        jlora.inject(NnxModel(nnx.Rngs(0)), config, rngs=nnx.Rngs(0), inputs=(TOKENS,))
    with pytest.raises(JloraError, match=r"lora_dropout is not supported .* plain parameters"):
        jlora.inject(LinenModel(), config).init(jax.random.key(0), TOKENS)


def test_what_cannot_be_kept_apart_is_named_once(caplog):
    class Squared(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.arange(12.0).reshape(3, 4))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ jnp.tanh(self.w[...])

    lowrank.warn.cache_clear()
    model = jlora.inject(
        Squared(),
        jlora.LoraConfig(r=1, lora_alpha=1, target_modules=("w",), init_lora_weights=False),
        rngs=nnx.Rngs(0),
        inputs=(jnp.ones((2, 3)),),
    )
    with caplog.at_level(logging.WARNING, logger="jlora"):
        outs = [model(jnp.ones((2, 3))) for _ in range(2)]
    assert caplog.text.count("W + s·BA is formed for 'tanh'") == 1
    a, b = model.w_lora_a[...], model.w_lora_b[...]
    assert_close(outs[1], jnp.ones((2, 3)) @ jnp.tanh(model.w[...] + a.T @ b))


class Mlp(nnx.Module):
    def __init__(self, width: int, layers: int):
        self.layers = layers
        for i in range(layers):
            setattr(self, f"w{i}", nnx.Param(jnp.zeros((width, width))))

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = jax.nn.relu(x @ getattr(self, f"w{i}")[...])
        return x


class LinenMlp(nn.Module):
    width: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            w = self.param(f"w{i}", nn.initializers.zeros, (self.width, self.width))
            x = jax.nn.relu(x @ w)
        return x


def test_bare_parameters_in_a_list_are_refused():
    class Listed(nnx.Module):
        def __init__(self) -> None:
            self.ws = nnx.List([nnx.Param(jnp.ones((3, 3)))])

        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.ws[0][...]

    with pytest.raises(JloraError, match="ws/0: factors stand beside their weight"):
        jlora.inject(Listed(), jlora.LoraConfig(r=1), rngs=nnx.Rngs(0), inputs=(jnp.ones((1, 3)),))


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_the_gradient_costs_no_weight_gradient(flavour):
    """4 N of the base's FLOPs a row less the first layer's input gradient, and thin products."""
    width, layers, rows = 1024, 4, 4096
    config = jlora.LoraConfig(r=8, lora_alpha=8, target_modules=r"w\d")
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    if flavour == "nnx":
        model = nnx.eval_shape(
            lambda: jlora.inject(Mlp(width, layers), config, rngs=nnx.Rngs(0), inputs=(x,))
        )
        adapters, base = jlora.partition(model)

        def loss(adapters, base, x):
            return (jlora.combine(adapters, base)(x) ** 2).sum()
    else:
        module = jlora.inject(LinenMlp(width, layers), config)
        tree = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        adapters, base = jlora.partition(tree)

        def loss(adapters, base, x):
            return (module.apply({"params": jlora.combine(adapters, base)}, x) ** 2).sum()

    assert len(adapters) == 2 * layers
    compiled = jax.jit(jax.grad(loss)).lower(adapters, base, x).compile()
    per_row = compiled.cost_analysis()["flops"] / rows / (layers * width**2)
    assert 3.4 < per_row <= 3.7, per_row


def test_trains_with_an_optimiser_of_the_whole_tree(linen):
    _, injected, tree = linen
    tx = jlora.optimizer(optax.adam(1e-1))
    state = tx.init(tree)
    before = jax.tree.map(np.array, tree)

    @jax.jit
    def step(tree, state):
        def loss(tree):
            logits = injected.apply({"params": tree}, TOKENS)
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, ::-1]).mean()

        value, grads = jax.value_and_grad(loss)(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    losses = []
    for _ in range(30):
        tree, state, value = step(tree, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_array_equal(tree["down"], before["down"])
    assert np.abs(tree["down_lora_b"]).max() > 0
    assert sum(x.size for x in jax.tree.leaves(state)) <= 1 + 2 * sum(
        np.prod(shape) for shape in factor_shapes().values()
    )
