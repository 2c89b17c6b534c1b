"""Quantised models where something fails midway, is divided, rounded, or has side effects."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import DenyList
from flax.training.train_state import TrainState
from transform_cases import quick  # noqa: F401

import jlora
from jlora.errors import JloraError
from jlora.quant.array import QuantArray
from jlora.quant.quantize import quantize

pytestmark = pytest.mark.usefixtures("strict_promotion", "quick")

X = jnp.linspace(-1, 1, 2 * 64).reshape(2, 64)


# What fails midway.


class Three(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.a = nnx.Linear(64, 64, rngs=rngs)
        self.b = nnx.Linear(64, 64, rngs=rngs)
        self.c = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (jnp.eye(64).at[3, 4].set(jnp.nan), r"^b: of 4096 weights, 1 are infinite or not numbers"),
        (jnp.eye(64).at[3, 4].set(3e38), r"^b: of 4096 weights, 0 .* and 1 are beyond 2\*\*126"),
        (jnp.eye(64, dtype=jnp.int8), r"^b: the weight is int8, and only floats are quantised"),
    ],
    ids=["nan", "large", "integers"],
)
def test_nothing_is_quantised_where_one_weight_cannot_be(weight: jax.Array, text: str) -> None:
    model = Three()
    model.b.kernel.set_value(weight)
    with pytest.raises(JloraError, match=text):
        jlora.quantize(model)
    assert {type(model.a), type(model.b), type(model.c)} == {nnx.Linear}
    model.b.kernel.set_value(jnp.eye(64))
    before = model(X)
    jlora.quantize(model)  # now that it is mended
    assert isinstance(model.b.kernel.get_value(), QuantArray)
    np.testing.assert_allclose(model(X), before, atol=0.3)


def test_every_layer_computes_after_an_error_within_quantisation(monkeypatch: Any) -> None:
    own = jlora.injection.registry.quantize

    def quantize(site: Any, *args: Any) -> QuantArray:
        if site.path == "b":
            raise MemoryError
        return own(site, *args)

    monkeypatch.setattr(jlora.injection.registry, "quantize", quantize)
    model = Three()
    with pytest.raises(MemoryError):
        jlora.quantize(model)
    assert isinstance(model.a.kernel.get_value(), QuantArray)
    assert type(model.b) is nnx.Linear
    assert model(X).shape == (2, 64)
    monkeypatch.undo()
    jlora.quantize(model, jlora.QuantConfig(exclude_modules=("a",)))
    assert isinstance(model.c.kernel.get_value(), QuantArray)


# A Linen layer's own code.


class Watched(nn.Module):
    """A user's own type with statistics, a submodule that has some too, and a sown value."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        table = self.param("table", nn.initializers.lecun_normal(), (64, 64))
        calls = self.variable("stats", "calls", lambda: jnp.zeros(()))
        if self.is_mutable_collection("stats") and not self.is_initializing():
            calls.value = calls.value + 1
            Counter(name="counter")(x)
        y = x @ table
        self.sow("intermediates", "seen", y)
        return y


class Counter(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> None:
        total = self.variable("stats", "total", lambda: jnp.zeros(()))
        total.value = total.value + x.sum()


class Around(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.scanned:
            layer = Watched(name="own")
            return layer(layer(x))  # what it sows is gathered
        axes: Any = {"variable_axes": {"params": 0, "stats": 0, "intermediates": 0}}
        layers: Any = nn.scan(
            lambda layer, x, _: (layer(x), None), split_rngs={"params": True}, length=2, **axes
        )
        return layers(Watched(name="own"), x, None)[0]


@pytest.fixture
def watched() -> Any:
    jlora.register(Watched, weight="table", equation="...i,io->...o")
    yield
    jlora.injection.linen_layer.REGISTRY.pop(Watched)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("scanned", [False, True])
def test_side_effects_of_a_registered_layer(scanned: bool) -> None:
    module = jlora.inject(Around(scanned), jlora.LoraConfig(r=2))
    variables = module.init(jax.random.key(0), X)
    tree, stats = variables["params"], variables["stats"]
    quantised = jlora.quantize(module, params=tree)
    plain = jax.tree.map(
        lambda x: x.dequantize() if isinstance(x, QuantArray) else x,
        quantised,
        is_leaf=lambda x: isinstance(x, QuantArray),
    )

    def run(params: Any, mutable: Any) -> Any:
        return module.apply({"params": params, "stats": stats}, X, mutable=mutable)

    for mutable in (["stats"], ["stats", "intermediates"], DenyList("params"), "intermediates"):
        (y, expected), (got, changed) = run(plain, mutable), jax.jit(run, static_argnums=1)(
            quantised, mutable if isinstance(mutable, str | DenyList) else tuple(mutable)
        )  # fmt: skip
        np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)
        assert jax.tree.structure(changed) == jax.tree.structure(expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), changed, expected)
        assert jax.tree.leaves(changed)
    got = run(quantised, False)
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)


