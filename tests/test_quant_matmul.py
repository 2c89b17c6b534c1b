"""Products with quantised weights: their values and gradients, and which kernel computes them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.errors import JloraError
from jlora.quant import matmul, pallas_gpu, pallas_tpu
from jlora.quant.array import QuantArray
from jlora.quant.quantize import quantize

pytestmark = pytest.mark.usefixtures("strict_promotion")

# equation -> shapes of input and weight, and the weight's axes where they are not (in, out)
EQUATIONS: dict[str, Any] = {
    "...i,io->...o": ((2, 3, 64), (64, 32), {}),
    "bti,ihd->bthd": ((2, 3, 64), (64, 4, 8), {"contracting": (-3,), "output": (-2, -1)}),
    "bthd,hdo->bto": ((2, 3, 4, 16), (4, 16, 32), {"contracting": (-3, -2), "output": (-1,)}),
    "btd,ndh->btnh": ((2, 3, 64), (4, 64, 8), {"contracting": (-2,), "output": (-3, -1)}),
    "ebi,eio->ebo": ((2, 3, 64), (2, 64, 32), {"batch": (-3,)}),
}


def case(equation: str, **options: Any) -> tuple[jax.Array, QuantArray]:
    x, w, axes = EQUATIONS[equation]
    keys = jax.random.split(jax.random.key(0))
    weight = jax.random.normal(keys[1], w)
    return jax.random.normal(keys[0], x), quantize(weight, **axes, **options)


@pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"kind": "int8"}], ids=str)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_values_and_gradients(equation: str, options: dict[str, Any]) -> None:
    x, q = case(equation, **options)

    def plainly(x: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, q.dequantize())

    y, back = jax.vjp(lambda x: matmul.contract(x, q, equation), x)
    expected, expected_back = jax.vjp(plainly, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back(y)[0], expected_back(y)[0], rtol=1e-5, atol=1e-4)


def test_it_computes_in_the_dtype_that_it_is_told() -> None:
    x, q = case("...i,io->...o")
    y = matmul.contract(x, q, "...i,io->...o", dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, x.astype(jnp.bfloat16) @ q.dequantize(jnp.bfloat16))
    assert (
        jax.vjp(lambda x: matmul.contract(x, q, "...i,io->...o", dtype=jnp.bfloat16), x)[1](y)[
            0
        ].dtype
        == jnp.float32
    )


def test_twice_differentiated() -> None:
    x, q = case("...i,io->...o")

    def loss(x: jax.Array, dequantised: bool) -> jax.Array:
        y = x @ q.dequantize() if dequantised else matmul.contract(x, q, "...i,io->...o")
        return jnp.tanh(y).sum()

    got, expected = (
        jax.grad(lambda x, d=d: (jax.grad(loss)(x, d) ** 2).sum())(x) for d in (False, True)
    )
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_no_examples() -> None:
    _, q = case("...i,io->...o")
    over = jax.vmap(lambda x: matmul.contract(x, q, "...i,io->...o"))
    assert over(jnp.ones((0, 3, 64))).shape == (0, 3, 32)
    assert matmul.contract(jnp.ones((0, 64)), q, "...i,io->...o").shape == (0, 32)


def test_an_input_that_is_summed_away() -> None:
    x, q = case("...i,io->...o")
    with pytest.raises(JloraError, match=r"'bti,io->bo' sums over t, which the weight does not"):
        matmul.contract(x, q, "bti,io->bo")


@pytest.mark.parametrize(("backend", "kernels"), [("gpu", pallas_gpu), ("tpu", pallas_tpu)])
def test_the_rule(backend: str, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are for few rows and 4 bits, on a host with their device."""
    calls = []

    def kernel(x: jax.Array, codes: Any, absmax: Any, **options: Any) -> jax.Array:
        calls.append((x.shape, codes.shape, absmax.shape, options["block_size"]))
        return jnp.zeros((x.shape[0], codes.shape[1]), x.dtype)

    monkeypatch.setattr(kernels, "matmul", kernel)

    def used(rows: int, equation: str = "...i,io->...o", **options: Any) -> bool:
        precision = options.pop("precision", None)
        _, w, axes = EQUATIONS[equation]
        q = quantize(jnp.ones((128, 64)) if w == (64, 32) else jnp.ones(w), **axes, **options)
        x = jnp.ones((1, rows, 128) if w == (64, 32) else EQUATIONS[equation][0])
        calls.clear()
        jax.jit(lambda x: matmul.contract(x, q, equation, precision=precision)).lower(x)
        return bool(calls)

    assert not used(1)  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert used(1)
    assert calls == [((1, 128), (64, 64), (2, 64), 64)]
    assert used(64, double_quant=True)
    assert used(1, kind="fp4")
    assert not used(65)
    assert not used(1, kind="int8")
    assert not used(1, precision="highest")
    assert not used(1, "ebi,eio->ebo")
    assert not used(1, "btd,ndh->btnh")
    # A program for the CPU, on such a host, has none of it.
    q = quantize(jax.random.normal(jax.random.key(0), (128, 64)))
    x = jax.random.normal(jax.random.key(1), (2, 128))
    np.testing.assert_allclose(
        matmul.contract(x, q, "...i,io->...o"), x @ q.dequantize(), rtol=1e-5, atol=1e-5
    )


def test_one_weight_is_held_at_a_time() -> None:
    """Unrolled layers on a CPU, whose compiler may dequantise them all before the first."""
    layers, size = 8, 512
    weights = [quantize(jnp.ones((size, size))) for _ in range(layers)]
    factors = [jnp.ones((size, 2))] * layers

    def loss(factors: list[jax.Array], weights: list[QuantArray], x: jax.Array) -> jax.Array:
        for a, q in zip(factors, weights, strict=True):
            x = jnp.tanh(matmul.contract(x, q, "...i,io->...o") + (x @ a) @ a.T)
        return x.sum()

    x = jnp.ones((64, size))
    compiled = jax.jit(jax.grad(loss)).lower(factors, weights, x).compile()
    activations = layers * x.size * 4
    temporary = compiled.memory_analysis().temp_size_in_bytes - 2 * activations
    assert temporary < 3 * size * size * 4


def test_examples_share_the_weight_under_vmap() -> None:
    q = quantize(jax.random.normal(jax.random.key(0), (256, 256)))
    x = jax.random.normal(jax.random.key(1), (4, 2, 256))

    def each(x: jax.Array, q: QuantArray) -> jax.Array:
        return jax.vmap(lambda x: matmul.contract(x, q, "...i,io->...o"))(x)

    def flops(fn: Any) -> float:
        return jax.jit(fn).lower(x, q).compile().cost_analysis()["flops"]

    together = flops(lambda x, q: matmul.contract(x, q, "...i,io->...o"))
    assert flops(each) < 1.2 * together
    np.testing.assert_allclose(each(x, q), x @ q.dequantize(), rtol=1e-4, atol=1e-4)
