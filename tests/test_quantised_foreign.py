"""A quantised weight where an array is needed: an error that names it, never other numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.errors import ScopeParamShapeError
from test_quantised_errors import KINDS, LinenModel, X, linen, quantise
from transform_cases import quick  # noqa: F401

import jlora
from jlora import injection
from jlora.errors import JloraError

pytestmark = pytest.mark.usefixtures("quick")


class Foreign(nnx.Module):
    """Reads the weight of a layer that it holds."""

    def __init__(self, use: Callable[..., Any]) -> None:
        self.dense = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        self.use = use

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.use(x, self.dense.kernel)


USES: dict[str, Callable[..., Any]] = {
    "kernel[...]": lambda x, k: x @ k[...],
    "@": lambda x, k: x @ k,
    "* 2": lambda x, k: x @ (k * 2),
    ".T": lambda x, k: x @ k.T,
    ".astype": lambda x, k: x @ k.astype(x.dtype),
    "jnp.dot": lambda x, k: jnp.dot(x, k),
    "jnp.dot of the value": lambda x, k: jnp.dot(x, k.get_value()),
    "einsum": lambda x, k: jnp.einsum("bi,io->bo", x, k.get_value()),
    "jnp.asarray": lambda x, k: jnp.asarray(k.get_value()),
    "numpy": lambda x, k: np.asarray(k.get_value()),
    "numpy of the variable": lambda x, k: np.asarray(k),
    "numpy @": lambda x, k: np.ones((2, 64)) @ k.get_value(),
    "jnp.where": lambda x, k: jnp.where(x[0] > 0, k.get_value(), 0),
    "stack": lambda x, k: jnp.stack([k.get_value()] * 2),
    "the class's own call": None,  # type: ignore[dict-item]
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("use", USES)
def test_foreign_code_gets_an_error_that_says_which_weight(kind: Any, jit: bool, use: str) -> None:
    config = jlora.QuantConfig(kind=kind)
    model = Foreign(USES[use])
    if USES[use] is None:
        model.use = lambda x, _: nnx.Linear.__call__(model.dense, x)
    jlora.quantize(model, config)
    run = nnx.jit(lambda model, x: model(x)) if jit and USES[use] else lambda model, x: model(x)
    with pytest.raises((JloraError, TypeError)) as error:
        run(model, X)
    assert f"QuantArray({kind}, shape=(64, 64), dtype=float32" in str(error.value)
    if isinstance(error.value, JloraError):
        assert "It is a quantised weight, not an array" in str(error.value)
    else:  # JAX's own words, where it asks for no attribute
        assert "QuantArray" in str(error.value)


class Own(nn.Module):
    """Of no registered type."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (64, 64))


class Reads(nn.Dense):
    """A subclass of a registered type that uses its weight itself."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return 2 * inputs @ self.param("kernel", self.kernel_init, (64, 64))


class Block(nn.Module):
    of: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Reads(64, name="inner")(x) if self.of == "Reads" else Own(name="inner")(x)
        return nn.Dense(64, name="dense")(x)


class Outer(nn.Module):
    of: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Block(self.of, name="block")(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["Own", "Reads"])
def test_foreign_linen_code_gets_an_error_with_the_path(kind: Any, of: str) -> None:
    """Codes of int8 have the kernel's own shape, so that Linen's check of shapes passes them."""
    module, tree = linen(Outer(of))
    tree = jlora.quantize(
        module, jlora.QuantConfig(kind=kind, target_modules=("dense",)), params=tree
    )
    assert module.apply({"params": tree}, X).shape == (2, 64)
    tree["block"]["inner"]["kernel"] = tree["block"]["dense"]["kernel"]
    with pytest.raises(
        JloraError,
        match=rf"^block/inner/kernel is quantised, and the code of {of} could not(.|\n)*exclude",
    ):
        module.apply({"params": tree}, X)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_is_not_injected_computes_nothing(kind: Any, jit: bool) -> None:
    module, tree = linen()
    tree = jlora.quantize(module, jlora.QuantConfig(kind=kind), params=tree)
    tree = jax.tree.map(lambda x: x, tree)
    if kind == "int8":
        assert tree["dense"]["kernel"].codes.shape == (64, 64)
    for plain in (LinenModel(), jlora.eject(module)):
        apply = jax.jit(plain.apply) if jit else plain.apply
        with pytest.raises((JloraError, ScopeParamShapeError)) as error:
            apply({"params": tree}, X)
        if kind == "int8":
            text = "block_size=64, dense/kernel) was used as an array"
            assert text in str(error.value)
        else:
            assert 'For parameter "kernel" in "/dense"' in str(error.value)


def test_an_array_where_codes_should_be() -> None:
    model = quantise("nnx")
    model.dense.kernel.set_value(jnp.ones((64, 64)))
    with pytest.raises(JloraError, match=r"a quantised Linear was given an array \(64, 64\)"):
        model(X)


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_a_wrong_equation_of_a_users_own_type(flavour: str) -> None:
    """Of a square weight: no shape tells, and codes would be multiplied the other way round."""

    class Table(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (64, 64)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.kernel[...].T

    class Holds(nnx.Module):
        def __init__(self) -> None:
            self.inner = Table()

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.inner(x)

    config = jlora.LoraConfig(r=2, target_modules=("inner",))
    if flavour == "nnx":
        jlora.register(Table, weight="kernel", equation="...i,io->...o")
        model = jlora.quantize(Holds())
        np.testing.assert_array_equal(model(X), X @ model.inner.kernel.get_value().dequantize().T)
        run = jlora.inject(model, config, rngs=0)
    else:
        jlora.register(Own, weight="kernel", equation="...i,io->...o")
        module, tree = linen(Block(), config)
        tree = jlora.quantize(module, params=tree)
        injection.linen_layer.REGISTRY[Own] = dataclasses.replace(
            injection.linen_layer.REGISTRY[Own], form="...i,oi->...o"
        )
        run = lambda x: module.apply({"params": tree}, x)  # noqa: E731
    try:
        with pytest.raises(JloraError, match=r"is registered as contracting axes"):
            run(X)
    finally:
        injection.linen_layer.REGISTRY.pop(Own, None)
        injection.nnx_sites.REGISTRY.pop(Table, None)
