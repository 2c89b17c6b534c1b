"""The table of the transform: models of one layer type in both flavours and several layouts."""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jlora
from jlora import injection
from jlora.injection import params as trees

R, ALPHA, LAYERS = 2, 6, 2
CONFIG = jlora.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=".*")
IDS = jnp.asarray([[3, 0, 6, 3], [1, 5, 2, 0]], jnp.int32)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Most of the time goes to the compiler, and much of that to drawing numbers."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.default_prng_impl("unsafe_rbg"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A layer type as its user writes it, and what adapting it comes to."""

    linen: Callable[..., nn.Module]
    nnx: Callable[..., nnx.Module]
    shape: tuple[int, ...] | None
    """Of the input; None: token ids."""
    parameters: int
    """Of the factors of one layer with r = 2."""
    updates: dict[str, str]
    """Module within the layer -> the update of its weight, from A and B."""
    weight: str = "kernel"
    call: Callable[..., jax.Array] = lambda layer, x: layer(x)


LINEAR, ATTENTION = {"": "ri,ro->io"}, {n: "ri,rho->iho" for n in ("query", "key", "value")}
QKV = {"num_heads": 2, "qkv_features": 8}


def conv(inputs: int, features: int, window: tuple[int, ...], **options: Any) -> tuple[Any, Any]:
    def linen(**kw: Any) -> nn.Module:
        return nn.Conv(features, window, **options, **kw)

    def nnx_(**kw: Any) -> nnx.Module:
        return nnx.Conv(inputs, features, window, **options, **kw)

    return linen, nnx_


