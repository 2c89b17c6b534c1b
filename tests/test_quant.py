"""QuantArray: its shape, its behaviour in transformations, and what it refuses."""

import copy
import dataclasses
import logging
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jlora.errors import JloraError
from jlora.quant import checks
from jlora.quant.array import QuantArray
from jlora.quant.quantize import quantize, quantize_rows, stack, unstack

pytestmark = pytest.mark.usefixtures("strict_promotion")

KINDS = ("nf4", "fp4", "int8")
FORMS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(q: QuantArray, w: np.ndarray) -> bool:
    """Whether q stands for w and not for the same numbers in other places."""
    own = np.asarray(q.dequantize(jnp.float32))
    return own.shape == w.shape and np.corrcoef(own.ravel(), w.ravel())[0, 1] > 0.98


@pytest.mark.parametrize(("kind", "double"), FORMS)
def test_shapes_of_the_arrays(kind: str, double: bool) -> None:
    q = quantize(jnp.ones((3, 192, 40), jnp.bfloat16), kind=kind, double_quant=double)
    assert (q.shape, q.ndim, q.size, q.dtype) == ((3, 192, 40), 3, 3 * 192 * 40, jnp.bfloat16)
    shapes = {
        f.name: (x.shape, str(x.dtype))
        for f in dataclasses.fields(q)
        if isinstance(x := getattr(q, f.name), jax.Array)
    }
    if kind == "int8":
        wanted = {"codes": ((3, 192, 40), "int8"), "absmax": ((3, 1, 40), "float32")}
    else:
        wanted = {"codes": ((3, 96, 40), "uint8")}
        if double:
            wanted["nested_codes"] = (3, 1, 256), "uint8"
            wanted["nested_absmax"] = (3, 1), "float32"
            wanted["offset"] = (3,), "float32"
        else:
            wanted["absmax"] = (3, 3, 40), "float32"
    assert shapes == wanted
    assert q.nbytes == sum(x.nbytes for x in jax.tree.leaves(q))
    assert q.block_size == (192 if kind == "int8" else 64)


AXES = [
    ((64, 40), (-2,), (-1,), ()),
    ((64, 4, 10), (-3,), (-2, -1), ()),
    ((4, 32, 40), (-3, -2), (-1,), ()),
    ((40, 64), (-1,), (-2,), ()),
    ((5, 64, 40), (-2,), (-1,), (-3,)),
    ((64, 5, 40), (-3,), (-1,), (-2,)),
    ((10, 5, 64, 4), (-2,), (-4, -1), (-3,)),
]


@pytest.mark.parametrize(("kind", "double"), FORMS)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize(("shape", "contracting", "output", "batch"), AXES)
def test_any_axes(shape, contracting, output, batch, lead, kind, double) -> None:
    w = normal(*lead, *shape)
    axes = {"contracting": contracting, "output": output, "batch": batch}
    q = quantize(w, kind=kind, double_quant=double, **axes)
    assert q.shape == w.shape
    assert close(q, w)
    order = (*range(len(lead)), *(w.ndim + i for i in (*batch, *contracting, *output)))
    matrix = np.transpose(np.asarray(q.dequantize()), order)
    np.testing.assert_array_equal(q.matrix(), matrix.reshape(q.matrix().shape))
    assert q.matrix().shape[-2:] == (64 if shape != (4, 32, 40) else 128, 40)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype: str) -> None:
    q = quantize(jnp.asarray(normal(64, 8)).astype(dtype))
    assert (q.dtype, q.dequantize().dtype, q.matrix().dtype) == (dtype,) * 3
    once = q.dequantize(jnp.float32).astype(dtype)  # multiplied in float32, rounded once
    np.testing.assert_array_equal(q.dequantize().astype("float32"), once.astype("float32"))


@pytest.mark.parametrize(("kind", "double"), FORMS)
def test_transformations(kind: str, double: bool) -> None:
    w = normal(3, 128, 128)
    q = quantize(w, kind=kind, double_quant=double)
    values = q.dequantize()
    np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize())(q), values)
    np.testing.assert_array_equal(jax.vmap(lambda q: q.dequantize())(q), values)

    def layer(x, q):
        assert q.shape == (128, 128)
        return jnp.tanh(x @ q.dequantize()), q.shape[0]

    x = jnp.asarray(normal(2, 128))
    got, _ = jax.lax.scan(layer, x, q)
    wanted = x
    for i in range(3):
        wanted = jnp.tanh(wanted @ values[i])
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)

    def loss(x, q):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, q)[0])

    grad = jax.jit(jax.grad(loss))(x, q)
    dense = jax.grad(
        lambda x: jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), 0), x, values)[0])
    )
    np.testing.assert_allclose(grad, dense(x), rtol=1e-3, atol=1e-5)


