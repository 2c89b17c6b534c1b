"""Where an adapter could silently be lost, applied twice, or be another's: errors, or right."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora
from jlora.errors import JloraError

RANDOM = jlora.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)


class Mlp(nn.Module):
    width: int = 8
    lora_mult: float = 1.0

    def setup(self):
        self.a = nn.Dense(self.width)
        self.b = nn.Dense(8)

    def encode(self, x):
        return self.a(x) * self.lora_mult

    def __call__(self, x):
        return self.b(self.encode(x))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (8, 8))
        return nn.Dense(8)(x @ w)


class Outer(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(x)


def config(**changes):
    return dataclasses.replace(RANDOM, **changes)


def moved(tree):
    """Away from zero, everywhere."""
    return jax.tree.map(lambda leaf: leaf + 0.1, tree)


def test_fields_of_the_module_that_start_alike_are_kept():
    assert jlora.inject(Mlp(lora_mult=5.0), RANDOM).lora_mult == 5.0


def test_a_tree_of_another_rank_is_refused():
    tree = jlora.inject(Mlp(), config(r=4)).init(jax.random.key(0), X)
    with pytest.raises(
        JloraError, match=r"a/lora_a is \(4, 8\), where the configuration .* \(8, 8\)"
    ):
        jlora.inject(Mlp(), config(r=8)).apply(tree, X)


def test_merge_knows_when_it_has_not_seen_every_layer():
    injected = jlora.inject(Mlp(), RANDOM)
    params = injected.init(jax.random.key(0), X)["params"]
    again = jlora.inject(Mlp(), RANDOM)
    with pytest.raises(JloraError, match="has not been traced in this process"):
        jlora.merge(again, params)
    again.apply({"params": params}, X, method="encode")
    with pytest.raises(JloraError, match="the layers of b/lora_a have not been met"):
        jlora.merge(again, params)
    again.apply({"params": params}, X)
    merged = jlora.merge(again, params)
    np.testing.assert_allclose(
        Mlp().apply({"params": merged}, X), injected.apply({"params": params}, X), atol=1e-5
    )


@pytest.mark.parametrize("params", [None, {"params": {}}])
def test_merge_of_a_linen_module_takes_its_parameters(params):
    with pytest.raises(JloraError, match="merge needs the tree of parameters"):
        jlora.merge(jlora.inject(Mlp(), RANDOM), params)


def test_what_needs_init_and_apply_says_so():
    whole = jlora.inject(Mlp(), config(bias="all"))
    variables = moved(whole.init(jax.random.key(0), X))
    message = "need the injected module's own init and apply"
    with pytest.raises(JloraError, match=message):
        whole.bind(variables)(X)
    with pytest.raises(JloraError, match=message):
        Outer(whole).init(jax.random.key(0), X)
    plain = jlora.inject(Plain(), RANDOM)
    with pytest.raises(JloraError, match=message):
        plain.bind(moved(plain.init(jax.random.key(0), X)))(X)
    with pytest.raises(JloraError, match="target_modules: 'typo'; nearest: a, b"):
        Outer(jlora.inject(Mlp(), config(target_modules=("a", "typo")))).init(jax.random.key(0), X)


def test_plain_parameters_within_another_module_are_named(caplog):
    Outer(jlora.inject(Plain(), RANDOM)).init(jax.random.key(0), X)
    assert "w: weights in plain parameters are not adapted in a module within" in caplog.text


def test_an_injected_module_within_another_has_its_factors():
    outer = Outer(jlora.inject(Mlp(), RANDOM))
    params = outer.init(jax.random.key(0), X)["params"]
    assert set(params["inner"]["a"]) == {"kernel", "bias", "lora_a", "lora_b"}
    own = jlora.inject(Mlp(), RANDOM).apply({"params": params["inner"]}, X)
    np.testing.assert_array_equal(outer.apply({"params": params}, X), own)


def test_parameters_that_come_back_are_those_that_were_given():
    whole = jlora.inject(Mlp(), config(bias="all"))
    variables = moved(whole.init(jax.random.key(0), X))
    with pytest.raises(JloraError, match="apply with mutable parameters"):
        whole.apply(variables, X, mutable=True)
    whole.apply(variables, X, mutable=["batch_stats"])


def test_adapters_for_no_layer_of_a_tree():
    with pytest.raises(JloraError, match="the tree has no place for c/lora_a"):
        jlora.combine({"c/lora_a": X}, {"a": {"kernel": X}})


def test_modules_called_like_leaves_are_no_adapters():
    tree = {"lora_block": {"kernel": jnp.asarray([-0.0, 1.0]), "lora_a": jnp.ones(2)}}
    tx = jlora.optimizer(optax.sgd(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
    after = optax.apply_updates(tree, updates)
    np.testing.assert_array_equal(
        np.signbit(after["lora_block"]["kernel"]), [True, False]
    )  # not a bit of the base changes
    np.testing.assert_array_equal(after["lora_block"]["lora_a"], jnp.zeros(2))


def test_a_head_that_holds_layers_is_saved_as_a_whole():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(8, 8, rngs=rngs)
            self.head = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs))

        def __call__(self, x):
            return self.head(self.a(x))

    model = jlora.inject(Model(nnx.Rngs(0)), config(modules_to_save=["head"]), rngs=nnx.Rngs(1))
    adapters, _ = jlora.partition(model)
    assert set(adapters) == {
        "a/lora_a",
        "a/lora_b",
        *(f"head/layers/{i}/{name}" for i in (0, 1) for name in ("kernel", "bias")),
    }


def test_a_layer_with_a_call_of_its_own_is_refused():
    class Tripled(nnx.Linear):
        def __call__(self, x):
            return 3 * super().__call__(x)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = Tripled(8, 8, rngs=rngs)

    with pytest.raises(
        JloraError, match=r"layer: Tripled overrides __call__ of Linear; .*register"
    ):
        jlora.inject(Model(nnx.Rngs(0)), RANDOM, rngs=nnx.Rngs(1))


def test_a_shared_parameter_is_not_trained_at_one_place_alone():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
            self.c = nnx.Linear(8, 8, rngs=rngs)
            self.b.kernel = self.a.kernel

    with pytest.raises(JloraError, match="a/kernel and b/kernel are one parameter"):
        jlora.inject(
            Model(nnx.Rngs(0)),
            config(target_modules=("c",), modules_to_save=["a"]),
            rngs=nnx.Rngs(1),
        )


def test_a_mask_of_a_convolution_holds_for_its_adapter():
    mask = jnp.ones((3, 4, 4)).at[2].set(0)
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 4)), jnp.float32)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 4, (3,), mask=mask, rngs=rngs)

        def __call__(self, x):
            return self.conv(x)

    model = jlora.inject(Model(nnx.Rngs(0)), RANDOM.__class__(
        r=2, lora_alpha=4, target_modules=("conv",), init_lora_weights=False
    ), rngs=nnx.Rngs(1))  # fmt: skip
    np.testing.assert_allclose(jlora.merge(model)(inputs), model(inputs), atol=1e-5)
    later = inputs.at[:, 3:].set(0)
    np.testing.assert_array_equal(model(inputs)[:, :3], model(later)[:, :3])


class NnxPlain(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(rngs.normal((8, 8)))

    def __call__(self, x, other=None):
        x = x @ self.w[...]
        return x if other is None else x - other(x)


def test_a_teacher_within_a_student_keeps_its_own_adapter():
    student, teacher = (
        jlora.inject(NnxPlain(nnx.Rngs(i)), RANDOM, rngs=nnx.Rngs(i), inputs=(X,)) for i in (0, 1)
    )
    expected = student(X) - teacher(student(X))
    np.testing.assert_allclose(student(X, teacher), expected, rtol=1e-5)
    np.testing.assert_allclose(student(X, lambda x: teacher(x)), expected, rtol=1e-5)


def test_a_scan_that_does_not_slice_the_scalings_is_an_error():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(lambda r: nnx.Linear(8, 8, rngs=r))(rngs.split(4))

        def __call__(self, x):
            axes = nnx.StateAxes({nnx.Param: 0, ...: None})
            scan = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry
            )
            return scan(x, self.layers)

    model = Model(nnx.Rngs(0))
    before = model(X)
    jlora.inject(model, config(rank_pattern={r"layers\.0": 2}), rngs=nnx.Rngs(1))
    with pytest.raises(JloraError, match="the scan over it does not slice the scalings"):
        model(X)
    jlora.eject(model)
    jlora.inject(model, RANDOM, rngs=nnx.Rngs(1))
    assert np.abs(model(X) - before).max() > 1e-3
    np.testing.assert_allclose(jlora.merge(model)(X), model(X), atol=1e-5)


def test_all_linear_takes_no_convolution_of_an_unknown_type():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.ConvTranspose(3, (3,))(x))

    inputs = jnp.ones((1, 6, 2))
    plan = jlora.plan_targets(Model(), RANDOM, inputs)
    assert [target.site.path for target in plan.targets] == ["Dense_0"]
    named = jlora.plan_targets(Model(), config(target_modules=("ConvTranspose_0",)), inputs)
    assert [target.site.kind for target in named.targets] == ["other"]


def test_a_tree_without_factors_says_how_to_get_them():
    params = Mlp().init(jax.random.key(0), X)["params"]
    with pytest.raises(JloraError, match=r"a has no lora_a: .*jlora\.combine\(adapters, params\)"):
        jlora.inject(Mlp(), RANDOM).apply({"params": params}, X)


@pytest.mark.parametrize("call", [jlora.partition, jlora.summary])
def test_all_variables_are_no_parameters(call):
    variables = jlora.inject(Mlp(), RANDOM).init(jax.random.key(0), X)
    with pytest.raises(JloraError, match=r'give variables\["params"\]'):
        call(variables)


def test_a_linen_module_is_planned_with_its_inputs():
    with pytest.raises(JloraError, match="give plan_targets its inputs"):
        jlora.plan_targets(Mlp(), RANDOM)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("all_linear", "did you mean 'all-linear'"),
        (["layer/a"], r"names have dots: 'layer\.a'"),
        (["w"], "w is there, but .* where `inputs` are given"),
    ],
)
def test_patterns_that_nearly_match(pattern, message):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(8, 8, rngs=rngs)
            self.w = nnx.Param(jnp.ones((8, 8)))

    with pytest.raises(JloraError, match=message):
        jlora.plan_targets(Model(nnx.Rngs(0)), config(target_modules=pattern))
