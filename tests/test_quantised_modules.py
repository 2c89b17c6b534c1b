"""Quantised modules are modules: what users do with their own, they do with these."""

import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from transform_cases import quick  # noqa: F401

import jlora
from jlora import injection
from jlora.injection import params as trees
from jlora.quant.array import QuantArray

pytestmark = pytest.mark.usefixtures("strict_promotion", "quick")

CONFIG = jlora.LoraConfig(r=2, lora_alpha=6)
QUANT = jlora.QuantConfig(block_size=32)
X = jnp.linspace(-1, 1, 2 * 64).reshape(2, 64)


def values(leaves: dict[str, Any]) -> dict[str, jax.Array]:
    """Other numbers for leaves by path."""
    return {
        path: jnp.asarray(np.random.default_rng(i).normal(scale=0.2, size=leaf.shape), leaf.dtype)
        for i, (path, leaf) in enumerate(sorted(leaves.items()))
    }


def assert_close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def assert_same(tree: Any, other: Any) -> None:
    """Bits, dtypes and structure."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)


# NNX.


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(64, 40, rngs=rngs)
        self.down = nnx.Linear(40, 64, rngs=rngs)
        self.width = 4

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.hidden(x))

    def hidden(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.up(inputs=x))


def nnx_model(**options: Any) -> Any:
    model = jlora.quantize(NnxModel(nnx.Rngs(0)), QUANT)
    jlora.inject(model, jlora.LoraConfig(r=2, lora_alpha=6, **options), rngs=nnx.Rngs(0))
    injection.update(model, values(jlora.partition(model)[0]))
    return model


COPIES: dict[str, Callable[[Any], Any]] = {
    "split and merge": lambda model: nnx.merge(*nnx.split(model)),
    "clone": nnx.clone,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "partition": lambda model: jlora.combine(*jlora.partition(model)),
    "through jit": nnx.jit(lambda model: model),
    "pytree": lambda model: jax.tree.map(lambda x: x, nnx.split(model)[1]) and nnx.clone(model),
}


@pytest.mark.parametrize("injected", [True, False], ids=["injected", "quantised"])
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_copies_of_an_nnx_model(copy: Callable[[Any], Any], injected: bool) -> None:
    model = nnx_model()
    if not injected:
        jlora.eject(model)
    y = model(X)
    other = copy(model)
    assert (type(other), type(other.up), other.width) == (type(model), type(model.up), 4)
    assert isinstance(other, NnxModel)
    assert isinstance(other.up, nnx.Linear)
    assert isinstance(other.up.kernel.get_value(), QuantArray)
    assert_same(nnx.state(other), nnx.state(model))
    np.testing.assert_array_equal(other(X), y)
    assert_close(nnx.jit(lambda model, x: model(x))(other, X), y)
    assert_close(other.hidden(X), model.hidden(X))
    assert_close(jlora.merge(other)(X), y)


def test_partition_is_exact_and_copies_nothing() -> None:
    model = nnx_model()
    adapters, base = jlora.partition(model)
    assert set(adapters) == {f"{n}/lora_{c}" for n in ("up", "down") for c in "ab"}
    other = jlora.combine(adapters, base)
    assert nnx.graphdef(other) == nnx.graphdef(model)
    for leaf, same in zip(*(jax.tree.leaves(nnx.state(m)) for m in (other, model)), strict=True):
        assert leaf is same
    whole, _ = injection.partition(model, everything=True)
    assert isinstance(whole["up/kernel"], QuantArray)


def loss_of(model: Any) -> jax.Array:
    return ((model(X) - 1) ** 2).mean()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nnx_optimizer_trains_the_factors_alone(dropout: float) -> None:
    model = nnx_model(lora_dropout=dropout, bias="lora_only")
    before = nnx.state(nnx.clone(model))
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.5), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    after = nnx.state(model)
    for name in ("up", "down"):
        assert_same(after[name]["kernel"], before[name]["kernel"])
        assert not np.array_equal(after[name]["bias"][...], before[name]["bias"][...])
        assert not np.array_equal(after[name]["lora_b"][...], before[name]["lora_b"][...])


def test_adapters_on_disk(tmp_path: Any) -> None:
    model = nnx_model()
    jlora.save_adapter(tmp_path / "own", model, CONFIG)
    jlora.export_peft(tmp_path / "peft", model, CONFIG)
    for load, path in ((jlora.load_adapter, "own"), (jlora.import_peft, "peft")):
        fresh = jlora.quantize(NnxModel(nnx.Rngs(0)), QUANT)
        load(tmp_path / path, fresh)
        np.testing.assert_array_equal(fresh(X), model(X))
        again = load(tmp_path / path, jlora.combine(*jlora.partition(fresh)))  # injected by now
        np.testing.assert_array_equal(again(X), model(X))


def test_counts_are_of_the_weights_not_of_the_codes() -> None:
    plain = jlora.inject(NnxModel(nnx.Rngs(0)), CONFIG, rngs=0)
    assert jlora.summary(nnx_model()) == jlora.summary(plain)
    _, tree = linen_model(Methods())
    _, plain_tree = linen_model(Methods(), None)
    assert jlora.summary(tree) == jlora.summary(plain_tree)


def test_merge_makes_arrays_of_what_is_quantised_and_not_adapted() -> None:
    model = jlora.quantize(NnxModel(nnx.Rngs(0)), QUANT)
    jlora.inject(model, jlora.LoraConfig(r=2, target_modules=("up",)), rngs=0)
    merged = jlora.merge(model)
    assert (type(merged.up), type(merged.down)) == (nnx.Linear, nnx.Linear)
    assert not any(
        isinstance(x, QuantArray) for x in injection.partition(merged, everything=True)[0].values()
    )
    assert_close(merged(X), model(X))
    assert isinstance(model.down.kernel.get_value(), QuantArray)

    module, tree = linen_model(Methods(), config=jlora.LoraConfig(r=2, target_modules=("inner",)))
    flat = trees.flatten(jlora.merge(module, tree))
    assert all(isinstance(leaf, jax.Array) for leaf in flat.values())
    assert_close(
        Methods().apply({"params": trees.unflatten(flat)}, X), module.apply({"params": tree}, X)
    )


def test_a_stack_with_ranks_of_its_own() -> None:
    def block(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(64, 64, rngs=rngs)

    class Stacked(nnx.Module):
        stacked_layers = ("layers",)

        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.vmap(block)(rngs.split(2))

        def __call__(self, x: jax.Array) -> jax.Array:
            scan = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return scan(x, self.layers)

    model = jlora.quantize(Stacked(nnx.Rngs(0)), QUANT)
    config = jlora.LoraConfig(r=2, rank_pattern={r"layers\.1": 4})
    jlora.inject(model, config, rngs=0)
    injection.update(model, values(jlora.partition(model)[0]))
    assert model.layers.kernel.get_value().codes.shape == (2, 32, 64)
    assert_close(jlora.merge(model)(X), model(X))
    assert not np.allclose(jlora.merge(jlora.eject(nnx.clone(model)))(X), model(X))


# As the layers of Flax.


FLOATS = (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
@pytest.mark.parametrize("dtype", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("param_dtype", FLOATS)
def test_dtypes(flavour: str, dtype: Any, param_dtype: Any) -> None:
    """Of outputs, of gradients of the input, and of what strict promotion refuses."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(8, dtype=dtype, param_dtype=param_dtype)(x)

    class Other(nnx.Module):
        def __init__(self) -> None:
            options: Any = {"dtype": dtype, "param_dtype": param_dtype}
            self.layer = nnx.Linear(64, 8, **options, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layer(x)

    stock: Any = Other()
    model = jlora.quantize(Other(), QUANT)
    if flavour == "linen":
        module: Any = jlora.inject(Model(), CONFIG)
        x = X.astype(dtype or param_dtype)
        tree = module.init(jax.random.key(0), x)["params"]
        quantised = jlora.quantize(module, QUANT, params=tree)
        stock = lambda x: Model().apply({"params": jlora.merge(module, tree)}, x)  # noqa: E731
        model = lambda x: module.apply({"params": quantised}, x)  # noqa: E731

    def seen(model: Any, x: jax.Array) -> Any:
        try:
            y, back = jax.vjp(model, x)
        except jax.dtypes.TypePromotionError:
            return "refused"
        return y.dtype, y.shape, back(jnp.ones_like(y))[0].dtype

    inputs = [X.astype(d) for d in FLOATS]
    inputs.append(jnp.full((2, 64), 2.0))
    assert inputs[-1].weak_type
    inputs.append(np.asarray(X))
    results = [seen(model, x) for x in inputs]
    assert results == [seen(stock, x) for x in inputs]
    assert ("refused" in results) == (dtype is None)


@pytest.mark.parametrize("precision", [None, "highest", jax.lax.Precision.HIGH])
def test_precision_is_the_layers_own_forward_and_backward(precision: Any) -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(8, precision=precision)(x)

    def dots(run: Callable[..., jax.Array]) -> list[Any]:
        text = str(jax.make_jaxpr(lambda x: jax.vjp(run, x)[1](jnp.ones((2, 8))))(X))
        return sorted(line.strip() for line in text.splitlines() if "precision=" in line)

    module = jlora.inject(Model(), CONFIG)
    tree = module.init(jax.random.key(0), X)["params"]
    quantised = jlora.quantize(module, QUANT, params=tree)
    own, other = (dots(lambda x, t=t: module.apply({"params": t}, x)) for t in (tree, quantised))
    assert own == other
    assert any("Precision" in line for line in own) == (precision is not None)


# Linen.


class Methods(nn.Module):
    """Public methods that call each other, in the style of setup."""

    def setup(self) -> None:
        self.inner = nn.Dense(40)
        self.outer = nn.Dense(64)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(self.encode(x))

    def encode(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.inner(x))


class Lifted(nn.Module):
    """Experts by nn.vmap, a layer by nn.remat, and one of a parameter of the module's own."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        experts: Any = nn.vmap(
            nn.Dense, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True},
            axis_size=3,
        )  # fmt: skip
        x = experts(64, name="experts")(x).sum(0)
        remat: Any = nn.remat(nn.Dense)
        x = remat(64, name="remat")(jnp.tanh(x))
        return x @ self.param("plain", nn.initializers.lecun_normal(), (64, 64))


class Scaled(nn.Dense):
    """A subclass that calls its own type's code."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return 2 * super().__call__(inputs)


class Sub(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Scaled(64, name="scaled")(x)


def linen_model(
    module: nn.Module, quant: Any = QUANT, config: jlora.LoraConfig = CONFIG
) -> tuple[Any, Any]:
    model: Any = jlora.inject(module, config)
    tree = model.init(jax.random.key(0), X)["params"]
    factors, rest = jlora.partition(tree)
    tree = jlora.combine(values(factors), rest)
    return model, tree if quant is None else jlora.quantize(model, quant, params=tree)


@pytest.mark.parametrize("module", [Methods(), Lifted(), Sub()], ids=lambda m: type(m).__name__)
def test_linen_modules(module: nn.Module) -> None:
    config = jlora.LoraConfig(r=2, lora_alpha=6, target_modules=".*")
    model, tree = linen_model(module, config=config)
    linears = {p for p, x in trees.flatten(tree).items() if isinstance(x, QuantArray)}
    assert linears == {p for p in trees.flatten(tree) if p.endswith("/kernel")}
    y = model.apply({"params": tree}, X)
    merged = jlora.merge(model, tree)
    assert_close(y, module.apply({"params": merged}, X))
    assert_close(jax.jit(model.apply)({"params": tree}, X), y)
    if not isinstance(module, Lifted):  # weights in plain parameters need the module's own apply
        assert_close(model.bind({"params": tree})(X), y)
    frozen = jlora.quantize(model, QUANT, params=FrozenDict(linen_model(module, None, config)[1]))
    assert isinstance(frozen, FrozenDict)
    assert_same(frozen.unfreeze(), tree)
    assert_close(model.apply({"params": frozen}, X), y)
    adapters, base = jlora.partition(tree)
    assert_same(jlora.combine(adapters, base), tree)


def test_methods_and_pickles_of_a_quantised_linen_module() -> None:
    model, tree = linen_model(Methods())
    expected = Methods().apply({"params": jlora.merge(model, tree)}, X, method="encode")
    assert_close(model.apply({"params": tree}, X, method="encode"), expected)
    assert_close(model.apply({"params": tree}, X, method=Methods.encode), expected)
    again, copy = pickle.loads(pickle.dumps((model, tree)))
    assert_same(copy, tree)
    assert_close(again.apply({"params": copy}, X), model.apply({"params": tree}, X))


def test_train_state() -> None:
    model, tree = linen_model(Methods())
    adapters, base = jlora.partition(tree)

    def apply(adapters: Any, x: jax.Array) -> jax.Array:
        return model.apply({"params": jlora.combine(adapters, base)}, x)

    state = TrainState.create(apply_fn=apply, params=adapters, tx=optax.sgd(0.05, momentum=0.5))

    @jax.jit
    def step(state: Any) -> Any:
        grad = jax.value_and_grad(lambda p: ((state.apply_fn(p, X) - 1) ** 2).mean())
        loss, grads = grad(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(8):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_a_linen_tree_on_disk(tmp_path: Any) -> None:
    model, tree = linen_model(Methods())
    jlora.save_adapter(tmp_path / "a", model, CONFIG, params=tree)
    fresh, other = linen_model(Methods())
    factors, rest = jlora.partition(other)
    other = jlora.combine({p: 0 * f for p, f in factors.items()}, rest)
    loaded = jlora.load_adapter(tmp_path / "a", fresh, params=other)
    assert_same(loaded, tree)
