"""Injection into NNX modules: a table of models, and the contracts that each of them keeps."""

import dataclasses
import functools
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import Mlp

import jlora
from jlora import adapter, canonical, injection
from jlora.errors import JloraError
from jlora.injection.nnx import LoraLayer

pytestmark = pytest.mark.usefixtures("strict_promotion")

CONFIG = jlora.LoraConfig(r=4, lora_alpha=8)
RANDOM_B = dataclasses.replace(CONFIG, init_lora_weights=False)
DROPOUT = dataclasses.replace(RANDOM_B, lora_dropout=0.5)
# Half the compile time; for functions whose result is compared with a tolerance.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TOKENS = jnp.asarray([[5, 9, 200, 7, 7, 31, 2], [8, 1, 4, 100, 23, 0, 1]], jnp.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    stacked: bool
    dtype: Any

    def __str__(self) -> str:
        layout = "stacked" if self.stacked else "unrolled"
        return f"{self.kind}-{layout}-{jnp.dtype(self.dtype).name}"

    @property
    def inputs(self) -> jax.Array:
        if self.kind == "lm":
            return TOKENS
        return jax.random.normal(jax.random.key(1), (6, 8)).astype(self.dtype)

    @property
    def tolerance(self) -> float:
        """Of a difference's norm, relative to the norm of what is right."""
        return 1e-5 if self.dtype == jnp.float32 else 2e-2

    def build(self, model_dir: Path) -> Any:
        """The base model; its weights are representable in bfloat16 whatever its dtype."""
        if self.kind == "lm":
            model: Any = jlora.load(model_dir, scan_layers=self.stacked, dtype=self.dtype)
        else:
            model = Mlp(nnx.Rngs(0), stacked=self.stacked)
            same, _ = injection.partition(Mlp(nnx.Rngs(0)), everything=True)
            injection.update(model, canonical.restack(same, injection.stacks(model)))
        for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            leaf.set_value(leaf.get_value().astype(jnp.bfloat16).astype(self.dtype))
        return model


CASES = [
    Case(kind, stacked, dtype)
    for kind in ("mlp", "lm")
    for stacked in (False, True)
    for dtype in (jnp.float32, jnp.bfloat16)
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
few_cases = pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[-1]], ids=str)
mlp_cases = pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)


def loss_of(model: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a loss with a different slope for each output, the outputs), in float32."""
    out = model(x).astype(jnp.float32)
    slopes = jnp.linspace(-1, 1, out.size, dtype=jnp.float32).reshape(out.shape)
    return (jnp.sin(out) * slopes).mean(), out


def forward(model: Any, case: Case) -> jax.Array:
    """The model's output under jit, weights as arguments."""
    return _run(*jlora.partition(model), case.inputs)


@jax.jit
def _run(factors: dict, base: Any, x: jax.Array) -> jax.Array:
    return jlora.combine(factors, base)(x)


def base_bits(model: Any) -> dict[str, np.ndarray]:
    leaves, _ = injection.partition(model, everything=True)
    return {path: np.array(leaf) for path, leaf in leaves.items() if "lora_" not in path}


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(got) == list(expected)
    for path, leaf in expected.items():
        assert got[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def assert_close(got: Any, expected: Any, tolerance: float, name: str = "") -> None:
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    assert got.shape == expected.shape
    assert np.linalg.norm(expected) > 0, name
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected), name


@functools.cache
def explicit(kind: str, model_dir: Path) -> tuple[np.ndarray, dict, dict]:
    """Outputs, factors and their gradients with kernels W + s A^T B, in float32 and unrolled."""
    case = Case(kind, False, jnp.float32)
    model = jlora.inject(case.build(model_dir), RANDOM_B, rngs=nnx.Rngs(7))
    factors, _ = jlora.partition(model)
    weights, base = injection.partition(jlora.eject(model), everything=True)

    @fast_jit
    @functools.partial(jax.grad, has_aux=True)
    def grad(factors: dict, weights: dict, base: Any) -> tuple[jax.Array, jax.Array]:
        merged = dict(weights)
        for path in {path.rpartition("/")[0] for path in factors}:
            a, b = factors[f"{path}/lora_a"], factors[f"{path}/lora_b"]
            merged[f"{path}/kernel"] = weights[f"{path}/kernel"] + 2.0 * a.T @ b
        return loss_of(injection.combine(merged, base), case.inputs)

    grads, out = grad(factors, weights, base)
    return np.asarray(out), factors, grads


