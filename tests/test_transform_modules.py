"""Injected modules are modules: what users do with their own, they do with these."""

import functools
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from transform_cases import quick  # noqa: F401

import jlora
from jlora import injection
from jlora.errors import JloraError
from jlora.injection import params as trees

pytestmark = pytest.mark.usefixtures("strict_promotion", "quick")

CONFIG = jlora.LoraConfig(r=2, lora_alpha=6, target_modules=".*")
X = jnp.linspace(-1, 1, 12).reshape(2, 6)


def values(leaves: dict[str, Any]) -> dict[str, jax.Array]:
    """Other numbers for leaves by path."""
    return {
        path: jnp.asarray(np.random.default_rng(i).normal(scale=0.5, size=leaf.shape), leaf.dtype)
        for i, (path, leaf) in enumerate(sorted(leaves.items()))
    }


def formed(tree: Any, scaling: float = 3.0) -> dict[str, Any]:
    """The base's tree with W + s * A^T B for matrices."""
    flat = trees.flatten(tree)
    for path in [path for path in flat if path.endswith("/lora_a")]:
        parent = path.rpartition("/")[0]
        a, b = flat.pop(path), flat.pop(f"{parent}/lora_b")
        flat[f"{parent}/kernel"] += scaling * jnp.einsum("...ri,...ro->...io", a, b)
    return trees.unflatten(flat)


def trained(module: nn.Module, *args: Any, config: Any = CONFIG) -> tuple[Any, Any]:
    """The injected module, and its tree with factors that are not zero."""
    model: Any = jlora.inject(module, config)
    tree = model.init(jax.random.key(0), *args)["params"]
    factors, rest = jlora.partition(tree)
    assert factors
    return model, jlora.combine(values(factors), rest)


def assert_close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


class Methods(nn.Module):
    """Public methods that call each other, in the style of setup."""

    width: int = 5

    def setup(self) -> None:
        self.inner = nn.Dense(self.width)
        self.outer = nn.Dense(6)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.encode(x))

    def encode(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.inner(x))

    def decode(self, h: jax.Array) -> jax.Array:
        return self.outer(h) + self.twice(h).sum()

    def twice(self, h: jax.Array) -> jax.Array:
        return self.outer(self.encode(self.outer(h)))


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(6)(jnp.tanh(nn.Dense(5)(x)))


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + Compact(name="compact")(x)
        return x + Methods(name="methods")(x)


class SharedTwice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = Compact(name="block")
        return block(block(x))


class Passed(nn.Module):
    """Holds a module that was made outside."""

    block: nn.Module

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.block(x)


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.remat(nn.Dense)(6, name="dense")(x)


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0
        )
        return dense(6, name="dense")(x)


class Doubled(nn.Dense):
    def __call__(self, x: jax.Array) -> jax.Array:
        return 2 * super().__call__(x)


class Subclass(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Doubled(6)(x)


class ByName(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(6)(inputs=x)


LINEN: dict[str, Callable[[], nn.Module]] = {
    "methods": Methods,
    "compact": Compact,
    "nested": Nested,
    "shared": SharedTwice,
    "passed": lambda: Passed(Compact()),
    "remat of a layer": Remat,
    "vmap of a layer": Vmapped,
    "sequential": lambda: nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(6)]),
    "input by name": ByName,
    "subclass of a layer": Subclass,
}
EVERY = pytest.mark.parametrize("make", LINEN.values(), ids=LINEN)


@EVERY
def test_linen_module(make: Callable[[], nn.Module]) -> None:
    module = make()
    model, tree = trained(module, X)
    expected = module.apply({"params": formed(tree)}, X)
    assert_close(model.apply({"params": tree}, X), expected)
    assert_close(jax.jit(model.apply)({"params": tree}, X), expected)
    assert_close(model.clone().apply({"params": tree}, X), expected)
    merged = jlora.merge(model, tree)
    assert_close(module.apply({"params": merged}, X), expected)
    base = module.init(jax.random.key(0), X)["params"]
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert isinstance(model, type(module))
    assert jlora.eject(model) == module
    assert type(jlora.eject(model)) is type(module)
    table = jlora.plan_targets(module, CONFIG, X)
    assert table.parameters == injection.count(tree)[0]


