"""Updates of weights in functions that know nothing of them: against forming W + s·BA first."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jlora.errors import JloraError
from jlora.injection import lowrank, plain
from jlora.injection.plain import LowRank, Use

pytestmark = pytest.mark.usefixtures("strict_promotion")

IDS = jnp.asarray([[0, 3, 1], [2, 2, 0]], jnp.int32)
SCALING = 0.5
# Half the compile time; for functions whose result is compared with a tolerance.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def log_anew():
    """Forget what has been logged."""
    lowrank.warn.cache_clear()


@dataclasses.dataclass(frozen=True)
class Case:
    """One function of (weights, x); its one weight, and how it is used."""

    name: str
    fn: Callable[..., Any]
    shape: tuple[int, ...]
    x: tuple[int, ...]
    uses: tuple[Use | str, ...]
    roles: tuple[tuple[int, ...], ...] = ((0,), (1,), ())
    """Contracting, output and batch axes of the update."""
    formed: tuple[str, ...] = ()
    """The primitives for which W + s·BA is formed."""

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: Any = jnp.float32) -> tuple[dict[str, Any], LowRank, Any]:
        """Weights, update and input; the values in W and x are representable in bfloat16."""
        keys = jax.random.split(jax.random.key(len(self.name)), 4)
        contracting, output, batch = self.roles

        def draw(key: Any, shape: tuple[int, ...]) -> jax.Array:
            return (jax.random.normal(key, shape) / 2).astype(jnp.bfloat16).astype(dtype)

        def factor(key: Any, axes: tuple[int, ...]) -> jax.Array:
            heads, own = ([self.shape[i] for i in some] for some in (batch, axes))
            return jax.random.normal(key, (*heads, 2, *own))

        a, b = factor(keys[2], contracting), factor(keys[3], output)
        update = LowRank(a, b, SCALING, contracting, output, batch)
        return {"w": draw(keys[0], self.shape)}, update, draw(keys[1], self.x)


def formed(weight: jax.Array, update: LowRank) -> jax.Array:
    """W + s·BA."""
    letters = "abcdef"
    heads, ins, outs = (
        "".join(letters[i] for i in axes)
        for axes in (update.batch, update.contracting, update.output)
    )
    equation = f"{heads}z{ins},{heads}z{outs}->{letters[: weight.ndim]}"
    product = jnp.einsum(equation, update.lora_a, update.lora_b, precision=lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + update.scaling * product).astype(weight.dtype)


def einsum(equation: str) -> Callable[..., Any]:
    return lambda weights, x: jnp.einsum(equation, x, weights["w"])


def matmul(weights: Any, x: Any) -> Any:
    return x @ weights["w"]


def flax_conv1d(weights: Any, x: Any) -> Any:
    kernel = weights["w"].transpose().astype(x.dtype)
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def scan_const(weights: Any, x: Any) -> Any:
    def body(carry: Any, row: Any) -> Any:
        carry = jnp.tanh(carry @ weights["w"] + row)
        return carry, carry * 2

    return lax.scan(body, x[0], x, reverse=True, unroll=2)


def scan_layers(weights: Any, x: Any, **options: Any) -> Any:
    def body(carry: Any, layer: Any) -> Any:
        return jnp.tanh(carry @ layer.T), (carry, layer)  # the layer comes out again, unused

    carry, (ys, _) = lax.scan(body, x, weights["w"], **options)
    return carry, ys


def scan_twice(weights: Any, x: Any) -> Any:
    """The second scan is over the layers that the first gives out."""
    x, layers = lax.scan(lambda x, w: (jnp.tanh(x @ w), w.T), x, weights["w"])
    return lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, layers)[0]


def index_layers(weights: Any, x: Any) -> Any:
    for i in range(3):
        x = jnp.tanh(x @ weights["w"][i])
    return x


def fori_layers(weights: Any, x: Any) -> Any:
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ weights["w"][i]), x)


def while_loop(weights: Any, x: Any) -> Any:
    def body(state: Any) -> Any:
        return state[0] + 1, jnp.tanh(state[1] @ weights["w"])

    return lax.while_loop(lambda state: state[0] < 2, body, (0, x))[1]


def cond(weights: Any, x: Any) -> Any:
    return lax.cond(x[0, 0] > 0, lambda: x @ weights["w"], lambda: 2 * x @ weights["w"])


def carry(weights: Any, x: Any) -> Any:
    def body(state: Any, _: Any) -> Any:
        return (state[0], state[0] @ state[1].T, state[2]), None

    return lax.scan(body, (x, weights["w"], 0), None, length=1)[0][1].sum() + x


@jax.custom_vjp
def tripled(x: Any) -> Any:
    return 3 * x


# Wrong on purpose: a gradient shows whether it was this rule that made it.
tripled.defvjp(lambda x: (3 * x, None), lambda _, g: (7 * g,))


def reshaped(weights: Any, x: Any) -> Any:
    kernel = lax.stop_gradient(weights["w"]).reshape(4, 1, 6)[:, 0]
    kernel = lax.optimization_barrier(jnp.expand_dims(kernel, 0)).squeeze(0)
    return (x @ kernel).reshape(*x.shape[:-1], 3, 2)


def split_heads(weights: Any, x: Any) -> Any:
    return jnp.einsum("bd,dnh->bnh", x, weights["w"].reshape(4, 2, 3))


def tied(weights: Any, x: Any) -> Any:
    # One row of the second look-up is out of range.
    rows = weights["w"][IDS] + jnp.take(weights["w"], IDS + 3, 0, mode="fill", fill_value=1)
    return (rows + x) @ weights["w"].T


def checkpointed(weights: Any, x: Any) -> Any:
    policy = jax.checkpoint_policies.nothing_saveable
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w), policy=policy)(weights["w"], x)


def inner_gradient(weights: Any, x: Any) -> Any:
    return jax.grad(lambda x: jnp.sin(x @ weights["w"]).sum())(x)


DENSE = (Use((0,), (1,)),)
TURNED = (Use((1,), (0,)),)
OTHER = ((1,), (0,), ())
STACK = ((1,), (2,), (0,))
CASES = [
    Case("matmul", matmul, (4, 5), (2, 3, 4), DENSE),
    Case("vector", matmul, (4, 5), (4,), DENSE),
    Case("one", matmul, (4, 1), (3, 4), DENSE),
    Case(
        "heads", einsum("BTD,DNH->BTNH"), (4, 3, 2), (2, 3, 4),
        (Use((0,), (1, 2)),), ((0,), (1, 2), ()),
    ),
    Case(
        "heads-out", einsum("BTNH,NHD->BTD"), (3, 2, 4), (2, 5, 3, 2),
        (Use((0, 1), (2,)),), ((0, 1), (2,), ()),
    ),
    Case(
        "heads-turned", einsum("BTHN,NHD->BTD"), (3, 2, 4), (2, 5, 2, 3),
        (Use((0, 1), (2,)),), ((0, 1), (2,), ()),
    ),
    Case(
        "experts", einsum("EBD,EDF->EBF"), (3, 4, 5), (3, 2, 4),
        (Use((1,), (2,), (0,)),), STACK,
    ),
    Case(
        "experts-last", einsum("BED,DFE->BEF"), (4, 5, 3), (2, 3, 4),
        (Use((0,), (1,), (2,)),), ((0,), (1,), (2,)),
    ),
    Case(
        "key-value", einsum("BTD,KDNH->KBTNH"), (2, 4, 1, 3), (2, 3, 4),
        (Use((1,), (0, 2, 3)),), ((1,), (0, 2, 3), ()),
    ),
    Case("turned", lambda w, x: x @ w["w"].T, (5, 4), (2, 4), TURNED, OTHER),
    Case("conv1d", flax_conv1d, (5, 4), (2, 3, 4), TURNED, OTHER),
    Case("left", lambda w, x: w["w"] @ x, (5, 4), (4, 3), TURNED, OTHER),
    Case(
        "left-batch", lambda w, x: jnp.einsum("EFD,BED->EFB", w["w"], x), (3, 5, 4), (2, 3, 4),
        (Use((2,), (1,), (0,)),), ((2,), (1,), (0,)),
    ),
    Case("jit", lambda w, x: jax.jit(lambda: jnp.tanh(matmul(w, x)))(), (4, 5), (2, 4), DENSE),
    Case("jit-out", lambda w, x: x @ jax.jit(lambda w: w.T)(w["w"]), (5, 4), (2, 4), TURNED, OTHER),
    Case("checkpoint", checkpointed, (4, 5), (2, 4), DENSE),
    Case("scan", scan_const, (4, 4), (4, 4), DENSE),
    Case("layers", scan_layers, (3, 4, 4), (2, 4), (Use((2,), (1,), (), 1),), ((2,), (1,), (0,))),
    Case(
        "layers-reversed", functools.partial(scan_layers, reverse=True), (3, 4, 4), (2, 4),
        (Use((2,), (1,), (), 1),), ((2,), (1,), (0,)),
    ),
    Case(
        "one-layer", scan_layers, (1, 4, 4), (2, 4),
        (Use((2,), (1,), (), 1),), ((2,), (1,), (0,)),
    ),
    Case("twice", scan_twice, (3, 4, 4), (2, 4), (Use((1,), (2,), (), 1),), STACK),
    Case("index", index_layers, (3, 4, 4), (2, 4), (Use((1,), (2,), (), 1),), STACK),
    Case("fori", fori_layers, (3, 4, 4), (2, 4), (Use((1,), (2,), (), 1),), STACK),
    Case("while", while_loop, (4, 4), (2, 4), DENSE),
    Case("cond", cond, (4, 5), (2, 4), DENSE),
    Case("vmap", lambda w, x: jax.vmap(lambda r: r @ w["w"])(x), (4, 5), (3, 4), DENSE),
    Case(
        "vmap-experts", lambda w, x: jax.vmap(jnp.matmul)(x, w["w"]), (3, 4, 5), (3, 2, 4),
        (Use((1,), (2,), (0,)),), STACK,
    ),
    Case(
        "dropped", lambda w, x: x @ w["w"].squeeze(1), (4, 1, 5), (2, 4),
        (Use((0,), (1, 2)),), ((0,), (1, 2), ()),
    ),
    Case("split", split_heads, (4, 6), (2, 4), DENSE),
    Case("merge", lambda w, x: x @ w["w"].reshape(4, 6), (4, 3, 2), (2, 4),
         (Use((0,), (1, 2)),), ((0,), (1, 2), ())),
    Case("part", lambda w, x: x[:, 1:] @ w["w"][1:, ::2], (4, 5), (2, 4), DENSE),
    Case("tied-head", tied, (6, 4), (2, 3, 4), ("gather", *TURNED), OTHER),
    Case("tied-rows", tied, (6, 4), (2, 3, 4), ("gather", *TURNED)),
    Case("custom-beside", lambda w, x: tripled(x @ w["w"]), (4, 5), (2, 4), DENSE),
    Case("inner-gradient", inner_gradient, (4, 5), (2, 4), (*DENSE, *TURNED)),
    # These need the whole weight.
    Case(
        "custom-into", lambda w, x: x @ tripled(w["w"]), (4, 5), (2, 4),
        ("custom_vjp_call",), formed=("custom_vjp_call",),
    ),
    Case("scaled", lambda w, x: x @ (2 * w["w"]), (4, 5), (2, 4), ("mul",), formed=("mul",)),
    Case("carry", carry, (4, 4), (4, 4), ("scan",), formed=("scan",)),
    Case("returned", lambda w, x: (w["w"], x), (4, 5), (2, 4), ("return",), formed=("return",)),
    Case(
        "other-axes", einsum("BDN,DNH->BH"), (4, 3, 2), (2, 4, 3),
        (Use((0, 1), (2,)),), ((0,), (1, 2), ()), ("dot_general",),
    ),
    Case(
        "mixed", lambda w, x: x @ w["w"].reshape(8, 3), (4, 2, 3), (2, 8),
        (Use((0, 1), (2,)),), ((0,), (1, 2), ()), ("reshape",),
    ),
    Case(
        "uneven", lambda w, x: x @ w["w"].reshape(4, 6), (6, 4), (2, 4),
        ("reshape",), formed=("reshape",),
    ),
    Case(
        "stack-of-shared", scan_layers, (4, 4, 4), (2, 4),
        (Use((2,), (1,), (), 1),), ((2,), (0, 1), ()), ("scan",),
    ),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def loss(out: Any) -> jax.Array:
    """With a different slope for each output, in float32."""
    leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(out) if x.dtype != jnp.int32]
    return sum((jnp.linspace(-1, 1, x.size).reshape(x.shape) * x).sum() for x in leaves)


def assert_close(found: Any, right: Any, tolerance: float) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


@every_case
def test_values_and_uses(case: Case, caplog: pytest.LogCaptureFixture):
    weights, update, x = case.build()
    assert plain.find_uses(case.fn, weights, x) == {"w": list(case.uses)}
    abstract = jax.eval_shape(lambda: (weights, x))
    assert plain.find_uses(case.fn, *abstract) == {"w": list(case.uses)}
    right = case.fn({"w": formed(weights["w"], update)}, x)
    with caplog.at_level(logging.WARNING, "jlora"):
        found = plain.call(case.fn, weights, {"w": update}, x)
        jax.eval_shape(lambda: plain.call(case.fn, weights, {"w": update}, x))
    assert_close(found, right, 1e-5)
    assert [record.args for record in caplog.records] == [("w", name) for name in case.formed]
    assert all(record.name == "jlora" for record in caplog.records)


@every_case
def test_gradients(case: Case):
    weights, update, x = case.build()
    differentiate = jax.jacfwd if case.name in ("while", "fori") else jax.grad

    def compare(weights: Any, update: Any, x: Any) -> Any:
        def found(*args: Any) -> Any:
            return loss(plain.call(case.fn, args[0], {"w": args[1]}, args[2]))

        def right(*args: Any) -> Any:
            return loss(case.fn({"w": formed(args[0]["w"], args[1])}, args[2]))

        return [differentiate(f, (0, 1, 2))(weights, update, x) for f in (found, right)]

    # On values of the order of one: the sums of many of them cancel.
    found, right = fast_jit(compare)(weights, update, x)
    assert_close(found, right, 2e-5)


@every_case
def test_zero_b_changes_nothing(case: Case):
    weights, update, x = case.build()
    update = dataclasses.replace(update, lora_b=jnp.zeros_like(update.lora_b))
    found = jax.jit(lambda *args: plain.call(case.fn, args[0], {"w": args[1]}, args[2]))
    found, right = found(weights, update, x), jax.jit(case.fn)(weights, x)
    for y, z in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(y, z)


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "carry"], ids=str)
def test_bfloat16(case: Case):
    weights, update, x = case.build(jnp.bfloat16)
    right = fast_jit(lambda: case.fn({"w": formed(weights["w"], update)}, x))()
    found = fast_jit(lambda *args: plain.call(case.fn, args[0], {"w": args[1]}, args[2]))
    assert_close(found(weights, update, x), right, 2e-2)


def test_dtype_is_that_of_the_contraction():
    def wide(weights: Any, x: Any) -> Any:
        return jnp.matmul(x, weights["w"], preferred_element_type=jnp.float32)

    weights, update, x = CASES[0].build(jnp.bfloat16)
    right = wide({"w": formed(weights["w"], update)}, x)
    assert_close(plain.call(wide, weights, {"w": update}, x), right, 2e-2)
    jaxpr = str(jax.make_jaxpr(lambda: plain.call(wide, weights, {"w": update}, x))())
    assert jaxpr.count("preferred_element_type=float32") == 1
    assert jaxpr.count("bf16") > 6


def test_precision_is_that_of_the_contraction():
    weights, update, x = CASES[0].build()
    fn = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    text = str(
        jax.make_jaxpr(lambda: plain.call(lambda w, x: fn(x, w["w"]), weights, {"w": update}, x))()
    )
    assert text.count("dot_general[") == 3
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 3


def test_vmap_over_updates():
    weights, update, x = CASES[0].build()
    updates = jax.tree.map(lambda f: jnp.stack([f, 2 * f]), update)
    found = jax.vmap(lambda u: plain.call(matmul, weights, {"w": u}, x))(updates)
    one = plain.call(matmul, weights, {"w": update}, x)
    four = plain.call(matmul, weights, {"w": dataclasses.replace(update, scaling=4 * SCALING)}, x)
    assert_close(found, jnp.stack([one, four]), 1e-5)


def test_custom_rule_is_kept():
    """The rule multiplies by 7 where the derivative is 3."""
    weights, update, x = CASES[0].build()
    kept, right = (
        jax.grad(lambda x, f=f: plain.call(f, weights, {"w": update}, x).sum())(x)
        for f in (lambda w, x: tripled(matmul(w, x)), lambda w, x: 7 * matmul(w, x))
    )
    assert_close(kept, right, 1e-5)


def test_checkpoint_is_kept():
    weights, update, x = CASES[0].build()

    def fn(weights: Any, x: Any) -> Any:
        return jax.checkpoint(matmul, policy=jax.checkpoint_policies.dots_saveable)(weights, x)

    call = jax.make_jaxpr(lambda: plain.call(fn, weights, {"w": update}, x))()
    (remat,) = [e for e in call.eqns if "policy" in e.params]
    assert remat.params["policy"] is jax.checkpoint_policies.dots_saveable
    assert str(remat.params["jaxpr"]).count("dot_general[") == 3


def test_arguments_and_results_of_any_kind():
    def fn(weights: Any, x: Any, mode: str, *, flag: bool, table: Any) -> Any:
        assert (mode, flag) == ("some", True)
        assert isinstance(table, np.ndarray)
        return {"y": x["a"] @ weights["w"], "mode": mode, "none": None, "table": table, "n": 3}

    weights, update, x = CASES[0].build()
    table = np.ones(2)
    args = ({"a": x, "b": None}, "some")
    out = plain.call(fn, weights, {"w": update}, *args, flag=True, table=table)
    assert out["mode"] == "some"
    assert out["none"] is None
    assert out["table"] is table
    assert out["n"] == 3
    assert_close(out["y"], matmul({"w": formed(weights["w"], update)}, x), 1e-5)
    assert plain.find_uses(fn, weights, *args, flag=True, table=table) == {"w": [*DENSE]}


def test_two_weights_one_updated():
    def fn(weights: Any, x: Any) -> Any:
        assert list(weights) == ["z", "w"]
        return x @ weights["w"] @ weights["z"].T

    weights, update, x = CASES[0].build()
    weights = {"z": weights["w"] + 1, **weights}
    found = plain.call(fn, weights, {"w": update}, x)
    assert_close(found, fn({**weights, "w": formed(weights["w"], update)}, x), 1e-5)
    assert plain.find_uses(fn, weights, x) == {"z": [*TURNED], "w": [*DENSE]}
    both = plain.call(
        lambda w, _: w["z"].T @ w["w"], weights, {"z": update, "w": update}, x
    )  # one formed, one kept apart
    z, w = (formed(weights[path], update) for path in "zw")
    assert_close(both, z.T @ w, 1e-5)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_effects(ordered: bool, jit: bool):
    seen = []

    def fn(weights: Any, x: Any) -> Any:
        def body(x: Any, _: Any) -> Any:
            jax.debug.callback(lambda y: seen.append(y.shape), x, ordered=ordered)
            return x @ weights["w"], None

        return lax.scan(body, x, None, length=2)[0]

    weights, update, x = Case("", fn, (4, 4), (2, 4), ()).build()
    call = functools.partial(plain.call, fn)
    (jax.jit(call) if jit else call)(weights, {"w": update}, x)
    jax.effects_barrier()
    assert seen == [(2, 4)] * 2


def test_no_updates():
    x = object()
    assert plain.call(lambda weights, y: (weights, y), {"w": x}, {}, x) == ({"w": x}, x)


def test_unknown_weight_and_wrong_axes():
    weights, update, x = CASES[0].build()
    with pytest.raises(JloraError, match="no weight 'ww' to update; did you mean 'w'"):
        plain.call(matmul, weights, {"ww": update}, x)
    with pytest.raises(JloraError, match=r"w: each axis of \(4, 5\) must be"):
        plain.call(matmul, weights, {"w": dataclasses.replace(update, output=(0,))}, x)
    with pytest.raises(JloraError, match=r"w: factors of shapes .*'lora_b': \(2, 4\)"):
        plain.call(matmul, weights, {"w": dataclasses.replace(update, lora_b=update.lora_a)}, x)


# Cost.


def flops(fn: Callable[..., Any], *args: Any) -> float:
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def big(name: str) -> tuple[Callable[..., Any], dict[str, Any], LowRank, Any, float, float]:
    """(fn, weights, update, x, FLOPs of x W, FLOPs of the thin products): 256 rows of 128."""
    n, t, r = 128, 256, 2
    turned = name in ("turned", "conv1d", "tied")
    shape, roles = (n, n), ((1,), (0,), ()) if turned else ((0,), (1,), ())
    fns: dict[str, Callable[..., Any]] = {
        "turned": lambda w, x: x @ w["w"].T,
        "conv1d": flax_conv1d,
        "tied": lambda w, x: (x + w["w"][jnp.arange(t) % n]) @ w["w"].T,
        "heads": lambda w, x: jnp.einsum("bd,dnh->bnh", x, w["w"].reshape(n, 8, n // 8)),
        "matmul": matmul,
        "checkpoint": checkpointed,
        "scan": lambda w, x: lax.scan(lambda c, _: (c @ w["w"], None), x, None, length=1)[0],
        "layers": lambda w, x: lax.scan(lambda c, w: (c @ w, None), x, w["w"])[0],
    }
    if name == "layers":
        shape, roles = (1, n, n), STACK
    weights, update, x = Case("", fns[name], shape, (t, n), (), roles).build()
    return fns[name], weights, update, x, 2 * t * n * n, 2 * 2 * t * n * r


BIG = ["matmul", "turned", "conv1d", "heads", "tied", "checkpoint", "scan", "layers"]


@pytest.mark.parametrize("name", BIG)
def test_forward_costs_the_thin_products(name: str):
    fn, weights, update, x, base, thin = big(name)
    found = flops(lambda w, u, x: plain.call(fn, w, {"w": u}, x), weights, update, x)
    rows = thin if name == "tied" else 0  # the look-up's own product
    plain_cost = flops(fn, weights, x)
    assert base <= plain_cost < found
    assert found - plain_cost < 2 * (thin + rows)
    text = str(jax.make_jaxpr(lambda: plain.call(fn, weights, {"w": update}, x))())
    assert text.count("dot_general[") == (4 if name == "tied" else 3)


@pytest.mark.parametrize("name", [name for name in BIG if name not in ("checkpoint", "tied")])
def test_no_gradient_of_the_base(name: str):
    fn, weights, update, x, base, _ = big(name)

    def total(u: Any, w: Any, x: Any) -> Any:
        return (plain.call(fn, w, {"w": u}, x) ** 2).sum()

    factors_alone = flops(jax.grad(total), update, weights, x)
    with_base = flops(jax.grad(total, (0, 1)), update, weights, x)
    assert factors_alone < 1.35 * base  # the loss's own x W, and thin products
    assert with_base > 1.95 * base