def test_a_quantised_weight_from_elsewhere_meets_a_multiplication_of_the_layers_own() -> None:
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            double = lambda *args, **kw: 2 * jax.lax.dot_general(*args, **kw)  # noqa: E731
            return nn.Dense(64, name="dense", dot_general=double)(x)

    module = jlora.inject(Odd(), jlora.LoraConfig(r=2))
    tree = module.init(jax.random.key(0), X)["params"]
    tree["dense"]["kernel"] = quantize(tree["dense"]["kernel"])
    with pytest.raises(JloraError, match=r"^dense: dot_general of this Dense is one of its own"):
        module.apply({"params": tree}, X)


# What is refused.


class Plain(nn.Module):
    """Of weights in plain parameters alone."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.param("w", nn.initializers.lecun_normal(), (64, 64))


class Held(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Plain(name="plain")(x)


@pytest.mark.parametrize("targets", ["all-linear", ("w",)])
def test_weights_in_plain_parameters_are_named(targets: Any) -> None:
    module = jlora.inject(Held(), jlora.LoraConfig(r=2))
    tree = module.init(jax.random.key(0), X)["params"]
    text = r"^QuantConfig: plain/w: weights in plain parameters cannot be quantised, only.*register"
    with pytest.raises(JloraError, match=text) as caught:
        jlora.quantize(module, jlora.QuantConfig(target_modules=targets), params=tree)
    assert "excluded" not in str(caught.value)


# Optimisers of whole trees.


class Two(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(64, name="b")(jnp.tanh(nn.Dense(64, name="a")(x)))


@pytest.mark.parametrize("quant", ["nf4", "double", "int8"])
def test_a_train_state_of_a_whole_quantised_tree(quant: str) -> None:
    options: Any = {"double": {"double_quant": True}, "int8": {"kind": "int8"}}.get(quant, {})
    module = jlora.inject(Two(), jlora.LoraConfig(r=2))
    tree = module.init(jax.random.key(0), X)["params"]
    tree["a"]["bias"] = -jnp.zeros(64)
    tree = jlora.quantize(module, jlora.QuantConfig(**options), params=tree)
    tx = jlora.optimizer(optax.sgd(0.05, momentum=0.5))
    state = TrainState.create(apply_fn=module.apply, params=tree, tx=tx)

    def step(state: Any) -> Any:
        def loss_of(tree: Any) -> jax.Array:
            return ((state.apply_fn({"params": tree}, X) - 1) ** 2).mean()

        loss, grads = jax.value_and_grad(loss_of, allow_int=True)(state.params)
        return state.apply_gradients(grads=grads), loss

    state, first = step(state)  # without jit too
    for _ in range(8):
        state, loss = jax.jit(step)(state)
    assert loss < 0.9 * first
    adapters, base = jlora.partition(state.params)
    before, same = jlora.partition(tree)
    base, same = base.rest, same.rest  # without the order of keys, which JAX sorts
    assert jax.tree.structure(base) == jax.tree.structure(same)
    for leaf, expected in zip(jax.tree.leaves(base), jax.tree.leaves(same), strict=True):
        assert leaf.dtype == expected.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes()  # -0 is no +0
    assert not any(np.array_equal(adapters[path], before[path]) for path in before)


def test_codes_need_the_parameters() -> None:
    module = jlora.inject(Two(), jlora.LoraConfig(r=2))
    tree = module.init(jax.random.key(0), X)["params"]
    tree = jlora.quantize(module, params=tree)
    tx = jlora.optimizer(optax.sgd(0.1))
    grads = jax.grad(lambda p: module.apply({"params": p}, X).sum(), allow_int=True)(tree)
    with pytest.raises(JloraError, match=r"holds integers.*update\(gradients, state, params\)"):
        tx.update(grads, tx.init(tree))
