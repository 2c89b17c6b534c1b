"""Quantised models where something fails midway, is divided, rounded, or has side effects."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transform_cases import quick  # noqa: F401

import jlora
from jlora.errors import JloraError
from jlora.quant.array import QuantArray

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
