"""The table of quantised models: each computes what it does with its weights dequantised."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from quantised_cases import (
    QUANT_CASES,
    QUANTS,
    QuantCase,
    base_of,
    dequantised,
    register_own,
    unregister_own,
)
from test_transform import assert_close, by_layer, grad_of, state_like
from transform_cases import ALPHA, KINDS, LAYERS, R, quick  # noqa: F401

import jlora
from jlora import injection
from jlora.injection import params as trees
from jlora.quant.array import QuantArray

pytestmark = pytest.mark.usefixtures("quick", "own")

# The largest error of a value in units of the largest of its block (fp4: and of its scale's).
ERROR = {"nf4": 0.153, "fp4-double": 0.18, "int8": 0.5 / 127 + 1e-6}


@pytest.fixture(scope="module")
def own() -> Any:
    register_own()
    yield
    unregister_own()


@functools.cache
def unrolled(kind: str) -> tuple[Any, Any, Any]:
    """The unrolled base in float32: (weights, x) -> output, and gradients with W + s * B A."""
    case, updates = QuantCase("linen", kind, "plain", jnp.float32), KINDS[kind].updates
    _, weights, run = case.base()

    def formed(factors: dict, x: jax.Array, weights: dict) -> jax.Array:
        weights = dict(weights)
        for path in {path.rpartition("/")[0] for path in factors}:
            a, b = factors[f"{path}/lora_a"], factors[f"{path}/lora_b"]
            update = jnp.einsum(updates[path.partition("/layer")[2].strip("/")], a, b)
            weights[f"{path}/{KINDS[kind].weight}"] += (ALPHA / R) * update
        return run(weights, x)

    return weights, jax.jit(run), grad_of(formed, case.inputs)


@functools.cache
def explicit(kind: str, quant: str) -> tuple[dict[str, jax.Array], Any, jax.Array]:
    """The unrolled base's dequantised weights, gradients and outputs with W + s * B A."""
    case = QuantCase("linen", kind, "plain", jnp.float32, quant)
    weights, _, grad = unrolled(kind)
    model, factors, rest, _, _ = case.quantised()
    leaves = base_of(model, rest)
    for path, leaf in leaves.items():
        error = jnp.abs(leaf.dequantize() - weights[path]) if is_weight(kind, path) else leaf * 0
        assert error.max() <= ERROR[quant] * jnp.abs(weights[path]).max(), path
        assert not is_weight(kind, path) or error.max() > 0
    plain = dequantised(leaves)
    return plain, *grad(case.fill(factors), case.inputs, plain)


def run(case: QuantCase, weights: dict[str, Any]) -> jax.Array:
    """The base's output for arrays as its weights."""
    wide = {path: leaf.astype(jnp.float32) for path, leaf in by_layer(weights).items()}
    return unrolled(case.kind)[1](wide, case.inputs.astype(jnp.float32))


def is_weight(kind: str, path: str) -> bool:
    return path.rpartition("/")[2] == KINDS[kind].weight


def bits(leaves: dict[str, Any]) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(leaves)]


