"""What keeps a step small where memory is scarce: attention by blocks, weights that stay in codes.

The figures themselves are benchmarks/memory.py's, which needs compilers for such chips.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_attention_loss import assert_close, normal

import jlora
from jlora.data.batching import Batch
from jlora.models import attention as module
from jlora.models.attention import attention, blocked_attention, causal_attention, visible
from jlora.models.transformer import CausalLM, ModelConfig, swiglu
from jlora.quant import blockwise, codebooks
from jlora.quant.matmul import contract
from jlora.quant.quantize import quantize
from jlora.train.step import batch_loss

pytestmark = pytest.mark.usefixtures("strict_promotion")
T = 13
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four queries a block: those of T tokens make four, the last one filled in part."""
    monkeypatch.setattr(module, "_ROWS", 4)
    monkeypatch.setattr(module, "_SCORES", 1)


def whole(q, k, v, valid, slots):
    return attention(q, k, v, visible(valid, slots))


def output_and_grads(fn, qkv, valid, slots, grad) -> list[jax.Array]:
    def run(*qkv):
        out, vjp = jax.vjp(lambda *qkv: fn(*qkv, valid, slots), *qkv)
        return [out, *vjp(grad)]

    return fast_jit(run)(*qkv)  # a new function: nothing compiled for other blocks is found


@pytest.mark.usefixtures("small_blocks")
class TestBlockedAttention:
    def case(self, heads=4, kv_heads=2, keys=T, first=0, dtype=jnp.float32) -> tuple:
        q, grad = (normal(seed, 2, T, heads, 8, dtype=dtype) for seed in (1, 4))
        k, v = (normal(seed, 2, keys, kv_heads, 8, dtype=dtype) for seed in (2, 3))
        valid = np.ones((2, keys), bool)
        valid[0, :2] = False  # padding on the left, on the right
        valid[1, -3:] = False
        return (q, k, v), jnp.asarray(valid), first + jnp.arange(T, dtype=jnp.int32), grad

    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
    @pytest.mark.parametrize(("keys", "first"), [(T, 0), (T + 6, 4)])
    def test_it_is_that_of_whole_rows(self, heads, kv_heads, keys, first) -> None:
        case = self.case(heads, kv_heads, keys, first)
        got, right = (output_and_grads(fn, *case) for fn in (blocked_attention, whole))
        for one, expected in zip(got, right, strict=True):
            assert_close(one, expected, 2e-6)

    def test_bfloat16(self) -> None:
        (q, k, v), valid, slots, grad = self.case(dtype=jnp.bfloat16)
        got = output_and_grads(blocked_attention, (q, k, v), valid, slots, grad)
        exact = tuple(x.astype(jnp.float32) for x in (q, k, v))
        right = output_and_grads(whole, exact, valid, slots, grad.astype(jnp.float32))
        for one, expected in zip(got, right, strict=True):
            assert one.dtype == jnp.bfloat16
            assert_close(one, expected, 2e-2)

    def test_a_query_that_sees_nothing_gets_the_mean(self) -> None:
        (q, k, v), valid, slots, grad = self.case()
        out, *grads = output_and_grads(blocked_attention, (q, k, v), valid, slots, grad)
        mean = jnp.repeat(v[0].mean(axis=0), 2, axis=0)
        for query in (0, 1):
            np.testing.assert_allclose(out[0, query], mean, rtol=1e-5)
        right = output_and_grads(whole, (q, k, v), valid, slots, grad)
        for one, expected in zip([out, *grads], right, strict=True):
            assert_close(one, expected, 2e-6)

    def test_one_block_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = self.case()
        several = output_and_grads(blocked_attention, *case)
        monkeypatch.setattr(module, "_ROWS", 128)
        for one, expected in zip(output_and_grads(blocked_attention, *case), several, strict=True):
            assert_close(one, expected, 2e-6)