@pytest.mark.parametrize("method", ["encode", "decode", "twice"])
def test_methods_of_a_linen_module(method: str) -> None:
    model, tree = trained(Methods(), X)
    x = X if method == "encode" else jnp.linspace(-1, 1, 10).reshape(2, 5)
    expected = Methods().apply({"params": formed(tree)}, x, method=method)
    assert_close(model.apply({"params": tree}, x, method=method), expected)
    assert_close(model.apply({"params": tree}, x, method=getattr(Methods, method)), expected)
    bound = model.bind({"params": tree})
    assert_close(getattr(bound, method)(x), expected)
    if method == "encode":  # by a function of the user's
        x = model.apply({"params": tree}, x, method=lambda module, x: jnp.tanh(module.inner(x)))
        assert_close(x, expected)


def test_attributes_and_copies_of_a_linen_module() -> None:
    model, tree = trained(Methods(width=4), X)
    assert model.width == 4
    assert isinstance(model, Methods)
    assert model.clone(width=3).width == 3
    again = pickle.loads(pickle.dumps(model))
    assert_close(again.apply({"params": tree}, X), model.apply({"params": tree}, X))
    assert jlora.eject(again) == Methods(width=4)
    assert tree["inner"].keys() == {"kernel", "bias", "lora_a", "lora_b"}
    table = nn.tabulate(model, jax.random.key(0), console_kwargs={"width": 200})(X)
    assert "lora_a" in table
    assert "inner" in table


def test_an_injected_module_within_another() -> None:
    inner = jlora.inject(Compact(), CONFIG)
    outer = Passed(inner)
    tree = outer.init(jax.random.key(0), X)["params"]
    assert tree["block"]["Dense_0"].keys() == {"kernel", "bias", "lora_a", "lora_b"}
    factors, rest = jlora.partition(tree)
    tree = jlora.combine(values(factors), rest)
    expected = Passed(Compact()).apply({"params": formed(tree)}, X)
    assert_close(outer.apply({"params": tree}, X), expected)


def test_a_linen_method_that_returns_no_array_and_one_static() -> None:
    class Model(nn.Module):
        def setup(self) -> None:
            self.dense = nn.Dense(6)

        def __call__(self, x: jax.Array, *, flip: bool = False) -> dict[str, Any]:
            return {"y": self.dense(-x if flip else x), "name": self.label()}

        @staticmethod
        def label() -> str:
            return "label"

    model, tree = trained(Model(), X)
    out = model.apply({"params": tree}, X, flip=True)
    assert out["name"] == "label"
    assert_close(out["y"], Model().apply({"params": formed(tree)}, X, flip=True)["y"])


# A user's own types of layers.


