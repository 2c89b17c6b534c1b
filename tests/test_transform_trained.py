"""What is trained besides factors, dropout, optimisers over whole trees, sharding metadata."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, meta
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P
from transform_cases import quick  # noqa: F401

import jlora
from jlora import injection
from jlora.errors import JloraError
from jlora.injection import params as trees

pytestmark = pytest.mark.usefixtures("quick")

IDS = jnp.asarray([[3, 0, 6, 3], [1, 5, 2, 0]], jnp.int32)
CONFIG = jlora.LoraConfig(r=2, lora_alpha=6)


class LinenModel(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        kw = {"dtype": self.dtype, "param_dtype": self.dtype}
        embed = nn.Embed(7, 6, name="embed", **kw)
        x = nn.LayerNorm(name="norm", **kw)(embed(ids))
        x = jnp.tanh(nn.Dense(5, name="up", **kw)(x))
        return embed.attend(nn.Dense(6, name="down", **kw)(x))


class NnxModel(nnx.Module):
    def __init__(self, dtype: Any = jnp.float32):
        rngs = nnx.Rngs(0)
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(7, 6, **kw)
        self.norm = nnx.LayerNorm(6, **kw)
        self.up = nnx.Linear(6, 5, **kw)
        self.down = nnx.Linear(5, 6, **kw)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.norm(self.embed(ids))
        return self.embed.attend(self.down(jnp.tanh(self.up(x))))


FACTORS = 2 * (6 + 5) + 2 * (5 + 6)  # of up and down
TRAINED: dict[str, tuple[dict[str, Any], int]] = {
    "bias all": ({"bias": "all"}, FACTORS + 6 + 5 + 6),
    "bias lora_only": ({"bias": "lora_only", "target_modules": ("up",)}, 2 * (6 + 5) + 5),
    "modules": ({"modules_to_save": ("norm", "down")}, 2 * (6 + 5) + 2 * 6 + 5 * 6 + 6),
    "tokens": ({"trainable_token_indices": (1, 5)}, FACTORS + 2 * 6),
    "named tokens": ({"trainable_token_indices": {"embed": (1,)}}, FACTORS + 6),
    "all at once": (
        {"bias": "all", "modules_to_save": ("norm",), "trainable_token_indices": (3,)},
        FACTORS + 2 * 6 + 5 + 6 + 6,
    ),
}
each_trained = pytest.mark.parametrize(("changes", "count"), TRAINED.values(), ids=list(TRAINED))
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])


def loss_of(y: jax.Array) -> jax.Array:
    slopes = jnp.linspace(-1, 1, y.size, dtype=jnp.float32).reshape(y.shape)
    return (y.astype(jnp.float32) * slopes).sum()


def bits(leaves: Any) -> dict[str, np.ndarray]:
    return {path: np.array(leaf) for path, leaf in leaves.items()}


def assert_bits(got: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        assert got[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def assert_close(got: Any, expected: Any, dtype: Any) -> None:
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@dtypes
@each_trained
def test_linen_trains_them(changes: dict, count: int, dtype: Any) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    base, model = LinenModel(dtype), jlora.inject(LinenModel(dtype), config)
    tree = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    base_tree = jax.jit(base.init)(jax.random.key(0), IDS)["params"]
    factors, rest = jlora.partition(tree)
    before = bits(rest.rest)
    assert before.keys() == trees.flatten(base_tree).keys()
    assert injection.count(tree)[0] == count == sum(leaf.size for leaf in factors.values())
    assert jlora.plan_targets(base, config, IDS).parameters == count
    assert {leaf.dtype for leaf in factors.values()} == {jnp.dtype(jnp.float32)}
    plain = jax.jit(base.apply)({"params": trees.unflatten(rest.rest)}, IDS)
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply({"params": tree}, IDS), plain)

    @jax.jit
    def grad(tree: Any) -> Any:
        return jax.grad(lambda tree: loss_of(model.apply({"params": tree}, IDS)))(tree)

    tx = jlora.optimizer(optax.adamw(1e-2, weight_decay=0.1))
    state, update = tx.init(tree), jax.jit(tx.update)
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(sizes) == 2 * count  # two moments, and none of the base
    for _ in range(3):
        grads = grad(tree)
        updates, state = update(grads, state, tree)
        assert not any(leaf.any() for leaf in jlora.partition(updates)[1].rest.values())
        tree = optax.apply_updates(tree, updates)
    moved, rest = jlora.partition(tree)
    assert_bits(rest.rest, before)
    assert all(leaf.any() for leaf in jlora.partition(grads)[0].values())
    assert all(not np.array_equal(moved[path], leaf) for path, leaf in factors.items())
    merged = jlora.merge(model, tree)
    assert jax.tree.structure(merged) == jax.tree.structure(base_tree)
    out = apply({"params": tree}, IDS)
    assert not np.array_equal(out, plain)
    assert_close(base.apply({"params": merged}, IDS), out, dtype)


@dtypes
@each_trained
def test_nnx_trains_them(changes: dict, count: int, dtype: Any) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    model = NnxModel(dtype)
    graphdef, plain = nnx.graphdef(model), model(IDS)
    before = bits(injection.partition(model, everything=True)[0])
    assert jlora.plan_targets(model, config).parameters == count
    jlora.inject(model, config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(IDS), plain)
    factors, _ = jlora.partition(model)
    factors = bits(factors)
    assert injection.count(model)[0] == count == sum(leaf.size for leaf in factors.values())
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.LoRAParam)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grad = nnx.jit(nnx.grad(lambda model: loss_of(model(IDS)), argnums=wrt))
    for _ in range(3):
        optimizer.update(model, grad(model))
    moved, _ = jlora.partition(model)
    assert all(not np.array_equal(moved[path], leaf) for path, leaf in factors.items())
    out, merged = model(IDS), jlora.merge(model)
    assert not np.array_equal(out, plain)
    assert_close(merged(IDS), out, dtype)
    assert nnx.graphdef(merged) == graphdef
    np.testing.assert_array_equal(model(IDS), out)  # merging leaves it as it was
    jlora.eject(model)
    assert nnx.graphdef(model) == graphdef
    assert_bits(injection.partition(model, everything=True)[0], before)


class TestDropout:
    config = jlora.LoraConfig(r=2, lora_alpha=6, lora_dropout=0.5, init_lora_weights=False)

    def test_linen(self) -> None:
        model: Any = jlora.inject(LinenModel(), self.config)
        variables = model.init(jax.random.key(0), IDS)  # needs no stream of its own
        quiet = jlora.inject(LinenModel(), dataclasses.replace(self.config, lora_dropout=0.0))
        expected = quiet.apply(variables, IDS)
        with pytest.raises(JloraError, match=r"rngs=\{'dropout': key\}.*lora_deterministic=True"):
            model.apply(variables, IDS)
        draws = [model.apply(variables, IDS, rngs={"dropout": jax.random.key(i)}) for i in (0, 1)]
        assert not np.array_equal(draws[0], draws[1])
        assert not np.array_equal(draws[0], expected)
        off = model.clone(lora_deterministic=True)
        np.testing.assert_array_equal(off.apply(variables, IDS), expected)
        off = jlora.inject(LinenModel(), self.config, training=False)
        np.testing.assert_array_equal(off.apply(variables, IDS), expected)

    def test_nnx(self) -> None:
        model = jlora.inject(NnxModel(), self.config, rngs=nnx.Rngs(0))
        config = dataclasses.replace(self.config, lora_dropout=0.0)
        quiet = jlora.inject(NnxModel(), config, rngs=nnx.Rngs(0))
        expected = quiet(IDS)
        assert not np.array_equal(model(IDS), model(IDS))
        model.eval()
        np.testing.assert_array_equal(model(IDS), expected)
        off = jlora.inject(NnxModel(), self.config, rngs=nnx.Rngs(0), training=False)
        np.testing.assert_array_equal(off(IDS), expected)

    def test_linen_init_of_a_model_that_draws(self) -> None:
        class Model(nn.Module):
            @nn.compact
            def __call__(self, ids: jax.Array) -> jax.Array:
                x = nn.Embed(7, 6)(ids)
                x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
                return nn.Dropout(0.5, deterministic=False)(x)

        config = dataclasses.replace(self.config, target_modules=".*")
        streams = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        variables = jlora.inject(Model(), config).init(streams, IDS)
        assert variables.keys() == {"params", "batch_stats"}
        tree = variables["params"]
        assert {path for path in trees.flatten(tree) if path.endswith("lora_a")} == {
            "Embed_0/lora_a", "Dense_0/lora_a"
        }  # fmt: skip
        bare = jlora.inject(LinenModel(), config).init(jax.random.key(0), IDS)
        assert "lora_a" in bare["params"]["embed"]

    def test_linen_keeps_the_mean(self) -> None:
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return nn.Dense(3)(x)

        model = jlora.inject(Model(), self.config)
        x = jnp.broadcast_to(jnp.linspace(-1, 1, 8), (20_000, 8))
        variables = model.init(jax.random.key(0), x)
        drawn = np.asarray(model.apply(variables, x, rngs={"dropout": jax.random.key(1)}))
        mean = model.clone(lora_deterministic=True).apply(variables, x[:1])
        error = drawn.std(axis=0) / np.sqrt(len(drawn))
        assert (error > 0).all()
        assert (np.abs(drawn.mean(axis=0) - np.asarray(mean)[0]) < 5 * error).all()


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_rslora_scales_by_the_root_of_the_rank(flavour: str) -> None:
    root = jlora.LoraConfig(r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False)
    same = dataclasses.replace(root, use_rslora=False, lora_alpha=12)  # 6 / 2 = 12 / 4
    outs = []
    for config in (root, same, dataclasses.replace(same, lora_alpha=6)):
        if flavour == "linen":
            model = jlora.inject(LinenModel(), config)
            outs.append(model.apply(model.init(jax.random.key(0), IDS), IDS))
        else:
            outs.append(jlora.inject(NnxModel(), config, rngs=nnx.Rngs(0))(IDS))
    np.testing.assert_array_equal(outs[0], outs[1])
    assert not np.array_equal(outs[0], outs[2])


def test_optimizer_within_multi_steps_and_train_state() -> None:
    model = jlora.inject(LinenModel(), CONFIG)
    tree = model.init(jax.random.key(0), IDS)["params"]
    before, first = bits(jlora.partition(tree)[1].rest), bits(jlora.partition(tree)[0])
    every = optax.MultiSteps(jlora.optimizer(optax.adamw(1e-2)), every_k_schedule=2)
    inner = jlora.optimizer(optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=2))
    for tx in (every, inner):
        state: Any = TrainState.create(apply_fn=model.apply, params=tree, tx=tx)

        @jax.jit
        def step(state: Any) -> Any:
            loss = lambda tree: loss_of(state.apply_fn({"params": tree}, IDS))  # noqa: E731
            return state.apply_gradients(grads=jax.grad(loss)(state.params))

        state = step(state)
        assert_bits(jlora.partition(state.params)[0], first)  # not yet
        state = step(state)
        moved, rest = jlora.partition(state.params)
        assert_bits(rest.rest, before)
        assert not np.array_equal(moved["up/lora_b"], first["up/lora_b"])


class TestPartition:
    def test_trees(self) -> None:
        tree = jlora.inject(LinenModel(), CONFIG).init(jax.random.key(0), IDS)["params"]
        for given in (tree, FrozenDict(tree)):
            factors, base = jlora.partition(given)
            again = jlora.combine(factors, base)
            assert type(again) is type(given)
            assert jax.tree.structure(again) == jax.tree.structure(given)
            assert list(trees.flatten(again)) == list(trees.flatten(given))
            for leaf, other in zip(jax.tree.leaves(again), jax.tree.leaves(given), strict=True):
                assert leaf is other

    def test_boxes_and_a_frozen_dict_through_a_step(self) -> None:
        model = jlora.inject(Annotated(), CONFIG)
        tree = FrozenDict(model.init(jax.random.key(0), jnp.ones((2, 6)))["params"])
        factors, base = jlora.partition(tree)
        assert isinstance(factors["dense/lora_a"], nn.Partitioned)
        again = jlora.combine(factors, base)
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        tx = jlora.optimizer(optax.sgd(0.1))
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
        moved, rest = jlora.partition(updates)
        assert all(meta.unbox(leaf).all() for leaf in moved.values())
        assert not any(meta.unbox(leaf).any() for leaf in rest.rest.values())


# Sharding metadata.


def init(names: tuple[str, ...], logical: bool = False) -> Any:
    box = nn.with_logical_partitioning if logical else nn.with_partitioning
    return box(nn.initializers.lecun_normal(), names)


class Annotated(nn.Module):
    logical: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(5, name="dense", kernel_init=init(("in", "out"), self.logical))(x)
        heads = init(("embed", "heads", "size"), self.logical)
        return nn.DenseGeneral((2, 3), name="heads", kernel_init=heads)(x)


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(name="stack")(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return nn.Dense(6, name="dense", kernel_init=init(("in", "out")))(x), None


@pytest.mark.parametrize("logical", [False, True])
def test_linen_factors_have_the_names_of_their_axes(logical: bool) -> None:
    model, x = jlora.inject(Annotated(logical), CONFIG), jnp.ones((2, 6))
    variables = model.init(jax.random.key(0), x)
    specs = nn.get_partition_spec(variables)["params"]
    assert specs["dense"]["lora_a"] == P(None, "in")
    assert specs["dense"]["lora_b"] == P(None, "out")
    assert specs["heads"]["lora_a"] == P(None, "embed")
    assert specs["heads"]["lora_b"] == P(None, "heads", "size")
    assert type(variables["params"]["dense"]["lora_a"]) is (
        nn.LogicallyPartitioned if logical else nn.Partitioned
    )
    np.testing.assert_array_equal(model.apply(nn.unbox(variables), x), model.apply(variables, x))
    merged = jlora.merge(model, variables["params"])
    assert nn.get_partition_spec(merged)["dense"]["kernel"] == P("in", "out")


def test_linen_stacked_factors_have_the_name_of_the_stack() -> None:
    model = jlora.inject(Stacked(), CONFIG)
    tree = model.init(jax.random.key(0), jnp.ones((2, 6)))["params"]
    specs = nn.get_partition_spec(tree)["stack"]["dense"]
    assert specs["kernel"] == P("layers", "in", "out")
    assert specs["lora_a"] == P("layers", None, "in")
    assert specs["lora_b"] == P("layers", None, "out")
    for leaf in trees.flatten(tree).values():
        if isinstance(leaf, nn.Partitioned):
            assert len(leaf.names) == leaf.value.ndim


def test_nnx_factors_have_the_names_of_their_axes() -> None:
    class Model(nnx.Module):
        def __init__(self):
            self.layer = nnx.LinearGeneral(6, (2, 3), rngs=nnx.Rngs(0))
            self.layer.kernel = nnx.Param(
                self.layer.kernel[...],
                out_sharding=("embed", "heads", None),
                eager_sharding=False,
            )

    model = jlora.inject(Model(), CONFIG, rngs=nnx.Rngs(0))
    assert model.layer.lora_a.get_metadata()["out_sharding"] == (None, "embed")
    assert model.layer.lora_b.get_metadata()["out_sharding"] == (None, "heads", None)
