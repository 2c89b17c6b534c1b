"""Low-rank adapters as pure maths: sites, factors, the update and its scale. Knows JAX and no Flax.

Orientation, frozen by what is on disk: ``lora_a`` is (*batch, r, *in) and ``lora_b`` is
(*batch, r, *out). Both thin gradients are then dots over the leading token axis whose few rows are
the rank; other orientations of A and B took 1.2 to 3 times as long on a CPU, the same on a TPU.
"""

import dataclasses
import functools
import math
import re
import string
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora.canonical import layer_path

LORA_A, LORA_B = "lora_a", "lora_b"
LORA_TOKENS = "lora_tokens"  # trained rows of an embedding: what is added to the base's
LORA_ADDED = "lora_added_"  # before the name of a leaf of a Linen base: what is added to it


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of one weight that can be adapted, whatever kind of model it is in."""

    path: str
    """Of the module in the model's own tree: "model/layers/self_attn/q_proj"."""
    shape: tuple[int, ...]
    """Of the weight."""
    contracting: tuple[int, ...]
    """Axes of the weight that are summed over with the input."""
    output: tuple[int, ...]
    """Axes of the weight that become axes of the output."""
    batch: tuple[int, ...] = ()
    """Axes of the weight that stack layers (those come first) or that input and output share, such
    as experts; each of their entries has factors of its own."""
    stacked: int = 0
    """How many of the leading axes stack layers."""
    stack: str | None = None
    """Path of the module whose parameters are stacked, or None: "model/layers"."""
    weight: str = "kernel"
    """Name of the weight in its module; "" where `path` is that of the weight itself."""
    kind: Literal["linear", "embedding", "convolution", "other"] = "linear"
    """Whether the weight is multiplied, its rows are looked up, it slides over the input, or is
    used in a way for which W + scaling * A B has to be formed."""
    peculiar: str = ""
    """Why PEFT's layer of this kind has another update than ours, where it does."""

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Sizes of the contracted axes."""
        return tuple(self.shape[i] for i in self.contracting)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Sizes of the output axes."""
        return tuple(self.shape[i] for i in self.output)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[i] for i in self.batch)

    @property
    def weight_path(self) -> str:
        """Path of the weight."""
        return f"{self.path}/{self.weight}" if self.weight else self.path

    def leaf(self, name: str) -> str:
        """Path of the site's own leaf `name`, beside the weight: of "lora_a"."""
        return f"{self.path}/{name}" if self.weight else f"{self.path}_{name}"

    @property
    def names(self) -> tuple[str, ...]:
        """The path of each layer's own module, as in the unstacked model: the names on disk."""
        layers = math.prod(self.shape[: self.stacked])
        return tuple(layer_path(self.path, self.stack, i) for i in range(layers))


@dataclasses.dataclass(frozen=True)
class Target:
    """A site that is to be adapted, with its rank and scaling."""

    site: Site
    r: int
    alpha: float
    scaling: float | tuple[float, ...]
    """The factor on the low-rank product; one for each layer where they differ."""
    layers: tuple[tuple[int, float, float], ...] = ()
    """Rank, alpha and scaling of each stacked layer, where they differ: rank 0 is left as it is.
    Factors are then padded with zeros to rank `r`, where they get no gradient."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each of the site's layers."""
        return tuple(r for r, _, _ in self.layers) or (self.r,) * len(self.site.names)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the site's factors."""
        site = self.site
        return {
            LORA_A: (*site.batch_shape, self.r, *site.in_shape),
            LORA_B: (*site.batch_shape, self.r, *site.out_shape),
        }

    @property
    def parameters(self) -> int:
        """Number of parameters added, padding not counted."""
        size = sum(math.prod(shape) for shape in self.shapes.values())
        return size * sum(self.ranks) // (self.r * len(self.ranks))


