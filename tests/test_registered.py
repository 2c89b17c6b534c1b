"""Layer types of a user's own: what is registered of them is compared with what they do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from transform_cases import quick  # noqa: F401

import jlora
from jlora import injection
from jlora.errors import JloraError

pytestmark = pytest.mark.usefixtures("quick")

X = jnp.ones((3, 4))  # of a square weight, whose axes no shape tells apart
CONFIG = jlora.LoraConfig(r=2, lora_alpha=4, bias="lora_only")


class LinenOwn(nn.Module):
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        table = self.param("table", nn.initializers.normal(), (4, 4))
        table = table if self.scale == 1 else self.scale * table
        return x @ table.T + self.param("shift", nn.initializers.ones, (4,))


class LinenModel(nn.Module):
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, name="dense")(LinenOwn(self.scale, name="own")(x))


class NnxOwn(nnx.Module):
    def __init__(self, scale: float):
        self.table = nnx.Param(jax.random.normal(jax.random.key(0), (4, 4)))
        self.shift = nnx.Param(jnp.ones(4))
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        table = self.table[...] if self.scale == 1 else self.scale * self.table[...]
        return x @ table.T + self.shift[...]


class NnxModel(nnx.Module):
    def __init__(self, scale: float = 1.0):
        self.own = NnxOwn(scale)
        self.dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.own(x))


@pytest.fixture(params=["linen", "nnx"])
def flavour(request: pytest.FixtureRequest) -> Any:
    tables = injection.linen.REGISTRY, injection.nnx_sites.REGISTRY
    yield request.param
    for table, cls in zip(tables, (LinenOwn, NnxOwn), strict=True):
        table.pop(cls, None)


def register(flavour: str, **entry: Any) -> None:
    jlora.register(LinenOwn if flavour == "linen" else NnxOwn, **entry)


def run(flavour: str, scale: float = 1.0) -> dict[str, Any]:
    """Inject, call once, and give the trained leaves."""
    if flavour == "linen":
        params = jlora.inject(LinenModel(scale), CONFIG).init(jax.random.key(0), X)["params"]
        return jlora.partition(params)[0]
    model = jlora.inject(NnxModel(scale), CONFIG, rngs=nnx.Rngs(0))
    model(X)
    return jlora.partition(model)[0]


def test_the_bias_that_is_registered_is_trained(flavour: str) -> None:
    register(flavour, weight="table", equation="...i,oi->...o", bias="shift")
    added = "lora_added_" if flavour == "linen" else ""
    names = {"own/lora_a", "own/lora_b", f"own/{added}shift", f"dense/{added}bias"}
    assert set(run(flavour)) == names | {"dense/lora_a", "dense/lora_b"}


def test_a_wrong_equation_on_a_square_weight(flavour: str) -> None:
    register(flavour, weight="table", equation="...i,io->...o")
    with pytest.raises(
        JloraError,
        match=r"(Linen|Nnx)Own is registered as contracting axes \(0,\) of table \(4, 4\) with its "
        r"input, for the output's \(1,\); what its call does with it: contracts \(1,\)",
    ):
        run(flavour)


def test_a_weight_that_is_changed_before_it_is_used(flavour: str) -> None:
    register(flavour, weight="table", equation="...i,oi->...o")
    with pytest.raises(JloraError, match=r"what its call does with it: 'mul'\. Correct"):
        run(flavour, scale=2.0)


def test_a_name_that_the_layer_does_not_have(flavour: str) -> None:
    register(flavour, weight="tbl", equation="...i,oi->...o")
    with pytest.raises(JloraError, match=r"own: .*with the weight 'tbl', .*table, shift"):
        run(flavour)


@pytest.mark.parametrize(
    "equation", ["...i,io", "i,io->b", "...i,ii->...i", "x y", "...i,iox->...o", "...i,io->...o,"]
)
def test_what_is_no_equation(equation: str) -> None:
    with pytest.raises(JloraError, match="is no equation of input, weight and output"):
        jlora.register(NnxOwn, weight="table", equation=equation)


def linen_tree(config: jlora.LoraConfig) -> tuple[Any, Any]:
    module = jlora.inject(LinenModel(), config)
    return module, module.init(jax.random.key(0), X)["params"]


def test_a_tree_is_saved_and_loaded_with_its_module(tmp_path: Any) -> None:
    config = jlora.LoraConfig(r=2, lora_alpha=4, target_modules=("dense",))
    module, params = linen_tree(config)
    adapters, base = jlora.partition(params)
    params = jlora.combine({p: x + 1 for p, x in adapters.items()}, base)
    jlora.save_adapter(tmp_path / "a", module, config, params=params)
    fresh, tree = linen_tree(config)
    loaded = jlora.load_adapter(tmp_path / "a", fresh, params=tree)
    np.testing.assert_array_equal(
        fresh.apply({"params": loaded}, X), module.apply({"params": params}, X)
    )
    other, tree = linen_tree(jlora.LoraConfig(r=2, lora_alpha=8, target_modules=("dense",)))
    differs = r"dense has rank 2 and scaling 4.0 in the module, rank 2 and scaling 2.0 there"
    with pytest.raises(JloraError, match=differs):
        jlora.load_adapter(tmp_path / "a", other, params=tree)
    with pytest.raises(JloraError, match=differs):
        jlora.save_adapter(tmp_path / "b", other, config, params=tree)
    assert not (tmp_path / "b").exists()
    with pytest.raises(JloraError, match="a tree of parameters goes with its module"):
        jlora.save_adapter(tmp_path / "b", tree, config)
    with pytest.raises(JloraError, match="a tree of parameters goes with its module"):
        jlora.load_adapter(tmp_path / "a", tree)