class TestWholeSequences:
    """Without slots, on CPU: parts, of which each has only the keys that it sees."""

    @pytest.mark.parametrize("length", [1, 64, 65, 300])
    @pytest.mark.parametrize("left", [0, 2])
    def test_they_are_that_of_whole_rows(self, length: int, left: int) -> None:
        left = min(left, length - 1)
        q, grad = normal(1, 2, length, 4, 8), normal(4, 2, length, 4, 8)
        k, v = normal(2, 2, length, 2, 8), normal(3, 2, length, 2, 8)
        valid = (
            jnp.ones((2, length), bool).at[0, :left].set(False).at[1, length - left :].set(False)
        )
        grad = grad.at[0, :left].set(0)  # queries that see nothing
        slots = jnp.arange(length)
        right = output_and_grads(whole, (q, k, v), valid, slots, grad)
        got = output_and_grads(causal_attention, (q, k, v), valid, None, grad)
        got[0], right[0] = got[0].at[0, :left].set(0), right[0].at[0, :left].set(0)
        for one, expected in zip(got, right, strict=True):
            assert_close(one, expected, 2e-6)
        assert bool(jnp.isfinite(got[0]).all())

    @pytest.mark.parametrize(("platform", "parts"), [("cpu", True), ("cuda", False)])
    def test_later_keys_are_not_scored(self, platform: str, parts: bool) -> None:
        q, k = normal(1, 1, 300, 2, 8), normal(2, 1, 300, 1, 8)
        valid = jnp.ones((1, 300), bool)
        traced = jax.jit(lambda q: causal_attention(q, k, k, valid)).trace(q)
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        scores = set(re.findall(r"tensor<1x1x150x(75|150|225|300)xf32>", program))
        assert scores == ({"75", "150", "225", "300"} if parts else set())


