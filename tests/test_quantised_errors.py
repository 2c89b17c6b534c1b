"""What cannot be quantised, or cannot be computed with it, says so and where."""

import dataclasses
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
from jlora.quant.array import QuantArray

pytestmark = pytest.mark.usefixtures("quick")

X = jnp.ones((2, 64))
LORA = jlora.LoraConfig(r=2, target_modules=("dense",))
KINDS = ("nf4", "int8")


class NnxModel(nnx.Module):
    def __init__(self, **options: Any) -> None:
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(64, 64, rngs=rngs, **options)
        self.other = nnx.Linear(64, 64, rngs=rngs)
        self.embed = nnx.Embed(7, 64, rngs=rngs)
        self.conv = nnx.Conv(64, 64, (3,), rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.other(self.dense(x)))


class LinenModel(nn.Module):
    options: Any = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(64, name="dense", **self.options)(x)
        x = x + nn.Embed(7, 64, name="embed")(jnp.zeros(2, jnp.int32))
        x = nn.Conv(64, (3,), name="conv")(x[None])[0]
        return nn.LayerNorm(name="norm")(nn.Dense(64, name="other")(x))


def linen(module: nn.Module | None = None, config: jlora.LoraConfig = LORA) -> tuple[Any, Any]:
    model: Any = jlora.inject(module or LinenModel(), config)
    return model, model.init(jax.random.key(0), X)["params"]


def quantise(flavour: str, **config: Any) -> Any:
    if flavour == "nnx":
        return jlora.quantize(NnxModel(), jlora.QuantConfig(**config))
    model, tree = linen()
    return jlora.quantize(model, jlora.QuantConfig(**config), params=tree)


REFUSED = {
    ("dens",): r"QuantConfig matches nothing:\n  target_modules: 'dens'; nearest: dense",
    "dense|othr": None,
    "dens": r"QuantConfig matches nothing:\n  target_modules: 'dens'; nearest: dense",
    ("embed",): r"QuantConfig: embed is no linear layer, and only these are quantised",
    ("conv",): r"QuantConfig: conv is no linear layer, and only these are quantised",
    ("norm",): r"QuantConfig matches nothing:\n  target_modules: 'norm'; nearest: (conv|other)",
    ".*": r"(embed|conv) is no linear layer.*; (embed|conv) is no linear layer",
}


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
@pytest.mark.parametrize(("targets", "text"), REFUSED.items(), ids=map(str, REFUSED))
def test_patterns(flavour: str, targets: Any, text: str | None) -> None:
    if text is None:
        quantise(flavour, target_modules=targets)
        return
    with pytest.raises(JloraError, match=text):
        quantise(flavour, target_modules=targets)


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_exclusions(flavour: str) -> None:
    with pytest.raises(JloraError, match=r"QuantConfig matches nothing:\n  exclude.*'x'; nearest"):
        quantise(flavour, exclude_modules=("x",))
    with pytest.raises(JloraError, match=r"every targeted layer is excluded again"):
        quantise(flavour, target_modules=("dense",), exclude_modules=("dense",))


def classes(model: Any) -> list[type]:
    return [type(module) for _, module in nnx.iter_modules(model)]


def refuse_nnx(model: Any, text: str, **config: Any) -> None:
    """Demand an error that leaves the model as it was."""
    graphdef, state = nnx.graphdef(model), nnx.state(nnx.clone(model))
    with pytest.raises(JloraError, match=text):
        jlora.quantize(model, jlora.QuantConfig(**config))
    assert nnx.graphdef(model) == graphdef
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), state)


def test_quantising_twice() -> None:
    model = quantise("nnx", target_modules=("other",))
    refuse_nnx(model, r"^other is quantised already$")  # dense, before it, stays as it is
    module, tree = linen()
    tree = jlora.quantize(module, jlora.QuantConfig(), params=tree)
    with pytest.raises(JloraError, match=r"^dense is quantised already$"):
        jlora.quantize(module, jlora.QuantConfig(), params=tree)


def test_order_of_quantising_and_injecting() -> None:
    model = jlora.inject(NnxModel(), LORA, rngs=0)
    refuse_nnx(model, r"holds adapters already: quantise it first, then inject")
    with pytest.raises(JloraError, match=r"takes an injected Linen module and its tree: params="):
        jlora.quantize(LinenModel())
    module, tree = linen()
    with pytest.raises(JloraError, match=r"takes an injected Linen module and its tree: params="):
        jlora.quantize(module)
    with pytest.raises(JloraError, match=r'quantize needs the tree .*params=variables\["params"\]'):
        jlora.quantize(module, params={"params": tree})
    fresh = jlora.inject(LinenModel(), LORA)
    with pytest.raises(JloraError, match=r"not been traced in this process: jax\.eval_shape"):
        jlora.quantize(fresh, params=tree)


def own_dot(*args: Any, **kwargs: Any) -> jax.Array:
    kwargs.pop("out_sharding", None)
    return 2 * jax.lax.dot_general(*args, **kwargs)