def test_abstract_values_and_anything_else_in_its_place() -> None:
    q = quantize(normal(2, 64, 8), double_quant=True)
    abstract = jax.eval_shape(lambda: quantize(jnp.zeros((2, 64, 8)), double_quant=True))
    assert jax.tree.structure(abstract) == jax.tree.structure(q)
    assert (abstract.shape, abstract.nbytes) == (q.shape, q.nbytes)
    strange = jax.tree.map(lambda _: object(), q)
    assert "shape=unknown" in repr(strange)
    assert not hasattr(strange, "shape")
    assert jax.tree.map(lambda _: None, q).codes is None
    for same in (copy.copy(q), copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        np.testing.assert_array_equal(same.dequantize(), q.dequantize())
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".codes", ".nested_codes", ".nested_absmax", ".offset"]


def test_in_a_flax_variable() -> None:
    class Layer(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(quantize(normal(3, 64, 64)))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return x @ layer.kernel.get_value().dequantize()

    layer = Layer()
    x = jnp.ones((1, 64))
    wanted = x
    for w in layer.kernel.get_value().dequantize():
        wanted = wanted @ w
    np.testing.assert_allclose(run(x, layer), wanted, rtol=1e-4)


@pytest.mark.parametrize("numpy", [True, False])
def test_stack_and_unstack(numpy: bool) -> None:
    parts = [quantize_rows(normal(8, 64, seed=i), double_quant=True) for i in range(3)]
    if not numpy:
        parts = jax.tree.map(jnp.asarray, parts, is_leaf=lambda x: isinstance(x, np.ndarray))
    whole = stack(parts)
    assert whole.shape == (3, 64, 8)
    assert all(isinstance(x, np.ndarray) == numpy for x in jax.tree.leaves(whole))
    from_iterator = stack(iter(parts), count=3)
    twice = unstack(stack([whole, whole]))[1]
    for again in (unstack(whole), unstack(from_iterator), unstack(twice)):
        for part, own in zip(again, parts, strict=True):
            assert jax.tree.structure(part) == jax.tree.structure(own)
            jax.tree.map(np.testing.assert_array_equal, part, own)
    assert stack(unstack(whole)).offset.shape == (3,)


def test_stack_refuses() -> None:
    a, b = quantize(normal(64, 8)), quantize(normal(64, 8), kind="fp4")
    with pytest.raises(JloraError, match=r"cannot stack QuantArray\(fp4.*number 2, on the first"):
        stack([a, b])
    with pytest.raises(JloraError, match="count=0, got 0"):
        stack([])
    with pytest.raises(JloraError, match="count=3, got 1"):
        stack(iter([a]), count=3)
    with pytest.raises(JloraError, match="count=1, got 2"):
        stack(iter([a, a]), count=1)
    with pytest.raises(JloraError, match="no axis that stacks layers"):
        unstack(a)


MISUSES = {
    "x @ q": lambda x, q: x @ q,
    "q @ x": lambda x, q: q @ x,
    "numpy @ q": lambda x, q: np.ones((3, 64)) @ q,
    "q + 1": lambda x, q: q + 1,
    "1 - q": lambda x, q: 1 - q,
    "x * q": lambda x, q: x * q,
    "-q": lambda x, q: -q,
    "q[0]": lambda x, q: q[0],
    "iteration": lambda x, q: list(q),
    "x < q": lambda x, q: x < q,
    "np.asarray": lambda x, q: np.asarray(q),
    "np.multiply": lambda x, q: np.multiply(np.ones((3, 64)), q),
    "np.stack": lambda x, q: np.stack([q, q]),
    "jnp.asarray": lambda x, q: jnp.asarray(q),
    "jnp.matmul": lambda x, q: jnp.matmul(x, q),
    "jnp.einsum": lambda x, q: jnp.einsum("...i,io->...o", x, q),
    "astype": lambda x, q: q.astype(jnp.float32),
    "T": lambda x, q: q.T,
    "at": lambda x, q: q.at[0].set(1),
    "reshape": lambda x, q: q.reshape(-1),
}


@pytest.mark.parametrize("misuse", MISUSES)
@pytest.mark.parametrize("jit", [True, False])
def test_it_is_not_an_array(misuse: str, jit: bool) -> None:
    q = quantize(normal(64, 8))

    def f(x, q):
        return MISUSES[misuse](x, q)

    with pytest.raises(JloraError, match=r"QuantArray\(nf4, shape=\(64, 8\).*`.dequantize\(\)`"):
        (jax.jit(f) if jit else f)(jnp.ones((3, 64)), q)


def test_probing_for_attributes_is_answered() -> None:
    q = quantize(normal(64, 8))
    assert not hasattr(q, "astype")
    assert not hasattr(q, "aval")
    assert not hasattr(q, "__array_interface__")
    assert getattr(q, "sharding", None) is None


BAD = [
    ({"kind": "int4"}, "kind 'int4' is none of nf4, fp4, int8"),
    ({"block_size": 48}, "block_size 48 is none of 32, 64, 128"),
    ({"kind": "int8", "double_quant": True}, "double_quant is for nf4 and fp4"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
@pytest.mark.parametrize("function", [quantize, quantize_rows])
def test_bad_options(function, options, message) -> None:
    with pytest.raises(JloraError, match=f"^layers/up: {message}"):
        function(normal(64, 64), path="layers/up", **options)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(JloraError, match=r"kind 'q4'.*only floats are quantised.*is empty"):
        quantize(np.zeros((0, 3), np.int32), kind="q4")


def test_bad_axes_and_shapes() -> None:
    for axes in ({"contracting": (0,)}, {"output": (-2,)}, {"batch": (-3,)}, {"output": (-1, -4)}):
        with pytest.raises(JloraError, match="must together be the last axes"):
            quantize(normal(64, 64), **axes)
    with pytest.raises(JloraError, match=r"expected a matrix \(out, in\), got shape \(2, 64, 64\)"):
        quantize_rows(normal(2, 64, 64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 5, 63, 4095])
def test_weights_that_are_not_finite(dtype: str, kind: str, place: int) -> None:
    w = normal(4, 4096)
    w[2, place], w[3, 7] = np.nan, np.inf
    w = np.asarray(jnp.asarray(w).astype(dtype))
    for run in (
        lambda: quantize(w.T, kind=kind, path="up"),
        lambda: quantize_rows(w, kind=kind, path="up"),
    ):
        with pytest.raises(JloraError, match=r"^up: of 16384 weights, 2 are infinite or not numb"):
            run()


def test_weights_too_large_for_a_reciprocal() -> None:
    with pytest.raises(
        JloraError, match=r"0 are infinite or not numbers and 1 are beyond 2\*\*126"
    ):
        quantize(np.full((64, 1), 1e38, np.float32) * np.eye(64, 1, dtype=np.float32))


@pytest.mark.parametrize("function", [quantize, quantize_rows])
def test_padding_is_told_once(function, caplog) -> None:
    checks._told.cache_clear()
    w = normal(96, 96)
    with caplog.at_level(logging.WARNING, logger="jlora"):
        for path in ("layers/0/up", "layers/1/up"):
            q = function(w, path=path)
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("layers/0/up: 96 inputs are not a multiple of block_size 64")
    assert "bitsandbytes" in message
    assert (q.shape, q.codes.shape) == ((96, 96), (64, 96))
    assert close(q, w if function is quantize else w.T)


def test_the_path_is_for_messages_alone() -> None:
    traced = []

    @jax.jit
    def twice(q: QuantArray) -> jax.Array:
        traced.append(q)
        return 2 * q.dequantize()

    first, second = (quantize(jnp.ones((64, 8)), path=f"layers/{i}/up/kernel") for i in range(2))
    assert "layers/1/up/kernel" in repr(second)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    twice(first), twice(second)
    assert len(traced) == 1  # one program for layers that are alike
    assert "layers/0" in repr(stack([first, second]))
    with pytest.raises(JloraError, match=r"layers/1/up/kernel\) was used as an array"):
        jnp.asarray(second)
    with pytest.raises(JloraError, match=r"layers/1/up/kernel\) was used as an array"):
        second @ jnp.ones(8)
    assert pickle.loads(pickle.dumps(second)).path == second.path
