"""What a quantised base costs: no dequantised weight is kept, and no gradient of it computed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax._src.ad_checkpoint import saved_residuals  # jax.ad_checkpoint only prints them
from quantised_cases import QuantCase, register_own, unregister_own

import jlora

QUANT = jlora.QuantConfig(block_size=32)


class Deep(nn.Module):
    """Without biases and activations: all that is as large as a weight is one."""

    stacked: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.stacked:
            axes, rngs = {"params": 0}, {"params": True}
            scan: Any = nn.scan(Layer, variable_axes=axes, split_rngs=rngs, length=4)
            return scan(name="layers")(x, None)[0]
        for i in range(4):
            x, _ = Layer(name=f"layer_{i}")(x, None)
        return x


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(nn.Dense(256, use_bias=False, name="dense")(x)), None


class NnxDeep(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        layers = [nnx.Linear(256, 256, use_bias=False, rngs=rngs) for _ in range(4)]
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def deep(flavour: str, quant: Any = QUANT) -> tuple[Any, Any, Callable[..., jax.Array]]:
    """The factors, the base, and the sum of the outputs for such and an input."""
    config = jlora.LoraConfig(r=2)
    if flavour == "nnx":
        model = jlora.inject(jlora.quantize(NnxDeep(), quant), config, rngs=0)
        factors, base = jlora.partition(model)
        return factors, base, lambda f, base, x: jlora.combine(f, base)(x).sum()
    module = jlora.inject(Deep(stacked=flavour == "linen scan"), config)
    tree = module.init(jax.random.key(0), jnp.ones((8, 256)))["params"]
    factors, base = jlora.partition(jlora.quantize(module, quant, params=tree))
    return (
        factors, base,
        lambda f, base, x: module.apply({"params": jlora.combine(f, base)}, x).sum(),
    )  # fmt: skip


@pytest.mark.parametrize("flavour", ["linen", "linen scan", "nnx"])
def test_no_dequantised_weight_is_kept_for_the_backward_pass(flavour: str) -> None:
    factors, base, loss = deep(flavour)
    x = jnp.ones((8, 256))
    kept = [aval for aval, _ in saved_residuals(lambda f, x: loss(f, base, x), factors, x)]
    codes = [aval for aval in kept if aval.dtype == jnp.uint8]
    assert sum(aval.size for aval in codes) == 4 * 256 * 256 // 2
    wide = [aval for aval in kept if aval.size >= 256 * 256 and aval not in codes]
    assert wide == []


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_a_layer_type_of_the_users_own_keeps_none_either(flavour: str) -> None:
    register_own()
    _, factors, rest, output, _ = QuantCase(flavour, "quant-own", "plain", jnp.float32).quantised()
    x = jnp.ones((2, 3, 96))
    kept = saved_residuals(lambda f, x: output(f, x, rest).sum(), factors, x)
    unregister_own()
    assert (48, 5) in [aval.shape for aval, _ in kept if aval.dtype == jnp.uint8]
    assert not {(96, 5), (5, 96)} & {aval.shape for aval, _ in kept}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_scan_holds_one_dequantised_weight_at_a_time(kind: Any) -> None:
    factors, base, loss = deep("linen scan", jlora.QuantConfig(kind=kind))
    compiled = jax.jit(jax.grad(loss)).lower(factors, base, jnp.ones((8, 256))).compile()
    weight = 256 * 256 * 4
    assert weight <= compiled.memory_analysis().temp_size_in_bytes < 3 * weight


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_no_gradient_of_the_base_is_computed(flavour: str) -> None:
    """2 N a row forward, 1.5 N back (not to the input); 2 N more with the weights' own."""
    factors, base, loss = deep(flavour)
    rows, n = 4096, 4 * 256 * 256
    x = jax.ShapeDtypeStruct((rows, 256), jnp.float32)
    grad = jax.jit(jax.grad(loss)).lower(factors, base, x).compile()
    flops = grad.cost_analysis()["flops"] / rows / n
    print(f"{flavour}: {flops:.4f} N FLOPs a row")
    assert 3.5 < flops <= 3.8