@pytest.mark.parametrize("option", ["dot_general", "dot_general_cls", "promote_dtype"])
def test_a_layer_that_multiplies_in_a_way_of_its_own(option: str) -> None:
    value: Any = {"dot_general": own_dot, "dot_general_cls": lambda: own_dot}.get(option)
    text = rf"^dense: {option} of this (Linear|Dense) is one of its own.*exclude_modules"
    if option == "promote_dtype":
        value = lambda args, dtype: nnx.nn.dtypes.promote_dtype(args, dtype=dtype)  # noqa: E731
    if option != "dot_general_cls":
        refuse_nnx(NnxModel(**{option: value}), text)
    if option == "promote_dtype":
        value = lambda *args, dtype: nn.dtypes.promote_dtype(*args, dtype=dtype)  # noqa: E731
    module, tree = linen(LinenModel({option: value}))
    with pytest.raises(JloraError, match=text):
        jlora.quantize(module, params=tree)
    tree = jlora.quantize(module, jlora.QuantConfig(exclude_modules=("dense",)), params=tree)
    assert isinstance(tree["other"]["kernel"], QuantArray)
    assert isinstance(tree["dense"]["kernel"], jax.Array)


class Doubled(nnx.Linear):
    def __call__(self, inputs: jax.Array) -> jax.Array:  # type: ignore[override]
        return 2 * super().__call__(inputs)


def test_an_nnx_layer_with_a_call_of_its_own() -> None:
    model = NnxModel()
    model.other = Doubled(64, 64, rngs=nnx.Rngs(0))
    refuse_nnx(model, r"^other: Doubled overrides __call__ of Linear; say how .* jlora\.register")


def test_a_weight_that_is_used_elsewhere() -> None:
    model = NnxModel()
    model.other.kernel = model.dense.kernel
    refuse_nnx(model, r"^dense: its weight is also used by .*other/kernel.*exclude_modules")


def test_out_sharding_is_not_passed_over() -> None:
    model = quantise("nnx")
    with pytest.raises(JloraError, match=r"out_sharding of a quantised Linear is not supported"):
        model.dense(X, out_sharding=jax.P())


@pytest.mark.parametrize("options", [{"modules_to_save": ("other",)}], ids=str)
def test_what_is_trained_as_a_whole(options: dict) -> None:
    config = jlora.LoraConfig(r=2, target_modules=("dense",), **options)
    model = quantise("nnx")
    graphdef = nnx.graphdef(model)
    with pytest.raises(JloraError, match=r"^other/kernel: what is quantised cannot be trained"):
        jlora.inject(model, config, rngs=0)
    assert nnx.graphdef(model) == graphdef
    module, tree = linen(config=config)
    with pytest.raises(JloraError, match=r"^other/kernel is trained as a whole.*exclude_modules"):
        jlora.quantize(module, params=tree)
    quant = jlora.QuantConfig(exclude_modules=("other",))
    tree = jlora.quantize(module, quant, params=tree)
    assert module.apply({"params": tree}, X).shape == (2, 64)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_quantised_layers_are_trained(bias: Any) -> None:
    config = jlora.LoraConfig(r=2, target_modules=("dense", "other"), bias=bias)
    model = jlora.inject(quantise("nnx"), config, rngs=0)
    assert {"dense/bias", "other/bias"} <= jlora.partition(model)[0].keys()
    module, tree = linen(config=config)
    tree = jlora.quantize(module, params=tree)
    before = module.apply({"params": tree}, X)
    tree["other"]["lora_added_bias"] += jnp.arange(64.0)
    assert not np.allclose(before, module.apply({"params": tree}, X))


def test_layers_of_one_stack_are_quantised_all_or_none() -> None:
    class Stacked(nnx.Module):
        stacked_layers = ("layers",)

        def __init__(self) -> None:
            make = nnx.vmap(lambda rngs: nnx.List([nnx.Linear(64, 64, rngs=rngs)]))
            self.layers = make(nnx.Rngs(0).split(2))

    refuse_nnx(
        Stacked(),
        r"QuantConfig: layers/0: the layers of a stack are quantised all or none",
        target_modules=r"layers\.0\..*",
    )

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            axes: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            scan: Any = nn.scan(Layer, length=2, **axes)
            return scan(name="layers")(x, None)[0]

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return nn.Dense(64, name="dense")(x), None

    module, tree = linen(Scanned())
    config = jlora.QuantConfig(target_modules=r"layers\.dense\.0")
    with pytest.raises(JloraError, match=r"layers/dense: the layers of a stack are .* all or none"):
        jlora.quantize(module, config, params=tree)


def test_rows_of_an_embedding_beside_quantised_layers() -> None:
    config = jlora.LoraConfig(r=2, target_modules=("dense",), trainable_token_indices=(1,))
    with pytest.raises(JloraError, match="embed is no linear layer"):
        quantise("nnx", target_modules=("dense", "embed"))
    model = jlora.inject(quantise("nnx"), config, rngs=0)
    assert injection.partition(model)[0]["embed/lora_tokens"].shape == (1, 64)
