"""Models whose own code reads the weights of their layers, and what they are given."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jlora
from jlora import injection
from jlora.errors import JloraError

RANDOM = {"r": 2, "init_lora_weights": False}
IDS = jnp.asarray([[1, 4, 2], [0, 6, 6]])
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.float32)


def assert_close(got: Any, expected: Any) -> None:
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


class Holder(nnx.Module):
    """Kernels and a table that the model multiplies and indexes itself; layers in a stack too."""

    def __init__(self, rngs: nnx.Rngs):
        self.emb = nnx.Embed(7, 8, rngs=rngs)
        keys = nnx.Rngs(params=jax.random.split(rngs.params(), 3))
        self.layers = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))(keys)
        self.down = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        def layer(h: jax.Array, layer: nnx.Linear) -> jax.Array:
            return jnp.tanh(jnp.einsum("bti,io->bto", h, layer.kernel[...]) + layer.bias[...])

        scan = nnx.scan(nnx.remat(layer), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        h = scan(jnp.take(self.emb.embedding, ids, axis=0), self.layers)
        return self.down(h) @ self.emb.embedding.T

    def encode(self, ids: jax.Array) -> jax.Array:
        return self.emb(ids)

    def project(self, ids: jax.Array) -> jax.Array:
        return self.emb(ids) @ self.down.kernel.T


class LinenBlock(nn.Module):
    def setup(self) -> None:
        self.dense = nn.Dense(8, use_bias=False)

    def __call__(self, h: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(self.dense(h) + h @ self.dense.variables["params"]["kernel"]), None


class LinenHolder(nn.Module):
    def setup(self) -> None:
        self.emb, self.down = nn.Embed(7, 8), nn.Dense(8)
        self.stack = nn.scan(
            nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )()

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.stack(self.down(self.emb(ids)), None)[0] @ self.emb.embedding.T

    def encode(self, ids: jax.Array) -> jax.Array:
        return self.emb(ids)

    def project(self, ids: jax.Array) -> jax.Array:
        return self.emb(ids) @ self.get_variable("params", "down")["kernel"]


@pytest.mark.parametrize("inputs", [None, (IDS,)], ids=["without inputs", "with inputs"])
def test_nnx_merge_equals_the_call(inputs: Any) -> None:
    model = Holder(nnx.Rngs(0))
    methods = ("__call__", "encode", "project")
    before = {name: getattr(model, name)(IDS) for name in methods}
    config = jlora.LoraConfig(target_modules=("emb", "layers", "down"), **RANDOM)
    jlora.inject(model, config, rngs=nnx.Rngs(1), inputs=inputs)
    merged = jlora.merge(model)
    for name in methods:
        assert np.abs(getattr(model, name)(IDS) - before[name]).max() > 0.01
        assert_close(getattr(model, name)(IDS), getattr(merged, name)(IDS))
        jitted = nnx.jit(lambda m, x, name=name: getattr(m, name)(x))
        assert_close(jitted(model, IDS), getattr(merged, name)(IDS))
    adapters, base = jlora.partition(model)
    grads = jax.grad(lambda a: (jlora.combine(a, base)(IDS) ** 2).sum())(adapters)
    assert len(grads) == 6
    assert all(np.abs(grad).max() > 0 for grad in grads.values())


def test_linen_merge_equals_the_call() -> None:
    config = jlora.LoraConfig(target_modules=("emb", "dense", "down"), **RANDOM)
    module = jlora.inject(LinenHolder(), config)
    params = module.init(jax.random.key(0), IDS)["params"]
    merged, (adapters, base) = jlora.merge(module, params), jlora.partition(params)
    plain = injection.params.unflatten(base.rest)
    for method in (None, "encode", "project"):
        own, got, expected = (
            m.apply({"params": p}, IDS, method=method)
            for m, p in ((LinenHolder(), plain), (module, params), (LinenHolder(), merged))
        )
        assert np.abs(got - own).max() > 0.01
        assert_close(got, expected)
    again = jlora.inject(LinenHolder(), config)  # of a process that has made no tree
    assert_close(again.apply({"params": params}, IDS), LinenHolder().apply({"params": merged}, IDS))

    def loss(adapters: Any) -> jax.Array:
        return (module.apply({"params": jlora.combine(adapters, base)}, IDS) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(adapters)
    assert len(grads) == 6
    assert all(np.abs(grad).max() > 0 for grad in grads.values())


def test_a_table_given_to_another_layer_as_its_kernel(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def setup(self) -> None:
            self.emb, self.head = nn.Embed(7, 8), nn.Dense(7, use_bias=False)

        def __call__(self, ids: jax.Array) -> jax.Array:
            h = self.emb(ids)
            kernel = self.emb.variables["params"]["embedding"].T
            return self.head.apply({"params": {"kernel": kernel}}, h)

    module = jlora.inject(Tied(), jlora.LoraConfig(target_modules=("emb",), **RANDOM))
    params = module.init(jax.random.key(0), IDS)["params"]
    got, merged = module.apply({"params": params}, IDS), jlora.merge(module, params)
    assert_close(got, Tied().apply({"params": merged}, IDS))
    with pytest.raises(JloraError, match=r"the model's own code multiplies"):
        jlora.export_peft(tmp_path, module, module.lora.config, params=params)


def test_trained_rows_of_a_table_that_the_model_indexes() -> None:
    model = Holder(nnx.Rngs(0))
    config = jlora.LoraConfig(target_modules=("down",), trainable_token_indices=(1, 6), r=2)
    jlora.inject(model, config, rngs=nnx.Rngs(1))
    before = model(IDS)
    model.emb.lora_tokens[...] = jnp.ones((2, 8))
    assert np.abs(model(IDS) - before).max() > 0.1
    assert_close(model(IDS), jlora.merge(model)(IDS))


def test_a_table_that_the_model_multiplies_is_none_of_peft(tmp_path: Path) -> None:
    config = jlora.LoraConfig(target_modules=("emb",), **RANDOM)
    model = jlora.inject(Holder(nnx.Rngs(0)), config, rngs=nnx.Rngs(1), inputs=(IDS,))
    with pytest.raises(JloraError, match=r"emb: .*the model's own code multiplies"):
        jlora.export_peft(tmp_path, model, config)


def test_dropout_where_the_models_code_reads_the_weight_is_refused() -> None:
    config = jlora.LoraConfig(target_modules=("layers",), lora_dropout=0.5, **RANDOM)
    model = jlora.inject(Holder(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    with pytest.raises(JloraError, match="layers: the model's own code uses the weight"):
        model(IDS)
    model.eval()
    assert_close(model(IDS), jlora.merge(model)(IDS))


class Partly(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.w, self.pos = nnx.Param(rngs.normal((8, 8))), nnx.Param(rngs.normal((1, 8)))
        self.used, self.idle = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.used((x + self.pos[...]) @ self.w[...])

    def other(self, x: jax.Array) -> jax.Array:
        return self.idle(x)


def test_what_is_left_out_and_what_is_not_used_is_said_once() -> None:
    model = jlora.inject(Partly(nnx.Rngs(0)), jlora.LoraConfig(r=2), rngs=nnx.Rngs(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.other(X)  # a part of the model alone is no reason to warn
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(X)
    texts = [str(warning.message) for warning in said]
    assert any(text.startswith("idle: the weight is not used by this call") for text in texts)
    assert any("are not adapted: w. They are found where inject is given" in t for t in texts)
    assert len(texts) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nnx.jit(lambda model: model(X))(model)
    with pytest.warns(UserWarning, match="idle: the weight is not used"):
        jlora.inject(Partly(nnx.Rngs(0)), jlora.LoraConfig(r=2), rngs=nnx.Rngs(1), inputs=(X,))


class Cache(nnx.Module):
    def __init__(self) -> None:
        self.k, self.at = nnx.Cache(jnp.zeros((2, 8))), nnx.Cache(jnp.zeros((), jnp.int32))


@dataclasses.dataclass
class Context:
    cache: Cache
    name: str = "of no pytree"


class Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(rngs.normal((8, 8)))

    def __call__(self, x: jax.Array, given: Any, rngs: nnx.Rngs) -> Any:
        cache = injection.nnx_model.stateful(given)[0]
        cache = cache[0] if isinstance(cache, nnx.List) else cache
        y = x @ self.w[...] + cache.k[...] + rngs.normal(x.shape)
        cache.k[...] = y
        cache.at[...] += 1
        return y, cache


@pytest.mark.parametrize(
    "wrap",
    [
        lambda c: c,
        lambda c: [c],
        lambda c: {"layers": (None, [c])},
        lambda c: nnx.List([c]),
        Context,
        lambda c: [Context(c)],
    ],
    ids=["module", "list", "dict", "nnx.List", "dataclass", "nested"],
)
def test_what_a_call_changes_in_its_arguments_is_written(wrap: Any) -> None:
    ran = []
    for adapted in (False, True):
        model, cache, rngs = Decoder(nnx.Rngs(0)), Cache(), nnx.Rngs(3)
        if adapted:
            inputs = (X, wrap(Cache()), nnx.Rngs(0))
            jlora.inject(model, jlora.LoraConfig(r=2), rngs=nnx.Rngs(1), inputs=inputs)
        outs = [model(X, wrap(cache), rngs) for _ in range(3)]
        assert all(out is cache for _, out in outs)
        ran.append([outs[-1][0], cache.k[...], cache.at[...], rngs.default.count[...]])
    for one, other in zip(*ran, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("names", [("embed", "kv"), ("embed",), ()])
@pytest.mark.parametrize("with_names", [nn.with_logical_partitioning, nn.with_partitioning])
def test_partition_names_may_be_fewer_than_axes(with_names: Any, names: Any) -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            init = with_names(nn.initializers.xavier_uniform(), names)
            return nn.MultiHeadDotProductAttention(2, use_bias=False, kernel_init=init)(x)

    module = jlora.inject(Model(), jlora.LoraConfig(r=2))
    params = jax.eval_shape(module.init, jax.random.key(0), X[None])["params"]
    query = params["MultiHeadDotProductAttention_0"]["query"]
    padded = (*names, None, None, None)
    assert query["lora_a"].names == (None, padded[0])
    assert query["lora_b"].names == (None, *padded[1:3])


def test_a_linen_module_in_nnx_and_the_other_way_round() -> None:
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(4)(nn.relu(nn.Dense(8)(x)))

    bridged = nnx.bridge.ToNNX(Linen(), rngs=nnx.Rngs(0)).lazy_init(X)
    graphdef, before = nnx.graphdef(bridged), bridged(X)
    jlora.inject(bridged, jlora.LoraConfig(**RANDOM), rngs=nnx.Rngs(1), inputs=(X,))
    assert len(jlora.partition(bridged)[0]) == 4
    assert np.abs(bridged(X) - before).max() > 0.1
    assert_close(bridged(X), jlora.merge(bridged)(X))
    assert nnx.graphdef(jlora.eject(bridged)) == graphdef

    class Inner(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layer = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layer(x)

    module = nnx.bridge.to_linen(Inner)
    adapted = jlora.inject(module, jlora.LoraConfig(**RANDOM))
    variables = adapted.init(jax.random.key(0), X)
    merged = {**variables, "params": jlora.merge(adapted, variables["params"])}
    assert_close(adapted.apply(variables, X), module.apply(merged, X))


def test_a_parameter_called_like_an_adapters_is_the_modules_own() -> None:
    class Model(nn.Module):
        name_of: str

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            scale = self.param(self.name_of, nn.initializers.ones, (8,))
            return nn.Dense(8)(x * scale) + self.param("bias", nn.initializers.zeros, (8,))

    module = jlora.inject(Model("lora_scale"), jlora.LoraConfig(r=1, bias="all"))
    params = module.init(jax.random.key(0), X)["params"]
    assert set(jlora.merge(module, params)) == {"lora_scale", "bias", "Dense_0"}
    assert injection.count(params) == (16 + 8 + 8, 8 + 8 + 64 + 8 + 16)
    for name in ("lora_a", "lora_tokens", "w_lora_b", "lora_added_bias"):
        with pytest.raises(JloraError, match=f"^{name}: parameters of the module itself"):
            jlora.inject(Model(name), jlora.LoraConfig(r=1)).init(jax.random.key(0), X)
