"""The table of the transform: flavour, layer type, layout and dtype, and what each keeps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from transform_cases import ALPHA, CASES, CONFIG, KINDS, LAYERS, Case, R, quick  # noqa: F401

import jlora
from jlora import injection
from jlora.injection import params as trees

pytestmark = pytest.mark.usefixtures("quick")


def loss_of(y: jax.Array) -> jax.Array:
    """A loss with a different slope for each output."""
    slopes = jnp.linspace(-1, 1, y.size, dtype=jnp.float32).reshape(y.shape)
    y = y.astype(jnp.float32)
    return (y * slopes + 0.1 * y * y).sum()


def grad_of(run: Callable[..., jax.Array], x: jax.Array) -> Callable[..., Any]:
    """(gradients of the factors and of a float input, outputs) of run(factors, x, rest)."""

    def loss(factors: dict, x: jax.Array, rest: Any) -> tuple[jax.Array, jax.Array]:
        y = run(factors, x, rest)
        return loss_of(y), y

    argnums = (0,) if x.dtype == jnp.int32 else (0, 1)
    return jax.jit(jax.grad(loss, argnums=argnums, has_aux=True))


@functools.cache
def explicit(flavour: str, kind: str) -> tuple[tuple, jax.Array]:
    """Gradients and outputs of the base, unrolled, in float32, with W + s * B A written out."""
    case, updates = Case(flavour, kind, "plain", jnp.float32), KINDS[kind].updates
    _, weights, run = case.base()

    def formed(factors: dict, x: jax.Array, weights: dict) -> jax.Array:
        weights = dict(weights)
        for path in {path.rpartition("/")[0] for path in factors}:
            a, b = factors[f"{path}/lora_a"], factors[f"{path}/lora_b"]
            update = jnp.einsum(updates[path.partition("/layer")[2].strip("/")], a, b)
            weights[f"{path}/{KINDS[kind].weight}"] += (ALPHA / R) * update
        return run(weights, x)

    factors = case.fill(jax.eval_shape(lambda: injected(case)[1]))
    return grad_of(formed, case.inputs)(factors, case.inputs, weights)


def by_layer(leaves: dict[str, Any]) -> dict[str, Any]:
    """Leaves by the paths of the unrolled model."""
    layers = {}
    for path, leaf in leaves.items():
        if path.startswith("stack/"):
            layers |= {path.replace("stack/", f"block_{i}/"): leaf[i] for i in range(LAYERS)}
        else:
            layers[path] = leaf
    return layers


def assert_close(
    got: Any, expected: Any, tolerance: float, name: str = "", largest: float = 0.0
) -> None:
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    assert got.shape == expected.shape, name
    largest = max(largest, np.abs(expected).max())
    assert largest > 0, name
    assert np.abs(got - expected).max() <= tolerance * largest, name


def injected(case: Case) -> tuple[Any, dict[str, jax.Array], Any, Callable[..., jax.Array]]:
    """The injected model, its factors, the base of `partition`, and the output for such."""
    base, weights, _ = case.base()
    model = jlora.inject(base, CONFIG, rngs=nnx.Rngs(5) if case.flavour == "nnx" else None)
    if case.flavour == "nnx":
        return model, *jlora.partition(model), lambda f, x, rest: jlora.combine(f, rest)(x)
    tree = jax.jit(model.init)(jax.random.key(0), case.inputs)["params"]
    factors, rest = jlora.partition(tree)
    assert {p: (w.shape, w.dtype) for p, w in rest.rest.items()} == {
        p: (w.shape, w.dtype) for p, w in weights.items()
    }
    rest = dataclasses.replace(rest, rest=weights)

    def output(factors: dict, x: jax.Array, rest: Any) -> jax.Array:
        return model.apply({"params": jlora.combine(factors, rest)}, x)

    return model, factors, rest, output


@pytest.mark.parametrize("case", CASES, ids=str)
def test_table(case: Case) -> None:
    # Flax's own NNX attention promotes where it is bfloat16.
    own = (case.flavour, case.kind, case.dtype) == ("nnx", "attention", jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard" if own else "strict"):
        check(case)


def check(case: Case) -> None:
    kind, x = KINDS[case.kind], case.inputs
    _, weights, run = case.base()
    bits = {path: np.array(leaf) for path, leaf in weights.items()}
    run = jax.jit(run)
    plain = run(weights, x)

    # Injected: the base's own leaves, and float32 factors beside them; their number is PEFT's.
    model, factors, rest, output = injected(case)
    assert_bits(base_of(model, rest), bits)
    assert {leaf.dtype for leaf in factors.values()} == {jnp.dtype(jnp.float32)}
    counted = kind.parameters * LAYERS
    assert sum(leaf.size for leaf in factors.values()) == counted
    tree = jlora.combine(factors, rest)
    assert injection.count(tree) == (counted, counted + sum(w.size for w in weights.values()))
    zero = "lora_a" if kind.weight == "embedding" else "lora_b"
    assert all(leaf.any() != path.endswith(zero) for path, leaf in factors.items())

    # With one factor zero, nothing changes.
    grad = grad_of(output, x)
    _, untrained = grad(factors, x, rest)
    assert untrained.dtype == plain.dtype == case.dtype
    np.testing.assert_array_equal(untrained, plain)

    # With others, all is as with W + s * B A.
    right, right_y = explicit(case.flavour, case.kind)
    factors = case.fill(factors)
    grads, y = grad(factors, x, rest)
    assert_close(y, right_y, case.tolerance, "output")
    assert np.abs(np.asarray(y, np.float32) - np.asarray(plain, np.float32)).max() > 0.05
    layers = by_layer(grads[0])
    largest = 0.0
    if case.dtype == jnp.bfloat16:  # an attention's keys have little influence, and its rounding
        largest = max(np.abs(leaf).max() for leaf in right[0].values())
    assert layers.keys() == right[0].keys()
    for path, leaf in layers.items():
        assert leaf.dtype == jnp.float32, path
        assert_close(leaf, right[0][path], case.tolerance, path, largest)
    if kind.shape is not None:
        assert_close(grads[1], right[1], case.tolerance, "input")

    # A few steps leave the base as it was, whatever its gradient.
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01, momentum=0.9))
    tree = jlora.combine(factors, rest)
    if case.flavour == "linen":
        everywhere = jlora.combine(grads[0], jax.tree.map(jnp.ones_like, rest))
        masked = jlora.optimizer(tx)
        state = masked.init(tree)
        for _ in range(2):
            updates, state = masked.update(everywhere, state, tree)
            tree = optax.apply_updates(tree, updates)
        merged = trees.flatten(jlora.merge(model, tree))
    else:
        optimizer = nnx.Optimizer(tree, tx, wrt=nnx.LoRAParam)
        for _ in range(2):
            optimizer.update(tree, state_like(tree, grads[0]))
        merged, _ = injection.partition(jlora.merge(tree), everything=True)
    trained, rest = jlora.partition(tree)
    assert_bits(base_of(tree, rest), bits)
    assert all(not np.array_equal(trained[path], leaf) for path, leaf in factors.items())

    # Merged weights give what the factors do, in the base's dtype.
    assert {p: (w.shape, w.dtype) for p, w in merged.items()} == {
        p: (w.shape, w.dtype) for p, w in weights.items()
    }
    assert_close(run(merged, x), grad(trained, x, rest)[1], case.tolerance, "merged")


def base_of(model: Any, rest: Any) -> dict[str, jax.Array]:
    """The base's leaves of an NNX model, or of what `partition` left of Linen's tree."""
    if isinstance(rest, trees.LinenBase):
        return rest.rest
    leaves, _ = injection.partition(model, everything=True)
    return {path: leaf for path, leaf in leaves.items() if "lora_" not in path}


def state_like(model: Any, leaves: dict[str, jax.Array]) -> Any:
    """Leaves by path as the state of an NNX model's factors."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    return nnx.from_flat_state(
        [(path, leaf.replace(leaves["/".join(map(str, path))])) for path, leaf in flat]
    )


def assert_bits(got: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        assert got[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)
