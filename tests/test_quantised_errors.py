"""What cannot be quantised, or cannot be computed with it, says so and where."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.errors import ScopeParamShapeError
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


# A quantised weight where an array is needed.


class Foreign(nnx.Module):
    """Reads the weight of a layer that it holds."""

    def __init__(self, use: Callable[..., Any]) -> None:
        self.dense = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        self.use = use

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.use(x, self.dense.kernel)


USES: dict[str, Callable[..., Any]] = {
    "kernel[...]": lambda x, k: x @ k[...],
    "@": lambda x, k: x @ k,
    "* 2": lambda x, k: x @ (k * 2),
    ".T": lambda x, k: x @ k.T,
    ".astype": lambda x, k: x @ k.astype(x.dtype),
    "jnp.dot": lambda x, k: jnp.dot(x, k),
    "jnp.dot of the value": lambda x, k: jnp.dot(x, k.get_value()),
    "einsum": lambda x, k: jnp.einsum("bi,io->bo", x, k.get_value()),
    "jnp.asarray": lambda x, k: jnp.asarray(k.get_value()),
    "numpy": lambda x, k: np.asarray(k.get_value()),
    "numpy of the variable": lambda x, k: np.asarray(k),
    "numpy @": lambda x, k: np.ones((2, 64)) @ k.get_value(),
    "jnp.where": lambda x, k: jnp.where(x[0] > 0, k.get_value(), 0),
    "stack": lambda x, k: jnp.stack([k.get_value()] * 2),
    "the class's own call": None,  # type: ignore[dict-item]
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("use", USES)
def test_foreign_code_gets_an_error_that_says_which_weight(kind: Any, jit: bool, use: str) -> None:
    config = jlora.QuantConfig(kind=kind)
    model = Foreign(USES[use])
    if USES[use] is None:
        model.use = lambda x, _: nnx.Linear.__call__(model.dense, x)
    jlora.quantize(model, config)
    run = nnx.jit(lambda model, x: model(x)) if jit and USES[use] else lambda model, x: model(x)
    with pytest.raises((JloraError, TypeError)) as error:
        run(model, X)
    assert f"QuantArray({kind}, shape=(64, 64), dtype=float32" in str(error.value)
    if isinstance(error.value, JloraError):
        assert "It is a quantised weight, not an array" in str(error.value)
    else:  # JAX's own words, where it asks for no attribute
        assert "QuantArray" in str(error.value)


class Own(nn.Module):
    """Of no registered type."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (64, 64))


class Reads(nn.Dense):
    """A subclass of a registered type that uses its weight itself."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return 2 * inputs @ self.param("kernel", self.kernel_init, (64, 64))


class Block(nn.Module):
    of: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Reads(64, name="inner")(x) if self.of == "Reads" else Own(name="inner")(x)
        return nn.Dense(64, name="dense")(x)


class Outer(nn.Module):
    of: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Block(self.of, name="block")(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["Own", "Reads"])
def test_foreign_linen_code_gets_an_error_with_the_path(kind: Any, of: str) -> None:
    """Codes of int8 have the kernel's own shape, so that Linen's check of shapes passes them."""
    module, tree = linen(Outer(of))
    tree = jlora.quantize(
        module, jlora.QuantConfig(kind=kind, target_modules=("dense",)), params=tree
    )
    assert module.apply({"params": tree}, X).shape == (2, 64)
    tree["block"]["inner"]["kernel"] = tree["block"]["dense"]["kernel"]
    with pytest.raises(
        JloraError,
        match=rf"^block/inner/kernel is quantised, and the code of {of} could not(.|\n)*exclude",
    ):
        module.apply({"params": tree}, X)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_is_not_injected_computes_nothing(kind: Any, jit: bool) -> None:
    module, tree = linen()
    tree = jlora.quantize(module, jlora.QuantConfig(kind=kind), params=tree)
    tree = jax.tree.map(lambda x: x, tree)
    if kind == "int8":
        assert tree["dense"]["kernel"].codes.shape == (64, 64)
    for plain in (LinenModel(), jlora.eject(module)):
        apply = jax.jit(plain.apply) if jit else plain.apply
        with pytest.raises((JloraError, ScopeParamShapeError)) as error:
            apply({"params": tree}, X)
        if kind == "int8":
            text = "QuantArray(int8, shape=(64, 64), dtype=float32, block_size=64) was used as an"
            assert text in str(error.value)
        else:
            assert 'For parameter "kernel" in "/dense"' in str(error.value)


def test_an_array_where_codes_should_be() -> None:
    model = quantise("nnx")
    model.dense.kernel.set_value(jnp.ones((64, 64)))
    with pytest.raises(JloraError, match=r"a quantised Linear was given an array \(64, 64\)"):
        model(X)


def test_rows_of_an_embedding_beside_quantised_layers() -> None:
    config = jlora.LoraConfig(r=2, target_modules=("dense",), trainable_token_indices=(1,))
    with pytest.raises(JloraError, match="embed is no linear layer"):
        quantise("nnx", target_modules=("dense", "embed"))
    model = jlora.inject(quantise("nnx"), config, rngs=0)
    assert injection.partition(model)[0]["embed/lora_tokens"].shape == (1, 64)


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_a_wrong_equation_of_a_users_own_type(flavour: str) -> None:
    """Of a square weight: no shape tells, and codes would be multiplied the other way round."""

    class Table(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (64, 64)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.kernel[...].T

    class Holds(nnx.Module):
        def __init__(self) -> None:
            self.inner = Table()

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.inner(x)

    config = jlora.LoraConfig(r=2, target_modules=("inner",))
    if flavour == "nnx":
        jlora.register(Table, weight="kernel", equation="...i,io->...o")
        model = jlora.quantize(Holds())
        np.testing.assert_array_equal(model(X), X @ model.inner.kernel.get_value().dequantize().T)
        run = jlora.inject(model, config, rngs=0)
    else:
        jlora.register(Own, weight="kernel", equation="...i,io->...o")
        module, tree = linen(Block(), config)
        tree = jlora.quantize(module, params=tree)
        injection.linen_layer.REGISTRY[Own] = dataclasses.replace(
            injection.linen_layer.REGISTRY[Own], form="...i,oi->...o"
        )
        run = lambda x: module.apply({"params": tree}, x)  # noqa: E731
    try:
        with pytest.raises(JloraError, match=r"is registered as contracting axes"):
            run(X)
    finally:
        injection.linen_layer.REGISTRY.pop(Own, None)
        injection.nnx_sites.REGISTRY.pop(Table, None)