def init_factors(
    key: Array, target: Target, init: bool | str, dtype: Any = jnp.float32
) -> dict[str, Array]:
    """Fresh factors of a site as PEFT draws them, so that the model is unchanged at first.

    A is random and B zero; in an embedding A is zero and B random, normal. The draw depends on
    `key` and each layer's own path alone: stacking layers, or targeting more, changes no factor.

    Args:
        key: a random key.
        target: the site.
        init: `LoraConfig.init_lora_weights`.
        dtype: of the factors.

    Returns:
        lora_a (*batch, r, *in) and lora_b (*batch, r, *out).
    """
    site = target.site
    if target.layers:
        return _padded(key, target, init, dtype)
    names = jnp.asarray([zlib.crc32(name.encode()) for name in site.names], jnp.uint32)
    inner = site.batch_shape[site.stacked :]
    factors = _draw(
        key,
        names,
        (*inner, target.r),
        site.in_shape,
        site.out_shape,
        site.kind == "embedding",
        init,
        dtype,
    )
    return {name: factors[name].reshape(shape) for name, shape in target.shapes.items()}


def _padded(key: Array, target: Target, init: bool | str, dtype: Any) -> dict[str, Array]:
    """The factors of layers of different ranks, each as it would be in the unrolled model."""
    factors = {name: jnp.zeros(shape, dtype) for name, shape in target.shapes.items()}
    shape = target.site.shape[1:]
    ins, outs = (tuple(i - 1 for i in x) for x in (target.site.contracting, target.site.output))
    for i, (name, r) in enumerate(zip(target.site.names, target.ranks, strict=True)):
        if r:
            site = Site(name, shape, ins, outs, kind=target.site.kind)
            for factor, value in init_factors(key, Target(site, r, 1, 1), init, dtype).items():
                factors[factor] = factors[factor].at[i, :r].set(value)
    return factors


@functools.partial(jax.jit, static_argnums=range(2, 8))  # compiled once for all sites of a shape
def _draw(
    key: Array,
    names: Array,
    rank: tuple[int, ...],
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    lookup: bool,
    init: bool | str,
    dtype: Any,
) -> dict[str, Array]:
    """Factors of the layers whose hashed names are uint32 (layers,), stacked on a leading axis."""
    shape_a, shape_b = (*rank, *in_shape), (*rank, *out_shape)
    bound = 1 / math.sqrt(math.prod(in_shape))  # kaiming_uniform(a=sqrt(5)) over (r, in)

    def one(name: Array) -> dict[str, Array]:
        key_a, key_b = jax.random.split(jax.random.fold_in(key, name))
        if lookup:
            b = jax.random.normal(key_b, shape_b, dtype)
            a = jax.random.normal(key_a, shape_a, dtype) if init is False else None
            return {LORA_A: jnp.zeros(shape_a, dtype) if a is None else a, LORA_B: b}
        if init == "gaussian":
            a = jax.random.normal(key_a, shape_a, dtype) / rank[-1]
        else:
            a = jax.random.uniform(key_a, shape_a, dtype, -bound, bound)
        if init is False:
            b = jax.random.uniform(key_b, shape_b, dtype, -bound, bound)
        else:
            b = jnp.zeros(shape_b, dtype)
        return {LORA_A: a, LORA_B: b}

    return jax.vmap(one)(names)