def assert_bits(leaves: dict[str, Any], expected: list[np.ndarray]) -> None:
    for leaf, other in zip(jax.tree.leaves(leaves), expected, strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


def test_each_pair_occurs() -> None:
    fields = ("flavour", "kind", "layout", "dtype", "quant")
    assert len(QUANT_CASES) >= 60
    for one, other in itertools.combinations(fields, 2):
        found = {(getattr(c, one), getattr(c, other)) for c in QUANT_CASES if "-" not in c.layout}
        ones, others = ({getattr(c, f) for c in QUANT_CASES} for f in (one, other))
        assert found >= set(itertools.product(ones - {"scanned-remat"}, others - {"scanned-remat"}))


@pytest.mark.parametrize("case", QUANT_CASES, ids=str)
def test_table(case: QuantCase) -> None:
    # Flax's own NNX attention promotes where it is bfloat16.
    promotes = (case.flavour, case.kind, case.dtype) == ("nnx", "quant-attention", jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard" if promotes else "strict"):
        check(case)


def check(case: QuantCase) -> None:
    kind, x = KINDS[case.kind], case.inputs
    base, weights, _ = case.base()
    right, right_grads, right_y = explicit(case.kind, case.quant)

    # The weights of layers are quantised, alike however they are stacked; nothing else is.
    model, factors, rest, output, alone = case.quantised()
    leaves = base_of(model, rest)
    before = bits(leaves)
    assert {p for p, x in leaves.items() if isinstance(x, QuantArray)} == {
        path for path in weights if is_weight(case.kind, path)
    }
    plain = dequantised(leaves)
    assert {p: (x.shape, x.dtype) for p, x in plain.items()} == {
        p: (x.shape, x.dtype) for p, x in weights.items()
    }
    for path, leaf in by_layer(plain).items():
        np.testing.assert_array_equal(leaf, right[path].astype(leaf.dtype), err_msg=path)

    # Parameters are counted as those of the weights that the codes stand for.
    counted = kind.parameters * LAYERS
    tree = jlora.combine(factors, rest)
    assert injection.count(tree) == (counted, counted + sum(w.size for w in weights.values()))

    # With B zero the output is that of the quantised base, which is that of its dequantised one.
    grad = grad_of(output, x)
    _, untrained = grad(factors, x, rest)
    assert untrained.dtype == case.dtype
    assert_close(untrained, run(case, plain), case.tolerance)
    if alone is not None and case.layout == "plain":
        graphdef, state = nnx.split(alone)
        quantised = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
        np.testing.assert_array_equal(untrained, quantised)
    others = {p: f if p.endswith("_b") else f + 1 for p, f in factors.items()}
    np.testing.assert_array_equal(grad(others, x, rest)[1], untrained)

    # With other factors all is as with W + s * B A, where W is dequantised.
    factors = case.fill(factors)
    grads, y = grad(factors, x, rest)
    assert_close(y, right_y, case.tolerance, "output")
    layers = by_layer(grads[0])
    largest = 0.0
    if case.dtype == jnp.bfloat16:  # an attention's keys have little influence, and its rounding
        largest = max(np.abs(leaf).max() for leaf in right_grads[0].values())
    assert layers.keys() == right_grads[0].keys()
    for path, leaf in layers.items():
        assert leaf.dtype == jnp.float32, path
        assert_close(leaf, right_grads[0][path], case.tolerance, path, largest)
    assert_close(grads[1], right_grads[1], case.tolerance, "input")

    # Merged weights are arrays that give what the factors did; ejected, the base is what it was.
    tree = jlora.combine(factors, rest)
    if alone is None:
        merged = trees.flatten(jlora.merge(model, tree))
        assert jlora.eject(model) == base
    else:
        whole = jlora.merge(tree)
        assert nnx.graphdef(whole) == nnx.graphdef(base)
        merged, _ = injection.partition(whole, everything=True)
        jlora.eject(tree)
        assert nnx.graphdef(tree) == nnx.graphdef(alone)
        leaves = base_of(tree, None)
    assert {p: (w.shape, w.dtype) for p, w in merged.items()} == {
        p: (w.shape, w.dtype) for p, w in weights.items()
    }
    assert_close(run(case, merged), y, case.tolerance, "merged")
    assert_bits(leaves, before)


@pytest.mark.parametrize("case", QUANT_CASES[::7], ids=str)
def test_training_leaves_every_bit_of_the_base(case: QuantCase) -> None:
    model, factors, rest, _, _ = case.quantised()
    before = bits(base_of(model, rest))
    factors = case.fill(factors)
    grads = jax.tree.map(jnp.ones_like, factors)
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01, momentum=0.9))
    tree = jlora.combine(factors, rest)
    if case.flavour == "linen":  # whatever the gradients of the base are
        everywhere = jlora.combine(grads, jax.tree.map(jnp.ones_like, rest))
        masked = jlora.optimizer(tx)
        state = masked.init(tree)
        for _ in range(2):
            updates, state = masked.update(everywhere, state, tree)
            tree = optax.apply_updates(tree, updates)
    else:
        optimizer = nnx.Optimizer(tree, tx, wrt=nnx.LoRAParam)
        for _ in range(2):
            optimizer.update(tree, state_like(tree, grads))
    trained, rest = jlora.partition(tree)
    assert_bits(base_of(tree, rest), before)
    assert all(not np.array_equal(trained[path], leaf) for path, leaf in factors.items())


@pytest.mark.parametrize("quant", QUANTS)
def test_blocks_run_along_the_inputs_of_each_output(quant: str) -> None:
    """A weight stored (out, in) has the codes of its transpose, whatever its equation."""
    _, _, rest, _, _ = QuantCase(
        "linen", "quant-transposed", "plain", jnp.float32, quant
    ).quantised()
    q = rest.rest["block_0/layer/kernel"]
    _, weights, _ = QuantCase("linen", "quant-transposed", "plain", jnp.float32, quant).base()

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Linear(96, 5, rngs=nnx.Rngs(0))
            self.layer.kernel[...] = weights["block_0/layer/kernel"].T

    model = jlora.quantize(Model(), QUANTS[quant])
    linear: Any = model.layer.kernel.get_value()
    assert len(jax.tree.leaves(q)) == len(jax.tree.leaves(linear)) >= 2
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves(q),
        jax.tree.leaves(linear),
    )