@pytest.mark.parametrize(("dtype", "near"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_swiglu_is_what_autodiff_makes_of_it(dtype, near) -> None:
    gate, up, grad = (normal(seed, 3, 50, dtype=dtype) * 4 for seed in (1, 2, 3))
    exact = [x.astype(jnp.float32) for x in (gate, up, grad)]
    out, vjp = jax.vjp(swiglu, gate, up)
    right, exact_vjp = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, *exact[:2])
    for one, expected in zip([out, *vjp(grad)], [right, *exact_vjp(exact[2])], strict=True):
        assert one.dtype == dtype
        assert_close(one, expected, near)
    kept = jax.tree.leaves(vjp)
    assert sum(leaf.size for leaf in kept) == 2 * gate.size


COMPUTED = r"= stablehlo\.(dot_general|exponential|compare|select|and|dynamic_update_slice)\b"


class TestWhichAttention:
    @pytest.fixture
    def lowered(self, monkeypatch: pytest.MonkeyPatch):
        """Of a platform: what its program computes for a gradient over three layers."""
        monkeypatch.setattr(module, "_SCORES", 1)
        q, k = normal(1, 1, 300, 2, 8), normal(2, 1, 300, 1, 8)
        valid, slots = jnp.ones((1, 300), bool), jnp.arange(300, dtype=jnp.int32)

        def loss(layers: jax.Array, q: jax.Array) -> jax.Array:
            @jax.checkpoint
            def layer(q, scale):
                return causal_attention(q * scale, k, k, valid, slots), None

            return jax.lax.scan(layer, q, layers)[0].sum()

        traced = jax.jit(jax.grad(loss)).trace(jnp.ones(3), q)

        def lines(platform: str) -> list[str]:
            program = traced.lower(lowering_platforms=(platform,)).as_text()
            # But zeros for what the other platforms' way would keep, which no compiler does.
            return [line for line in program.splitlines() if re.search(COMPUTED, line)]

        return lines

    @pytest.mark.parametrize("platform", ["cuda", "tpu", "rocm"])
    def test_accelerators_hold_scores_of_a_block(self, platform: str, lowered) -> None:
        lines = lowered(platform)
        assert any("2x100x300xf32" in line for line in lines)  # a block's scores
        for line in lines:
            assert not re.search(r"\D[36]00x300x", line)  # of all queries, by head or not
            assert not re.search(r"<3x[x\d]*100x300x", line)  # of all blocks

    def test_cpus_keep_the_probabilities(self, lowered) -> None:
        lines = lowered("cpu")
        assert any(re.search(r"\D600x300xf32", line) for line in lines)
        assert not any("100x300x" in line for line in lines)

    def test_on_this_machine(self) -> None:
        case = TestBlockedAttention().case()
        got, right = (output_and_grads(fn, *case) for fn in (causal_attention, whole))
        for one, expected in zip(got, right, strict=True):
            assert_close(one, expected, 2e-6)


def outside_loops(jaxpr) -> list[tuple[int, ...]]:
    """Shapes of what a program computes, but for what is in its loops and what these give."""
    shapes = []
    for eqn in jaxpr.eqns:
        inner = [x.jaxpr for x in eqn.params.values() if isinstance(x, jax.extend.core.ClosedJaxpr)]
        if eqn.primitive.name != "scan":
            shapes += [var.aval.shape for var in eqn.outvars]
            shapes += [shape for jaxpr in inner for shape in outside_loops(jaxpr)]
    return shapes


class TestQuantisedLayers:
    LAYERS, IN, OUT = 3, 128, 96

    def weights(self, double_quant: bool = False):
        w = normal(0, self.LAYERS, self.IN, self.OUT)
        return quantize(w, double_quant=double_quant)

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_no_weight_leaves_the_scan(self, double_quant: bool) -> None:
        """Constants of a weight's shape would be moved out of it by its derivative."""

        def loss(x, q):
            @jax.checkpoint
            def layer(x, q):
                return contract(x, q, "...i,io->...o")[:, :1] * x, None

            return jax.lax.scan(layer, x, q)[0].sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(normal(1, 2, self.IN), self.weights(double_quant))
        sizes = [int(np.prod(shape)) for shape in outside_loops(jaxpr.jaxpr)]
        assert sizes
        assert max(sizes) < self.IN * self.OUT // 2

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_values_and_gradients(self, double_quant: bool) -> None:
        q = jax.tree.map(lambda leaf: leaf[1], self.weights(double_quant))
        x, grad = normal(1, 2, self.IN), normal(2, 2, self.OUT)
        out, vjp = jax.vjp(lambda x: contract(x, q, "...i,io->...o"), x)
        assert_close(out, x @ q.dequantize(), 1e-6)
        assert_close(vjp(grad)[0], grad @ q.dequantize().T, 1e-6)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_code_of_four_bits(kind: str) -> None:
    codes, book = jnp.arange(256, dtype=jnp.uint8), codebooks.CODEBOOKS[kind]
    for unit, own in ((1, np.arange(256) % 16), (16, np.arange(256) // 16)):
        got = jax.jit(lambda codes, unit=unit: codebooks.decode4(codes, kind, unit))(codes)
        np.testing.assert_array_equal(got, book[own])


def test_selected_scales_are_those_looked_up() -> None:
    codes = jnp.arange(256, dtype=jnp.uint8)
    book = codebooks.dynamic_map()
    np.testing.assert_array_equal(jax.jit(lambda c: codebooks.select(c, book))(codes), book)
    rng = np.random.default_rng(0)
    nested = rng.integers(0, 256, (3, 256)).astype(np.uint8), rng.random(3).astype(np.float32)
    scales = jax.jit(lambda *nested: blockwise.dequantize_nested(*nested, 7, 100))
    arguments = *map(jnp.asarray, nested), jnp.float32(0.5)
    ways = (blockwise._nested_by_lookup, blockwise._nested_by_selects)
    looked_up, selected = (way(7, 100, *arguments) for way in ways)
    np.testing.assert_array_equal(looked_up, selected)
    np.testing.assert_array_equal(scales(*arguments), selected)
    for platform, gathers in (("tpu", False), ("cuda", True), ("cpu", True)):
        program = scales.trace(*arguments).lower(lowering_platforms=(platform,))
        assert ("gather" in program.as_text()) == gathers


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_step_is_the_same_by_blocks(scan_layers: bool, monkeypatch) -> None:
    """Loss and gradients of a whole model, recomputed, against those on CPU."""
    config = ModelConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        inv_freq=tuple(0.5**i for i in range(4)),
        tie_word_embeddings=False,
    )
    model = CausalLM(config, rngs=nnx.Rngs(0), scan_layers=scan_layers, remat=True)
    lora = jlora.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
    trained, base = jlora.partition(jlora.inject(model, lora, rngs=nnx.Rngs(1)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, T)), jnp.int32)
    mask = jnp.ones(tokens.shape, bool).at[0, :2].set(False)
    batch = Batch(tokens=tokens, mask=mask, targets=mask, rows=jnp.arange(2))

    def compute() -> tuple:
        def loss(trained):
            return batch_loss(jlora.combine(trained, base), batch)[0]

        return fast_jit(jax.value_and_grad(loss))(trained)

    value, grads = compute()

    def by_blocks(q, k, v, valid, slots) -> jax.Array:
        return blocked_attention(q, k, v, valid, jnp.arange(T) if slots is None else slots)

    monkeypatch.setattr("jlora.models.transformer.causal_attention", by_blocks)
    jax.clear_caches()
    blocked_value, blocked_grads = compute()
    np.testing.assert_allclose(blocked_value, value, rtol=1e-6)
    assert grads
    for path, grad in grads.items():
        assert_close(blocked_grads[path], grad, 1e-5)
