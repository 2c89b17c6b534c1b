"""Attention, rotary positions and the chunked loss against plain ones, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.models.attention import attention, rotary_tables, rotate
from jlora.train.loss import chunk_size, cross_entropy

pytestmark = pytest.mark.usefixtures("strict_promotion")


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(got, expected, tolerance: float) -> None:
    """Every element within `tolerance` of the largest."""
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


MASKS = {
    "all": np.ones((2, 5, 7), bool),
    "causal": np.broadcast_to(np.tril(np.ones((5, 7), bool), k=2), (2, 5, 7)),
    "random": np.random.default_rng(0).random((2, 5, 7)) < 0.4,
}
MASKS["random"][:, :, 0] = True  # every query sees something


def library_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


@functools.partial(jax.jit, static_argnums=0)
def output_and_grads(fn, mask: jax.Array, grad: jax.Array, *qkv: jax.Array) -> list[jax.Array]:
    out, vjp = jax.vjp(lambda q, k, v: fn(q, k, v, mask), *qkv)
    return [out, *vjp(grad)]


class TestAttention:
    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
    def test_float32(self, heads: int, kv_heads: int) -> None:
        for mask in MASKS.values():
            self.check(heads, kv_heads, mask, jnp.float32, 1e-5)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
    def test_bfloat16(self, heads: int, kv_heads: int) -> None:
        self.check(heads, kv_heads, MASKS["causal"], jnp.bfloat16, 2e-2)

    def check(self, heads: int, kv_heads: int, mask, dtype, tolerance: float) -> None:
        q = normal(1, 2, 5, heads, 8, dtype=dtype)
        k, v = (normal(seed, 2, 7, kv_heads, 8, dtype=dtype) for seed in (2, 3))
        grad = normal(4, 2, 5, heads, 8, dtype=dtype)
        got = output_and_grads(attention, jnp.asarray(mask), grad, q, k, v)
        exact = (x.astype(jnp.float32) for x in (grad, q, k, v))
        expected = output_and_grads(library_attention, jnp.asarray(mask), *exact)
        for one, right in zip(got, expected, strict=True):
            assert one.dtype == dtype
            assert_close(one, right, tolerance)

    def test_a_query_that_sees_nothing_gets_the_mean(self) -> None:
        mask = MASKS["all"].copy()
        mask[1, 3] = False
        q, k, v = (normal(seed, 2, n, 2, 4) for seed, n in ((1, 5), (2, 7), (3, 7)))
        out, *grads = output_and_grads(attention, jnp.asarray(mask), jnp.ones_like(q), q, k, v)
        np.testing.assert_allclose(out[1, 3], v[1].mean(axis=0), rtol=1e-5)
        for grad in grads:
            assert jnp.isfinite(grad).all()

    def test_what_is_masked_has_no_influence(self) -> None:
        mask = jnp.asarray(MASKS["causal"])
        q, k, v = (normal(seed, 2, n, 2, 4) for seed, n in ((1, 5), (2, 7), (3, 7)))
        changed = attention(q, k.at[:, 5:].add(9.0), v.at[:, 5:].add(9.0), mask)
        same = attention(q, k, v, mask)
        np.testing.assert_array_equal(changed[:, :3], same[:, :3])  # query t sees keys up to t + 2
        assert not np.allclose(changed[:, 3:], same[:, 3:])


class TestRotary:
    def test_it_is_a_complex_rotation(self) -> None:
        x = normal(0, 2, 3, 4, 8)
        positions = jnp.asarray([[0, 1, 700], [5, 5, 2]], jnp.int32)
        freq = jnp.asarray([1.0, 0.3, 0.02, 0.001])
        cos, sin = rotary_tables(positions, freq, jnp.float32)
        assert cos.shape == sin.shape == (2, 3, 1, 4)
        turned = rotate(x, cos, sin)
        angle = np.asarray(positions, np.float64)[:, :, None, None] * np.asarray(freq, np.float64)
        pairs = np.asarray(x[..., :4], np.float64) + 1j * np.asarray(x[..., 4:], np.float64)
        expected = pairs * np.exp(1j * angle)
        assert_close(turned, np.concatenate([expected.real, expected.imag], -1), 5e-5)
        np.testing.assert_array_equal(turned[0, 0], x[0, 0])  # position 0 is left alone

    def test_products_depend_on_the_distance_alone(self) -> None:
        q, k = normal(1, 1, 1, 1, 8), normal(2, 1, 1, 1, 8)
        freq = jnp.asarray([1.0, 0.3, 0.02, 0.001])

        def product(at: int, other: int) -> float:
            turned = [
                rotate(x, *rotary_tables(jnp.asarray([[p]], jnp.int32), freq, x.dtype))
                for x, p in ((q, at), (k, other))
            ]
            return float((turned[0] * turned[1]).sum())

        assert product(7, 3) == pytest.approx(product(104, 100), rel=1e-3)
        assert product(7, 3) != pytest.approx(product(7, 4), rel=1e-2)


def plain(hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """All logits at once, in float32."""
    logits = hidden.astype(jnp.float32) @ head.astype(jnp.float32).T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(mask, losses, 0).sum()


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(loss, hidden, head, targets, mask, scale):
    """Of both arguments, with a gradient from outside that is not one."""
    return jax.value_and_grad(lambda h, w: scale * loss(h, w, targets, mask), argnums=(0, 1))(
        hidden, head
    )


# Several chunks of 128, the last one filled in part.
N, D, V = 300, 8, 11
HIDDEN, HEAD = normal(1, N, D), normal(2, V, D)
TARGETS = jnp.asarray(np.random.default_rng(3).integers(0, V, N), jnp.int32)
fractions = st.sampled_from([0.0, 0.01, 0.3, 0.42, 0.43, 0.9, 1.0])


class TestCrossEntropy:
    def check(self, mask: np.ndarray, scale: float, n: int = N) -> None:
        mask = jnp.asarray(mask)
        arguments = HIDDEN[:n], HEAD, TARGETS[:n], mask, jnp.asarray(scale, jnp.float32)
        loss, (d_hidden, d_head) = value_and_grads(cross_entropy, *arguments)
        expected, expected_grads = value_and_grads(plain, *arguments)
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        assert_close(d_hidden, expected_grads[0], 1e-5)
        assert_close(d_head, expected_grads[1], 1e-5)
        assert not np.asarray(d_hidden)[~np.asarray(mask)].any()

    @settings(deadline=None, max_examples=40)
    @given(fractions, st.integers(0, 99), st.sampled_from([-3.0, 0.0, 0.01, 1.0]))
    def test_masks(self, fraction: float, seed: int, scale: float) -> None:
        mask = np.random.default_rng(seed).random(N) < fraction
        self.check(mask, scale)

    def test_the_ends_of_chunks(self) -> None:
        for trained in (0, 1, 127, 128, 129, 256, 257, N):
            self.check(np.arange(N) < trained, 1.0)
            self.check(np.arange(N) >= N - trained, 1.0)

    @pytest.mark.parametrize("n", [1, 128])
    def test_other_lengths(self, n: int) -> None:
        self.check(np.ones(n, bool), 0.5, n)

    @pytest.mark.parametrize("wanted", [0, 1])
    def test_one_gradient_alone(self, wanted: int) -> None:
        mask = jnp.arange(N) % 3 == 0
        got, right = (
            jax.grad(loss, argnums=wanted)(HIDDEN, HEAD, TARGETS, mask)
            for loss in (cross_entropy, plain)
        )
        assert_close(got, right, 1e-5)

    def test_bfloat16(self) -> None:
        hidden, head = HIDDEN.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16)
        rest = TARGETS, jnp.arange(N) % 2 == 0, jnp.asarray(0.1, jnp.float32)
        loss, grads = value_and_grads(cross_entropy, hidden, head, *rest)
        exact = hidden.astype(jnp.float32), head.astype(jnp.float32)
        expected, expected_grads = value_and_grads(plain, *exact, *rest)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
        for got, right in zip(grads, expected_grads, strict=True):
            assert got.dtype == jnp.bfloat16
            assert_close(got, right, 2e-2)

    def test_large_logits_do_not_overflow(self) -> None:
        mask = jnp.ones(N, bool)
        loss, grads = jax.value_and_grad(cross_entropy)(1e3 * HIDDEN, HEAD, TARGETS, mask)
        np.testing.assert_allclose(loss, plain(1e3 * HIDDEN, HEAD, TARGETS, mask), rtol=1e-5)
        assert jnp.isfinite(grads).all()

    def test_nearly_certain_answers_keep_their_digits(self) -> None:
        """A log-sum-exp of 60 would round these losses, of 2e-4, by up to 2e-6."""
        logits = 49 + np.random.default_rng(0).integers(-8, 8, (20, 10)) / 16
        logits[:, 7] = 60 + np.arange(20) / 64  # all exact in float32
        probs = np.exp(logits - 60) / np.exp(logits - 60).sum(axis=1, keepdims=True)
        expected = -np.log(probs[:, 7])
        assert 1e-4 < expected.min() < expected.max() < 5e-4
        probs[:, 7] -= 1
        ones, answer, mask = jnp.ones((1, 1)), jnp.asarray([7], jnp.int32), jnp.ones(1, bool)
        compute = jax.jit(jax.value_and_grad(cross_entropy))
        for row in range(20):
            loss, grad = compute(ones, jnp.asarray(logits[row, :, None], jnp.float32), answer, mask)
            np.testing.assert_allclose(loss, expected[row], rtol=0, atol=3e-7)
            np.testing.assert_allclose(grad[0, 0], probs[row] @ logits[row], rtol=1e-2)

    def test_a_loss_that_nothing_depends_on(self) -> None:
        def unused(hidden: jax.Array) -> jax.Array:
            cross_entropy(hidden, HEAD, TARGETS, jnp.ones(N, bool))
            return hidden.sum()

        np.testing.assert_array_equal(jax.grad(unused)(HIDDEN), jnp.ones_like(HIDDEN))


@given(st.integers(1, 10**6))
def test_chunks(tokens: int) -> None:
    chunk = chunk_size(tokens)
    assert chunk % 128 == 0
    assert 128 <= chunk <= 1024
    assert chunk >= min(tokens / 8, 1024)
    assert chunk < tokens / 8 + 128