def einsum(equation: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
    def linen(**kw: Any) -> nn.Module:
        return nn.Einsum(shape, equation, use_bias=False, **kw)

    return linen, lambda **kw: nnx.Einsum(equation, shape, None, **kw)


def general(inputs: Any, features: Any, *, batch: Any = None, **options: Any) -> tuple[Any, Any]:
    def linen(**kw: Any) -> nn.Module:
        return nn.DenseGeneral(features, batch_dims=tuple(batch or ()), **options, **kw)

    def nnx_(**kw: Any) -> nnx.Module:
        return nnx.LinearGeneral(inputs, features, batch_axis=batch or {}, **options, **kw)

    return linen, nnx_


def embed(rows: int, width: int) -> tuple[Any, Any]:
    return lambda **kw: nn.Embed(rows, width, **kw), lambda **kw: nnx.Embed(rows, width, **kw)


KINDS = {
    "linear": Kind(
        lambda **kw: nn.Dense(5, **kw),
        lambda **kw: nnx.Linear(6, 5, **kw),
        (2, 3, 6), 2 * (6 + 5), LINEAR,
    ),
    "general-features": Kind(*general(6, (2, 4)), (2, 3, 6), 2 * (6 + 8), {"": "ri,rab->iab"}),
    "general-axes": Kind(
        *general((2, 3), 5, axis=(-2, -1)), (2, 4, 2, 3), 2 * (6 + 5), {"": "rab,ro->abo"}
    ),
    "general-inner-axis": Kind(*general(6, 5, axis=1), (2, 6, 3), 2 * (6 + 5), LINEAR),
    "general-batch": Kind(
        *general(6, 5, axis=-1, batch={0: 3}), (3, 4, 6), 3 * 2 * (6 + 5), {"": "bri,bro->bio"}
    ),
    "einsum": Kind(
        *einsum("btd,dnh->btnh", (6, 2, 4)), (2, 3, 6), 2 * (6 + 8), {"": "rd,rnh->dnh"}
    ),
    "einsum-transposed": Kind(
        *einsum("btd,fd->tbf", (5, 6)), (2, 3, 6), 2 * (6 + 5), {"": "rd,rf->fd"}
    ),
    "einsum-experts": Kind(
        *einsum("ebd,edf->ebf", (3, 6, 5)), (3, 2, 6), 3 * 2 * (6 + 5), {"": "erd,erf->edf"}
    ),
    "embed": Kind(*embed(7, 5), None, 2 * (7 + 5), LINEAR, "embedding"),
    "embed-attend": Kind(
        *embed(7, 6), (2, 3, 6), 2 * (7 + 6), LINEAR, "embedding", lambda e, x: e.attend(x)
    ),
    "embed-tied": Kind(
        *embed(7, 6), None, 2 * (7 + 6), LINEAR, "embedding", lambda e, x: e.attend(jnp.sin(e(x)))
    ),
    "conv-strides": Kind(
        *conv(4, 6, (3,), strides=2), (2, 7, 4), 2 * (3 * 4) + 2 * 6, {"": "rwi,ro->wio"}
    ),
    "conv-2d": Kind(
        *conv(3, 4, (3, 2), padding="VALID"), (2, 5, 4, 3), 2 * (6 * 3) + 2 * 4,
        {"": "ruvi,ro->uvio"},
    ),
    "conv-causal-groups": Kind(
        *conv(4, 6, (2,), padding="CAUSAL", feature_group_count=2),
        (2, 5, 4), 2 * (2 * 2) + 2 * 6, {"": "rwi,ro->wio"},
    ),
    "conv-circular": Kind(
        *conv(4, 3, (3,), padding="CIRCULAR"), (2, 5, 4), 2 * (3 * 4) + 2 * 3, {"": "rwi,ro->wio"}
    ),
    "attention": Kind(
        lambda **kw: nn.MultiHeadDotProductAttention(out_features=6, **QKV, **kw),
        lambda **kw: nnx.MultiHeadAttention(in_features=6, decode=False, **QKV, **kw),
        (2, 3, 6), 4 * 2 * (6 + 8), ATTENTION | {"out": "rhi,ro->hio"},
    ),
}  # fmt: skip


def step(y: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a block hands to the next one, and its output."""
    y = y * h
    return 1 + 0.3 * jnp.sin(y).mean(), y


class LinenBlock(nn.Module):
    kind: str
    dtype: Any

    @nn.compact
    def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        kind = KINDS[self.kind]
        layer = kind.linen(dtype=self.dtype, param_dtype=self.dtype, name="layer")
        return step(kind.call(layer, x), h)


class LinenModel(nn.Module):
    """Blocks that each see the whole input; what they pass on is one number."""

    kind: str
    layout: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block: Any = nn.remat(LinenBlock) if "remat" in self.layout else LinenBlock
        h = jnp.ones((), self.dtype)
        if "scanned" in self.layout:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=LAYERS,
            )
            return scanned(self.kind, self.dtype, name="stack")(h, x)[1]
        ys = []
        for i in range(LAYERS):
            h, y = block(self.kind, self.dtype, name=f"block_{i}")(h, x)
            ys.append(y)
        return jnp.stack(ys)


class NnxBlock(nnx.Module):
    def __init__(self, kind: str, dtype: Any, rngs: nnx.Rngs):
        self.kind = kind
        self.layer = KINDS[kind].nnx(dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return step(KINDS[self.kind].call(self.layer, x), h)


class NnxModel(nnx.Module):
    """As `LinenModel`, with the same names."""

    def __init__(self, kind: str, layout: str, dtype: Any):
        self.layout, self.dtype, rngs = layout, dtype, nnx.Rngs(0)
        if "scanned" in layout:
            make = nnx.vmap(lambda rngs: NnxBlock(kind, dtype, rngs))
            self.stack = make(rngs.split(LAYERS))
        else:
            for i in range(LAYERS):
                setattr(self, f"block_{i}", NnxBlock(kind, dtype, rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        run: Any = lambda h, block: block(h, x)  # noqa: E731
        run = nnx.remat(run) if "remat" in self.layout else run
        h = jnp.ones((), self.dtype)
        if "scanned" in self.layout:
            scan = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
            return scan(h, self.stack)[1]
        ys = []
        for i in range(LAYERS):
            h, y = run(h, getattr(self, f"block_{i}"))
            ys.append(y)
        return jnp.stack(ys)


@dataclasses.dataclass(frozen=True)
class Case:
    flavour: str
    kind: str
    layout: str
    dtype: Any

    def __str__(self) -> str:
        return f"{self.flavour}-{self.kind}-{self.layout}-{jnp.dtype(self.dtype).name}"

    @property
    def inputs(self) -> jax.Array:
        shape = KINDS[self.kind].shape
        return IDS if shape is None else numbers("x", shape, self.dtype)

    @property
    def tolerance(self) -> float:
        """Of a difference, relative to the largest of the right values."""
        return 1e-5 if self.dtype == jnp.float32 else 2e-2

    def fill(self, leaves: dict[str, Any]) -> dict[str, jax.Array]:
        """Numbers of the leaves' shapes and dtypes, the same for all layouts and flavours."""
        filled = {}
        for path, leaf in leaves.items():
            if path.startswith("stack/"):
                names = [path.replace("stack/", f"block_{i}/") for i in range(LAYERS)]
                layers = [numbers(name, leaf.shape[1:], leaf.dtype) for name in names]
                filled[path] = jnp.stack(layers)
            else:
                filled[path] = numbers(path, leaf.shape, leaf.dtype)
        return filled

    def base(self) -> tuple[Any, dict[str, jax.Array], Callable[..., jax.Array]]:
        """The base model, its weights by path, and its output for other weights and inputs."""
        if self.flavour == "linen":
            module = LinenModel(self.kind, self.layout, self.dtype)
            shapes = jax.eval_shape(module.init, jax.random.key(0), self.inputs)
            weights = self.fill(trees.flatten(shapes["params"]))
            return module, weights, lambda w, x: module.apply({"params": trees.unflatten(w)}, x)
        model = NnxModel(self.kind, self.layout, self.dtype)
        weights = self.fill(injection.partition(model, everything=True)[0])
        injection.update(model, weights)
        _, rest = injection.partition(model, everything=True)
        return model, weights, lambda w, x: injection.combine(w, rest)(x)


def numbers(name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Numbers that follow from a name, such as bfloat16 has."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).normal(scale=0.3, size=shape)
    return jnp.asarray(drawn.astype(jnp.bfloat16).astype(dtype))


# Those whose equation is all that tells them from another: float32 alone.
ALIKE = {"general-axes", "general-inner-axis", "einsum-transposed", "embed", "embed-attend"}
ALIKE |= {"conv-2d", "conv-causal-groups", "conv-circular"}
LAYOUTS = {kind: ("plain", "scanned", "remat") for kind in KINDS}
LAYOUTS |= {kind: ("plain", "scanned") for kind in ALIKE}
LAYOUTS |= {kind: (*LAYOUTS[kind], "scanned-remat") for kind in ("linear", "attention")}
CASES = [
    Case(flavour, kind, layout, dtype)
    for flavour in ("linen", "nnx")
    for kind in KINDS
    for layout in LAYOUTS[kind]
    for dtype in ((jnp.float32,) if kind in ALIKE else (jnp.float32, jnp.bfloat16))
]