@every_case
def test_output_and_gradients_are_those_of_the_merged_kernel(case: Case, model_dir: Path) -> None:
    expected, expected_factors, expected_grads = explicit(case.kind, model_dir)
    model = jlora.inject(case.build(model_dir), RANDOM_B, rngs=nnx.Rngs(7))
    factors, base = jlora.partition(model)
    stacks = injection.stacks(model)
    assert bool(stacks) == case.stacked
    # The same draw whatever the layout and the base's dtype; always float32.
    assert_same(dict(sorted(canonical.unstack(factors, stacks).items())), expected_factors)

    @fast_jit
    @functools.partial(jax.grad, has_aux=True)
    def grad(factors: dict, base: Any) -> tuple[jax.Array, jax.Array]:
        return loss_of(jlora.combine(factors, base), case.inputs)

    grads, out = grad(factors, base)
    assert_close(out, expected, case.tolerance)
    grads = canonical.unstack(grads, stacks)
    assert grads.keys() == expected_grads.keys()
    for path, leaf in grads.items():
        assert leaf.dtype == jnp.float32, path
        assert_close(leaf, expected_grads[path], 2 * case.tolerance, path)


@every_case
def test_with_b_zero_nothing_changes(case: Case, model_dir: Path) -> None:
    model = case.build(model_dir)
    before, out = base_bits(model), forward(model, case)
    assert jlora.inject(model, CONFIG, rngs=nnx.Rngs(0)) is model
    injected = forward(model, case)
    assert injected.dtype == out.dtype
    assert (injected == out).all()
    assert_same(base_bits(model), before)
    adapted = [module for _, module in nnx.iter_modules(model) if isinstance(module, LoraLayer)]
    assert len(adapted) == len(injection.plan(model, CONFIG).targets)
    assert all(isinstance(module, nnx.Linear) for module in adapted)


@every_case
def test_eject_restores_the_model(case: Case, model_dir: Path) -> None:
    model = case.build(model_dir)
    graphdef, before = nnx.graphdef(model), base_bits(model)
    classes = {path: type(module) for path, module in nnx.iter_modules(model)}
    jlora.inject(model, DROPOUT, rngs=nnx.Rngs(0))
    assert nnx.graphdef(model) != graphdef
    assert jlora.eject(model) is model
    assert nnx.graphdef(model) == graphdef
    assert_same(base_bits(model), before)
    for path, module in nnx.iter_modules(model):
        assert type(module) is classes[path]
    jlora.inject(model, CONFIG, rngs=nnx.Rngs(0))  # and it can be injected again


@mlp_cases
def test_an_nnx_optimizer_moves_the_factors_alone(case: Case, model_dir: Path) -> None:
    model = jlora.inject(case.build(model_dir), CONFIG, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.LoRAParam)
    before, (factors, _) = base_bits(model), jlora.partition(model)
    wrt = nnx.DiffState(0, nnx.LoRAParam)

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer) -> None:
        grads, _ = nnx.grad(loss_of, argnums=wrt, has_aux=True)(model, case.inputs)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer)
    assert_same(base_bits(model), before)
    moved, _ = jlora.partition(model)
    for path, leaf in factors.items():
        assert not np.array_equal(moved[path], leaf), path
    state = [leaf.shape for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.ndim]
    assert sorted(state) == sorted([leaf.shape for leaf in factors.values()] * 2)  # two moments