def delta(
    x: Array,
    lora_a: Array,
    lora_b: Array,
    scaling: float | Array,
    dtype: Any,
    equation: str = "...i,io->...o",
) -> Array:
    """Scaling * (x A) B, the low-rank product kept apart from the weight.

    Args:
        x: the layer's input.
        lora_a: (*batch, r, *in).
        lora_b: (*batch, r, *out).
        scaling: the factor on the product.
        dtype: of the computation and of the result.
        equation: of the layer, as for `jnp.einsum`: input, weight -> output. Letters of the weight
            are contracted, output or (in all three) batch axes.

    Returns:
        The term to add to the layer's output, of its shape.
    """
    inputs, weight, out = split_equation(equation)
    contracted = [c for c in weight if c not in out]
    shared = [c for c in weight if c in inputs and c in out]
    made = [c for c in weight if c not in inputs]
    rest = [c for c in inputs if c not in contracted]
    x, scaling = x.astype(dtype), jnp.asarray(scaling, dtype)
    if shared or inputs != rest + contracted or out != rest + made:
        new = next(c for c in string.ascii_letters if c not in equation)
        sub = "".join
        first = f"{sub(inputs)},{sub(shared)}{new}{sub(contracted)}->{sub(rest)}{new}"
        second = f"{sub(rest)}{new},{sub(shared)}{new}{sub(made)}->{sub(out)}"
        low = jnp.einsum(first, x, lora_a.astype(dtype)) * scaling
        return jnp.einsum(second, low, lora_b.astype(dtype))
    r, out_shape = lora_b.shape[0], lora_b.shape[1:]
    leading = x.shape[: x.ndim - (lora_a.ndim - 1)]
    # Matrices, not batches of them: the factors' gradients sum over all tokens, and XLA transposes
    # the activations first where that sum runs over more than one axis.
    rows = x.reshape(-1, math.prod(lora_a.shape[1:]))
    low = lax.dot_general(rows, lora_a.reshape(r, -1).astype(dtype), (((1,), (1,)), ((), ())))
    low = low * scaling  # here it costs r products a token, after B `out`
    return (low @ lora_b.reshape(r, -1).astype(dtype)).reshape(*leading, *out_shape)


def delta_rows(
    indices: Array, lora_a: Array, lora_b: Array, scaling: float | Array, dtype: Any
) -> Array:
    """The term to add to rows looked up at int (...): scaling * A[:, indices] B, (..., *out)."""
    low = jnp.take(lora_a, indices, axis=1)
    low = jnp.moveaxis(low, 0, -1).astype(dtype) * jnp.asarray(scaling, dtype)
    return jnp.tensordot(low, lora_b.astype(dtype), axes=1)


def delta_weight(
    site: Site, lora_a: Array, lora_b: Array, scaling: float | tuple[float, ...] | Array
) -> Array:
    """Scaling * A B in the weight's shape and axis order, float32.

    Args:
        site: whose axes the factors have.
        lora_a: (*batch, r, *in).
        lora_b: (*batch, r, *out).
        scaling: a number, or one for each stacked layer.
    """
    letters = string.ascii_letters[: len(site.shape)]
    r = string.ascii_letters[len(site.shape)]
    batch = "".join(letters[i] for i in site.batch)
    a = batch + r + "".join(letters[i] for i in site.contracting)
    b = batch + r + "".join(letters[i] for i in site.output)
    a32, b32 = lora_a.astype(jnp.float32), lora_b.astype(jnp.float32)
    product = jnp.einsum(f"{a},{b}->{letters}", a32, b32, precision=lax.Precision.HIGHEST)
    scaling = jnp.asarray(scaling, jnp.float32)
    return product * scaling.reshape(scaling.shape + (1,) * (product.ndim - scaling.ndim))


def split_equation(equation: str) -> tuple[list[str], list[str], list[str]]:
    """The terms of input, weight and output: "...i,io->...o" has "..." and i; i and o; ..., o."""
    operands, _, out = equation.replace(" ", "").partition("->")
    inputs, _, weight = operands.partition(",")
    return tuple(re.findall(r"\.\.\.|[A-Za-z]", part) for part in (inputs, weight, out))  # type: ignore[return-value]


def dropout(x: Array, rate: float, key: Array) -> Array:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate)."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def stacks_of(sites: Iterable[Site]) -> dict[str, int]:
    """Path of each stacked module -> number of its layers."""
    return {s.stack: math.prod(s.shape[: s.stacked]) for s in sites if s.stack is not None}


def iter_names(targets: Iterable[Target]) -> Iterator[tuple[str, Target]]:
    """Each adapted layer's own path, with its own rank and scaling."""
    for target in targets:
        own = target.layers or ((target.r, target.alpha, target.scaling),) * len(target.ranks)
        for name, (r, alpha, scaling) in zip(target.site.names, own, strict=True):
            if r:
                yield name, Target(target.site, r, alpha, scaling)
