"""What `merge` makes of quantised Linen trees: boxes as before, each weight rounded once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from transform_cases import quick  # noqa: F401

import jlora
from jlora.injection import params as trees
from jlora.quant.array import QuantArray

pytestmark = pytest.mark.usefixtures("strict_promotion", "quick")

X = jnp.linspace(-1, 1, 3 * 64).reshape(3, 64)
PARTITIONED = {"plain": nn.with_partitioning, "logical": nn.with_logical_partitioning}


class Layer(nn.Module):
    """Of one name for each axis but those that a quantised weight cannot be divided by."""

    boxes: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def init(*names: str | None) -> Any:
            return PARTITIONED[self.boxes](nn.initializers.lecun_normal(), names)

        heads: Any = nn.DenseGeneral((4, 16), kernel_init=init("embed", "heads", None), name="q")
        out: Any = nn.DenseGeneral(
            64, axis=(-2, -1), kernel_init=init("heads", None, "embed"), name="o"
        )
        x = out(heads(x))
        x = nn.Einsum((64, 4, 16), "bd,dnh->bnh", kernel_init=init(None, "n", None), name="e")(x)
        x = nn.Einsum((4, 32, 16), "bnh,nfh->bnf", kernel_init=init("n", "f", None), name="x")(x)
        return nn.Dense(64, kernel_init=init(None, "d"), name="d")(x[:, 0])


class Scanned(nn.Module):
    boxes: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan: Any = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(Layer(self.boxes, name="layers"), x, None)[0]


@pytest.mark.parametrize("adapted", [".*", r".*\.d"], ids=["all", "one"])
@pytest.mark.parametrize("boxes", PARTITIONED)
@pytest.mark.parametrize("model", [Layer, Scanned])
def test_boxes_are_those_of_the_float_tree(model: Any, boxes: str, adapted: str) -> None:
    target = adapted if model is Scanned or adapted == ".*" else "d"
    config = jlora.LoraConfig(r=2, target_modules=target, init_lora_weights=False)
    module = jlora.inject(model(boxes), config)
    tree = module.init(jax.random.key(0), X)["params"]
    quantised = jlora.quantize(module, params=tree)
    assert sum(isinstance(x, QuantArray) for x in trees.flatten(quantised).values()) == 5
    merged, expected = jlora.merge(module, quantised), jlora.merge(module, tree)
    assert jax.tree.structure(merged) == jax.tree.structure(expected)  # of boxes, names and all
    kernels = nn.get_partition_spec(merged)
    kernels = kernels.get("layers", kernels)
    assert kernels["q"]["kernel"][-3:] == ("embed", "heads", None)
    assert (kernels["x"]["kernel"][0] == "layers") == (model is Scanned)
    got, out = model(boxes).apply({"params": merged}, X), module.apply({"params": quantised}, X)
    np.testing.assert_allclose(got, out, rtol=1e-4, atol=1e-5)


class Bf16(nn.Module):
    """An embedding of which rows and factors are trained, before a layer."""

    @nn.compact
    def __call__(self, indices: jax.Array) -> jax.Array:
        kw: Any = {"param_dtype": jnp.bfloat16}
        return nn.Dense(64, name="dense", **kw)(nn.Embed(7, 64, name="embed", **kw)(indices))


def test_each_weight_is_rounded_once() -> None:
    config = jlora.LoraConfig(
        r=2, target_modules=("dense", "embed"), trainable_token_indices=(1, 4),
        init_lora_weights=False,
    )  # fmt: skip
    module = jlora.inject(Bf16(), config)
    tree = module.init(jax.random.key(0), jnp.arange(3))["params"]
    tree["embed"]["lora_tokens"] = jax.random.normal(jax.random.key(1), (2, 64))
    quant = jlora.QuantConfig(target_modules=("dense",))
    quantised = jlora.quantize(module, quant, params=tree)
    merged = jlora.merge(module, quantised)

    def update(leaves: Any) -> jax.Array:
        return 4 * jnp.einsum("ri,ro->io", leaves["lora_a"], leaves["lora_b"])  # alpha 8, r 2

    dense, embed = quantised["dense"], quantised["embed"]
    table = embed["embedding"].astype(jnp.float32) + update(embed)
    table = table.at[jnp.array([1, 4])].add(embed["lora_tokens"])
    kernel = dense["kernel"].dequantize(jnp.float32) + update(dense)
    for got, expected in (
        (merged["dense"]["kernel"], kernel),
        (merged["embed"]["embedding"], table),
    ):
        assert got.dtype == jnp.bfloat16
        differ = got != expected.astype(jnp.bfloat16)
        assert float(differ.mean()) < 0.005  # where products are summed in another order