@few_cases
def test_functional_steps_move_the_factors_alone(case: Case, model_dir: Path) -> None:
    model = jlora.inject(case.build(model_dir), CONFIG, rngs=nnx.Rngs(0))
    before, (factors, base) = base_bits(model), jlora.partition(model)
    tx = optax.adamw(1e-2, weight_decay=0.1)
    opt_state = tx.init(factors)

    @fast_jit
    def step(factors: dict, opt_state: Any, base: Any) -> tuple[dict, Any, Any]:
        grads = jax.grad(lambda f: loss_of(jlora.combine(f, base), case.inputs)[0])(factors)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            updates, opt_state = tx.update(grads, opt_state, factors)
        return optax.apply_updates(factors, updates), opt_state, base

    moved, returned = factors, base
    for _ in range(2):
        moved, opt_state, returned = step(moved, opt_state, returned)
    assert_same(base_bits(model), before)  # nothing in place
    trained = jlora.combine(moved, returned)  # the base went through jit
    assert_same(base_bits(trained), before)
    for path, leaf in jlora.partition(trained)[0].items():
        assert not np.array_equal(leaf, factors[path]), path
    moments = [leaf.shape for leaf in jax.tree.leaves(opt_state) if leaf.ndim]
    assert sorted(moments) == sorted([leaf.shape for leaf in factors.values()] * 2)
    injection.update(model, moved)
    assert_same(jlora.partition(model)[0], moved)
    assert_same(base_bits(model), before)


SURVIVES = {
    "split and merge": lambda model: nnx.merge(*nnx.split(model)),
    "clone": nnx.clone,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "partition and combine": lambda model: jlora.combine(*jlora.partition(model)),
}


@pytest.mark.parametrize("copy", SURVIVES.values(), ids=SURVIVES)
@few_cases
def test_copies_are_whole(case: Case, copy: Any, model_dir: Path) -> None:
    model = jlora.inject(case.build(model_dir), RANDOM_B, rngs=nnx.Rngs(0))
    other = copy(model)
    assert other is not model
    assert nnx.graphdef(other) == nnx.graphdef(model)
    for (path, leaf), (other_path, other_leaf) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(other)), strict=True
    ):
        assert path == other_path
        assert type(leaf) is type(other_leaf)
        np.testing.assert_array_equal(leaf.get_value(), other_leaf.get_value())
    modules = dict(nnx.iter_modules(model))
    for path, module in nnx.iter_modules(other):
        assert type(module) is type(modules[path])
    assert isinstance(injection.nnx.adapted(other)[0][1], nnx.Linear)
    np.testing.assert_array_equal(forward(other, case), forward(model, case))
    jlora.eject(other)  # the copy has all that eject needs, and shares no variable
    assert len(jlora.partition(model)[0]) > 0


class TestDropout:
    @pytest.mark.parametrize("stacked", [False, True])
    def test_train_draws_anew_and_eval_does_not(self, stacked: bool) -> None:
        model = jlora.inject(Mlp(nnx.Rngs(0), stacked=stacked), DROPOUT, rngs=nnx.Rngs(3))
        plain = jlora.inject(Mlp(nnx.Rngs(0), stacked=stacked), RANDOM_B, rngs=nnx.Rngs(3))
        x = jnp.ones((4, 8))
        first, second = model(x), model(x)  # a fresh model trains
        assert not jnp.array_equal(first, second)
        assert not jnp.array_equal(first[0], first[1])
        model.eval()
        quiet = model(x)
        np.testing.assert_array_equal(model(x), quiet)
        plain.train()  # a rate of zero needs no draws
        np.testing.assert_array_equal(plain(x), quiet)
        model.train()
        assert not jnp.array_equal(model(x), quiet)

    def test_each_layer_has_draws_of_its_own(self) -> None:
        unrolled = jlora.inject(Mlp(nnx.Rngs(0)), DROPOUT, rngs=nnx.Rngs(3))
        stacked = jlora.inject(Mlp(nnx.Rngs(0), stacked=True), DROPOUT, rngs=nnx.Rngs(3))
        one_by_one = jnp.stack([layer.lora_rngs() for layer in unrolled.layers])
        for keys in (one_by_one, stacked.layers.lora_rngs.key[...]):
            assert keys.shape == (3,)
            assert len({tuple(key) for key in jax.random.key_data(keys).tolist()}) == 3

    def test_the_mean_is_the_output_without_dropout(self) -> None:
        config = dataclasses.replace(DROPOUT, lora_dropout=0.3)
        model = jlora.inject(
            nnx.Sequential(nnx.Linear(8, 3, rngs=nnx.Rngs(0))), config, rngs=nnx.Rngs(0)
        )
        x = jnp.broadcast_to(jnp.linspace(-1, 1, 8), (20_000, 8))
        drawn = np.asarray(model(x))
        model.eval()
        error = drawn.std(axis=0) / np.sqrt(len(drawn))
        assert (error > 0).all()
        assert (np.abs(drawn.mean(axis=0) - np.asarray(model(x[:1]))[0]) < 5 * error).all()

    def test_what_is_kept_is_scaled(self) -> None:
        dropped = np.asarray(adapter.dropout(jnp.ones(20_000), 0.3, jax.random.key(0)))
        np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.7], rtol=1e-6)
        assert abs((dropped == 0).mean() - 0.3) < 5 * (0.3 * 0.7 / 20_000) ** 0.5

    def test_random_streams_are_checked_before_anything_changes(self) -> None:
        model = Mlp(nnx.Rngs(0))
        graphdef = nnx.graphdef(model)
        with pytest.raises(AttributeError, match="dropout"):
            jlora.inject(model, DROPOUT, rngs=nnx.Rngs(params=0))
        assert nnx.graphdef(model) == graphdef