class LinenScale(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.param("table", nn.initializers.ones, (self.features, x.shape[-1])).T


class LinenOwn(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return LinenScale(5, name="own")(x)


class NnxScale(nnx.Module):
    def __init__(self, inputs: int, features: int):
        self.table = nnx.Param(jnp.ones((features, inputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.table.T


class NnxOwn(nnx.Module):
    def __init__(self):
        self.own = NnxScale(6, 5)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.own(x)


@pytest.fixture
def registered() -> Any:
    tables = (injection.linen.REGISTRY, injection.nnx_sites.REGISTRY)
    for cls in (LinenScale, NnxScale):
        jlora.register(cls, weight="table", equation="...i,oi->...o")
    yield
    tables[0].pop(LinenScale)
    tables[1].pop(NnxScale)


@pytest.mark.usefixtures("registered")
def test_own_layer_types() -> None:
    linen, tree = trained(LinenOwn(), X)
    a, b = tree["own"]["lora_a"], tree["own"]["lora_b"]
    assert (a.shape, b.shape) == ((2, 6), (2, 5))
    expected = X @ (tree["own"]["table"] + 3 * b.T @ a).T
    assert_close(linen.apply({"params": tree}, X), expected)
    assert_close(LinenOwn().apply({"params": jlora.merge(linen, tree)}, X), expected)

    model = jlora.inject(NnxOwn(), CONFIG, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(X), X @ jnp.ones((6, 5)))
    assert isinstance(model.own, NnxScale)
    injection.update(model, {"own/lora_a": a, "own/lora_b": b})
    assert_close(model(X), expected)
    assert_close(jlora.merge(model)(X), expected)


def test_register_takes_flax_classes() -> None:
    with pytest.raises(JloraError, match=r"register takes a class of Flax modules, got 3"):
        jlora.register(3, weight="w", equation="...i,io->...o")  # type: ignore[arg-type]


# NNX.


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(6, 4, rngs=rngs)
        self.down = nnx.Linear(4, 6, rngs=rngs)
        self.width = 4

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.hidden(x))

    def hidden(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.up(inputs=x))


COPIES: dict[str, Callable[[Any], Any]] = {
    "split and merge": lambda model: nnx.merge(*nnx.split(model)),
    "clone": nnx.clone,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "partition": lambda model: jlora.combine(*jlora.partition(model)),
    "itself": lambda model: model,
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_nnx_model(copy: Callable[[Any], Any]) -> None:
    model = NnxModel(nnx.Rngs(0))
    graphdef, bits = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model))
    bits = jax.tree.map(np.array, bits)
    jlora.inject(model, CONFIG, rngs=nnx.Rngs(0))
    factors = values(jlora.partition(model)[0])
    injection.update(model, factors)
    other = copy(model)
    up, down = (
        bits[n]["kernel"] + 3 * factors[f"{n}/lora_a"].T @ factors[f"{n}/lora_b"]
        for n in ("up", "down")
    )
    assert_close(other.hidden(X), jnp.tanh(X @ up))
    assert_close(other(X), jnp.tanh(X @ up) @ down)
    assert_close(nnx.jit(lambda model, x: model(x))(other, X), jnp.tanh(X @ up) @ down)
    assert other.width == 4
    assert isinstance(other, NnxModel)
    assert isinstance(other.up, nnx.Linear)
    jlora.eject(other)
    assert nnx.graphdef(other) == graphdef
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(other)), bits)


class NnxTied(nnx.Module):
    """Two modules that share one variable."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(6, 4, rngs=rngs)
        self.other = nnx.Embed(6, 4, rngs=rngs)
        self.other.embedding = self.embed.embedding


@pytest.mark.parametrize(
    "changes", [{"target_modules": ".*"}, {"trainable_token_indices": {"embed": (1,)}}]
)
def test_a_shared_variable_is_refused_with_the_reason(changes: dict) -> None:
    model = NnxTied(nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    with pytest.raises(JloraError, match=r"embed.* also used by .*other/embedding"):
        jlora.inject(model, jlora.LoraConfig(**{"target_modules": ".*"} | changes), rngs=0)
    assert nnx.graphdef(model) == graphdef


# What it costs.


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = nn.relu(nn.Dense(1024, use_bias=False)(x))
        return x


class NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        layer = functools.partial(nnx.Linear, 1024, 1024, use_bias=False, kernel_init=zeros)
        self.layers = nnx.List([layer(rngs=rngs) for _ in range(4)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_no_gradient_of_the_base_is_computed(flavour: str) -> None:
    """2 N a row forward, 1.5 N back (not to the input), factors; 2 N more with the base's."""
    rows, n = 4096, 4 * 1024 * 1024
    x = jax.ShapeDtypeStruct((rows, 1024), jnp.float32)
    config = jlora.LoraConfig(r=8, lora_alpha=8)
    if flavour == "linen":
        model = jlora.inject(LinenMlp(), config)
        tree = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        factors, rest = jlora.partition(tree)
        run = lambda f, rest, x: model.apply({"params": jlora.combine(f, rest)}, x)  # noqa: E731
    else:
        factors, rest = jlora.partition(jlora.inject(NnxMlp(nnx.Rngs(0)), config, rngs=0))
        run = lambda f, rest, x: jlora.combine(f, rest)(x)  # noqa: E731
    grad = jax.jit(jax.grad(lambda f, rest, x: run(f, rest, x).sum()))
    flops = grad.lower(factors, rest, x).compile().cost_analysis()["flops"] / rows / n
    print(f"{flavour}: {flops:.4f} N FLOPs a row")
    assert 3.5 < flops <= 3.7
