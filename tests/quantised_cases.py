"""The table of quantised models: every layer type that is a contraction, in the transform's models.

Inputs are of several blocks, or of less than one; each pair of flavour, layer type, layout, dtype
and kind of codes occurs, not every combination.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from transform_cases import CONFIG, KINDS, LINEAR, Case, Kind, general

import jlora
from jlora import injection
from jlora.injection import params as trees
from jlora.quant.array import QuantArray

D = 96
QUANTS = {
    "nf4": jlora.QuantConfig(kind="nf4", block_size=32),
    "fp4-double": jlora.QuantConfig(kind="fp4", block_size=64, double_quant=True),
    "int8": jlora.QuantConfig(kind="int8"),
}


class LinenOwn(nn.Module):
    """A user's own type, which does more than its registered equation says."""

    dtype: Any = None
    param_dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        table = self.param("table", nn.initializers.normal(), (5, D), self.param_dtype)
        shift = self.param("shift", nn.initializers.ones, (5,), self.param_dtype)
        return x @ table.T - shift


class NnxOwn(nnx.Module):
    def __init__(self, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (5, D), param_dtype))
        self.shift = nnx.Param(jnp.ones(5, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.table[...].T - self.shift[...]


def register_own() -> None:
    for layer in (LinenOwn, NnxOwn):
        jlora.register(layer, weight="table", equation="...i,oi->...o")


def unregister_own() -> None:
    injection.linen_layer.REGISTRY.pop(LinenOwn)
    injection.nnx_sites.REGISTRY.pop(NnxOwn)


def einsum(equation: str, shape: tuple[int, ...], bias: tuple[int, ...] | None) -> tuple[Any, Any]:
    def linen(**kw: Any) -> nn.Module:
        return nn.Einsum(shape, equation, use_bias=bias is not None, **kw)

    return linen, lambda **kw: nnx.Einsum(equation, shape, bias, **kw)


QKV = {"num_heads": 2, "qkv_features": 8}
ATTENTION = {name: "ri,rho->iho" for name in ("query", "key", "value")} | {"out": "rhi,ro->hio"}
QUANT_KINDS = {
    "quant-linear": Kind(
        lambda **kw: nn.Dense(5, **kw),
        lambda **kw: nnx.Linear(D, 5, **kw),
        (2, 3, D), 2 * (D + 5), LINEAR,
    ),
    "quant-features": Kind(*general(D, (2, 4)), (2, 3, D), 2 * (D + 8), {"": "ri,rab->iab"}),
    "quant-axes": Kind(
        *general((12, 8), 5, axis=(-2, -1)), (2, 4, 12, 8), 2 * (D + 5), {"": "rab,ro->abo"}
    ),
    "quant-batch": Kind(
        *general(D, (2, 3), axis=-1, batch={0: 3}), (3, 4, D), 3 * 2 * (D + 6),
        {"": "bri,brxy->bixy"},
    ),
    "quant-einsum": Kind(
        *einsum("btd,ndh->btnh", (2, D, 4), (2, 4)), (2, 3, D), 2 * (D + 8), {"": "rd,rnh->ndh"}
    ),
    "quant-transposed": Kind(
        *einsum("tdb,fd->bft", (5, D), (5,)), (3, D, 2), 2 * (D + 5), {"": "rd,rf->fd"}
    ),
    "quant-experts": Kind(
        *einsum("ebd,dfe->bef", (D, 5, 3), None), (3, 2, D), 3 * 2 * (D + 5), {"": "erd,erf->dfe"}
    ),
    "quant-attention": Kind(
        lambda **kw: nn.MultiHeadDotProductAttention(out_features=32, **QKV, **kw),
        lambda **kw: nnx.MultiHeadAttention(in_features=32, decode=False, **QKV, **kw),
        (2, 3, 32), 4 * 2 * (32 + 8), ATTENTION,
    ),
    "quant-own": Kind(LinenOwn, NnxOwn, (2, 3, D), 2 * (D + 5), {"": "ri,ro->oi"}, "table"),
}  # fmt: skip
KINDS.update(QUANT_KINDS)  # where the models look theirs up; the transform's table is made by now


@dataclasses.dataclass(frozen=True)
class QuantCase(Case):
    """A case of the transform whose weights are quantised."""

    quant: str = "nf4"

    def __str__(self) -> str:
        return f"{super().__str__()}-{self.quant}".removeprefix("quant-")

    def quantised(self) -> tuple[Any, dict[str, Any], Any, Any, Any]:
        """The injected model on a quantised base, its factors, the rest, and two functions.

        These give the outputs for (factors, x, rest), and of an NNX model's base before `inject`.
        """
        base, weights, _ = self.base()
        config = QUANTS[self.quant]
        if self.flavour == "nnx":
            jlora.quantize(base, config)
            alone = nnx.clone(base)
            model = jlora.inject(base, CONFIG, rngs=nnx.Rngs(5))
            factors, rest = jlora.partition(model)
            return model, factors, rest, lambda f, x, rest: jlora.combine(f, rest)(x), alone
        model = jlora.inject(base, CONFIG)
        shapes = jax.eval_shape(model.init, jax.random.key(0), self.inputs)["params"]
        factors, rest = jlora.partition(shapes)
        filled = self.fill(factors)
        zero = {p: jnp.zeros_like(f) if p.endswith("_b") else f for p, f in filled.items()}
        tree = jlora.combine(zero, dataclasses.replace(rest, rest=weights))
        factors, rest = jlora.partition(jlora.quantize(model, config, params=tree))

        def output(factors: Any, x: jax.Array, rest: Any) -> jax.Array:
            return model.apply({"params": jlora.combine(factors, rest)}, x)

        return model, factors, rest, output, None


def base_of(model: Any, rest: Any) -> dict[str, Any]:
    """Leaves of the base by path, quantised ones whole."""
    if isinstance(rest, trees.LinenBase):
        return rest.rest
    leaves, _ = injection.partition(model, everything=True)
    return {path: leaf for path, leaf in leaves.items() if "lora_" not in path}


def dequantised(leaves: dict[str, Any]) -> dict[str, jax.Array]:
    """Leaves by path with arrays in place of what is quantised."""
    return {p: x.dequantize() if isinstance(x, QuantArray) else x for p, x in leaves.items()}


LAYOUTS = ("plain", "scanned", "remat")
DTYPES = (jnp.float32, jnp.bfloat16)
QUANT_CASES = [
    QuantCase(flavour, kind, LAYOUTS[(k + q + f) % 3], DTYPES[(k + q * f) % 2], quant)
    for f, flavour in enumerate(("linen", "nnx"))
    for k, kind in enumerate(QUANT_KINDS)
    for q, quant in enumerate(QUANTS)
]
QUANT_CASES += [
    QuantCase(flavour, kind, "scanned-remat", jnp.float32, quant)
    for flavour in ("linen", "nnx")
    for kind in ("quant-linear", "quant-features")
    for quant in ("nf4", "int8")
]