def test_no_gradient_of_the_base_is_computed() -> None:
    """2 N a row forward, 2 N for activations, and 2 N more only if weights want a gradient."""
    model = jlora.inject(
        Mlp(nnx.Rngs(0), width=256), jlora.LoraConfig(r=1, lora_alpha=1), rngs=nnx.Rngs(0)
    )
    trained, total = injection.count(model)
    rows, unit = 1024, (total - trained) * 1024
    x = jnp.ones((rows, 256))

    def flops(everything: bool) -> float:
        leaves, base = injection.partition(model, everything=everything)
        grad = jax.grad(lambda leaves, base: loss_of(injection.combine(leaves, base), x)[0])
        return jax.jit(grad).lower(leaves, base).compile().cost_analysis()["flops"]

    adapters_alone, everything = flops(False), flops(True)
    # The first of the three layers passes no gradient on: 2 N + 2/3 * 2 N, factors, and tanh.
    assert adapters_alone <= 3.7 * unit
    assert everything >= 5 * unit


class Shared(nnx.Module):
    """One layer, used twice and held under two names."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.second = self.first

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x)))


def test_a_shared_layer_is_adapted_once() -> None:
    model = Shared(nnx.Rngs(0))
    x = jnp.linspace(-1, 1, 8).reshape(2, 4)
    jlora.inject(model, RANDOM_B, rngs=nnx.Rngs(0))
    factors, base = jlora.partition(model)
    assert list(factors) == ["first/lora_a", "first/lora_b"]
    assert injection.count(model) == (2 * 4 * 4, 2 * 4 * 4 + 4 * 4 + 4)
    kernel = model.first.kernel[...] + 2.0 * factors["first/lora_a"].T @ factors["first/lora_b"]
    expected = jnp.tanh(x @ kernel) @ kernel  # the bias starts at zero
    np.testing.assert_allclose(model(x), expected, rtol=1e-5)
    again = jlora.combine(factors, base)
    assert again.first is again.second
    jlora.eject(model)
    assert type(model.first) is nnx.Linear
    assert model.first is model.second


def test_injecting_twice_is_an_error_and_changes_nothing() -> None:
    model = jlora.inject(Mlp(nnx.Rngs(0)), RANDOM_B, rngs=nnx.Rngs(0))
    graphdef, (factors, _) = nnx.graphdef(model), jlora.partition(model)
    with pytest.raises(JloraError, match=r"holds adapters already: jlora\.eject\(model\)"):
        jlora.inject(model, CONFIG, rngs=nnx.Rngs(1))
    assert nnx.graphdef(model) == graphdef
    assert_same(jlora.partition(model)[0], factors)


class Wrapper:
    """As transformers' FlaxPreTrainedModel: a module and its parameters."""

    module, params = None, None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (3, r"expected a Flax module, got int"),
        (Wrapper(), r"Wrapper wraps a Flax module: pass its \.module"),
    ],
)
def test_what_is_no_module_is_refused(what: Any, message: str) -> None:
    for call in (
        lambda: jlora.inject(what, CONFIG, rngs=nnx.Rngs(0)),
        lambda: jlora.partition(what),
        lambda: jlora.summary(what),
    ):
        with pytest.raises(JloraError, match=message):
            call()
