"""Factors that would do nothing: of modules called by themselves, of calls that use less."""

import pickle
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jlora

RANDOM = {"r": 2, "init_lora_weights": False}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.float32)


def assert_close(got: Any, expected: Any) -> None:
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


class Product(nnx.Module):
    """A weight in a plain parameter, and a count of calls."""

    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(rngs.params.normal((8, 8)))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return x @ self.w[...]

    def back(self, x: jax.Array) -> jax.Array:
        return x @ self.w[...].T


class Block(nnx.Module):
    """One layer is called, of the other the kernel is read."""

    def __init__(self, rngs: nnx.Rngs):
        self.plain = Product(rngs)
        self.read, self.called = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.called(jnp.tanh(self.plain(x) @ self.read.kernel[...]))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.steps = nnx.Sequential(Product(rngs), nnx.LayerNorm(8, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.steps(x)


PARTS = {
    "a block": lambda m: m.blocks[1](X),
    "a module of a block": lambda m: m.blocks[0].plain(X),
    "another method": lambda m: m.blocks[0].plain.back(X),
    "a layer": lambda m: m.blocks[0].read(X),
    "a sequence": lambda m: m.steps(X),
    "in nnx.jit": lambda m: nnx.jit(lambda block: block(X))(m.blocks[0]),
    "the model": lambda m: m(X),
}


def injected(**config: Any) -> tuple[Model, Model]:
    """A model as it was, and injected."""
    model = Model(nnx.Rngs(0))
    original = nnx.clone(model)
    config = {"target_modules": r".*(w|read|called)"} | RANDOM | config
    jlora.inject(model, jlora.LoraConfig(**config), rngs=nnx.Rngs(1), inputs=(X,))
    return original, model


@pytest.mark.parametrize("part", PARTS)
def test_a_module_within_a_model_is_adapted_when_it_is_called_by_itself(part: str) -> None:
    call, (original, model) = PARTS[part], injected()
    merged, before = jlora.merge(model), call(original)
    assert np.abs(call(model) - before).max() > 0.01 * np.abs(before).max()
    assert_close(call(model), call(merged))
    adapters, base = jlora.partition(model)
    grads = jax.grad(lambda a: (call(jlora.combine(a, base)) ** 2).sum())(adapters)
    reached = {path for path, grad in grads.items() if np.abs(grad).max() > 0}
    assert reached
    if part == "the model":
        assert reached == set(adapters)


def test_what_a_module_within_a_model_changes_is_written() -> None:
    original, model = injected()
    for m in (original, model):
        m.blocks[0](X)
        m.blocks[0].plain(X)
        m(X)
    assert int(model.blocks[0].plain.calls[...]) == int(original.blocks[0].plain.calls[...]) == 3


def test_modules_within_are_what_they_were_again() -> None:
    original, model = injected()
    assert isinstance(model.blocks[0].plain, Product)
    pickled = pickle.loads(pickle.dumps(model))
    assert_close(pickled.blocks[1](X), model.blocks[1](X))
    assert nnx.graphdef(jlora.merge(model)) == nnx.graphdef(original)
    jlora.eject(model)
    assert nnx.graphdef(model) == nnx.graphdef(original)
    assert type(model.blocks[0].plain) is Product


def test_without_inputs_a_layer_that_a_part_reads_is_found_there() -> None:
    model = Model(nnx.Rngs(0))
    config = jlora.LoraConfig(target_modules=("read",), **RANDOM)
    before = model.blocks[0](X)
    jlora.inject(model, config, rngs=nnx.Rngs(1))
    assert np.abs(model.blocks[0](X) - before).max() > 0.01
    assert_close(model.blocks[0](X), jlora.merge(model).blocks[0](X))


class Towers(nn.Module):
    """`init` by another method meets more layers than a call uses."""

    def setup(self) -> None:
        self.left, self.right = nn.Dense(4), nn.Dense(4)

    def __call__(self, x: jax.Array, both: bool = False) -> jax.Array:
        return self.left(x) + self.right(x) if both else self.left(x)

    def everything(self, x: jax.Array) -> jax.Array:
        return self.left(x) + self.right(x)


@pytest.mark.parametrize("made", [{"method": "everything"}, {"both": True}], ids=str)
def test_a_linen_call_says_which_adapter_it_does_not_use(made: Any) -> None:
    module = jlora.inject(Towers(), jlora.LoraConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = (X, True) if made.get("both") else (X,)
        kwargs = {k: v for k, v in made.items() if k == "method"}
        params = module.init(jax.random.key(0), *args, **kwargs)["params"]
        module.apply({"params": params}, *args, **kwargs)
    with pytest.warns(UserWarning, match=r"^right/kernel: the weight is not used by this call"):
        module.apply({"params": params}, X)
    with warnings.catch_warnings():  # it is said once, and not of other methods
        warnings.simplefilter("error")
        module.apply({"params": params}, X)
        module.apply({"params": params}, X, method=lambda m, x: m.right(x))


def test_a_linen_call_that_uses_all_says_nothing() -> None:
    module = jlora.inject(Towers(), jlora.LoraConfig(r=2, target_modules=("left",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = module.init(jax.random.key(0), X, method="everything")["params"]
        module.apply({"params": params}, X)


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        ({"bias": "all"}, {"Dense_0/bias", "Dense_1/bias", "LayerNorm_0/bias"}),
        ({"modules_to_save": ("Dense_1",)}, {"Dense_1/kernel", "Dense_1/bias"}),
        ({"modules_to_save": ("LayerNorm_0",)}, {"LayerNorm_0/scale", "LayerNorm_0/bias"}),
    ],
    ids=["bias", "a layer", "a norm"],
)
def test_what_is_trained_as_a_whole_in_a_bridged_module(config: Any, trained: set[str]) -> None:
    class Bridged(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(4)(nn.relu(nn.LayerNorm()(nn.Dense(8)(x))))

    model = nnx.bridge.ToNNX(Bridged(), rngs=nnx.Rngs(0)).lazy_init(X)
    graphdef, before = nnx.graphdef(model), model(X)
    lora = jlora.LoraConfig(r=2, target_modules=("Dense_0.kernel",), **config)
    jlora.inject(model, lora, rngs=nnx.Rngs(1), inputs=(X,))
    adapters, base = jlora.partition(model)
    factors = {f"Dense_0/kernel_{name}" for name in ("lora_a", "lora_b")}
    assert set(adapters) == factors | trained
    np.testing.assert_array_equal(model(X), before)
    grads = jax.grad(lambda a: (jlora.combine(a, base)(X) ** 2).sum())(adapters)
    moved = jlora.combine({path: a - grads[path] for path, a in adapters.items()}, base)
    assert all(np.abs(grads[path]).max() > 0 for path in trained)
    assert_close(jlora.merge(moved)(X), moved(X))
    jlora.eject(model)
    assert nnx.graphdef(model) == graphdef
    np.testing.assert_array_equal(model(X), before)


@pytest.mark.parametrize("name", ["lora_scale", "lora_a", "lora_kernel"])
def test_a_saved_module_of_nnx_has_its_own_parameters_called_lora(name: str) -> None:
    class Gate(nnx.Module):
        def __init__(self) -> None:
            setattr(self, name, nnx.Param(jnp.ones(8)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x * getattr(self, name)[...]

    class Gated(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.gate, self.down = Gate(), nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.down(self.gate(x))

    model = Gated(nnx.Rngs(0))
    config = jlora.LoraConfig(r=2, modules_to_save=("gate",))
    jlora.inject(model, config, rngs=nnx.Rngs(1))
    adapters, _ = jlora.partition(model)
    assert set(adapters) == {"down/lora_a", "down/lora_b", f"gate/{name}"}
