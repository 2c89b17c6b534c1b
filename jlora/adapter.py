"""Low-rank adapters as pure maths: sites, factors, the update and its scale. Knows JAX and no Flax.

Orientation, frozen by what is on disk: ``lora_a`` is (*batch, r, *in) and ``lora_b`` is
(*batch, r, *out). Both thin gradients are then dots over the leading token axis whose few rows are
the rank; other orientations of A and B took 1.2 to 3 times as long on a CPU, the same on a TPU.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora.canonical import layer_path

LORA_A, LORA_B = "lora_a", "lora_b"


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
    """Leading axes of the weight that stack layers; each has factors of its own."""
    stack: str | None = None
    """Path of the module whose parameters are stacked, or None: "model/layers"."""
    weight: str = "kernel"
    """Name of the weight in its module."""

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
        """Sizes of the stacked axes."""
        return tuple(self.shape[i] for i in self.batch)

    @property
    def names(self) -> tuple[str, ...]:
        """The path of each layer's own module, as in the unstacked model: the names on disk."""
        return tuple(
            layer_path(self.path, self.stack, i) for i in range(math.prod(self.batch_shape))
        )


@dataclasses.dataclass(frozen=True)
class Target:
    """A site that is to be adapted, with its rank and scaling."""

    site: Site
    r: int
    alpha: float
    scaling: float

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
        """Number of parameters added."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def init_factors(
    key: Array, target: Target, init: bool | str, dtype: Any = jnp.float32
) -> dict[str, Array]:
    """Fresh factors of a site: A as PEFT draws it, B zero, so that the model is unchanged at first.

    The draw depends on `key` and on each layer's own path alone: stacking layers, or targeting more
    of them, changes no factor.

    Args:
        key: a random key.
        target: the site.
        init: `LoraConfig.init_lora_weights`.
        dtype: of the factors.

    Returns:
        lora_a (*batch, r, *in) and lora_b (*batch, r, *out).
    """
    site = target.site
    names = jnp.asarray([zlib.crc32(name.encode()) for name in site.names], jnp.uint32)
    factors = _draw(key, names, target.r, site.in_shape, site.out_shape, init, jnp.dtype(dtype))
    return {name: factors[name].reshape(shape) for name, shape in target.shapes.items()}


@functools.partial(jax.jit, static_argnums=range(2, 7))  # compiled once for all sites of a shape
def _draw(
    key: Array,
    names: Array,
    r: int,
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    init: bool | str,
    dtype: Any,
) -> dict[str, Array]:
    """Factors of the layers whose hashed names are uint32 (layers,), stacked on a leading axis."""
    bound = 1 / math.sqrt(math.prod(in_shape))  # kaiming_uniform(a=sqrt(5)) over (r, in)

    def one(name: Array) -> dict[str, Array]:
        key_a, key_b = jax.random.split(jax.random.fold_in(key, name))
        if init == "gaussian":
            a = jax.random.normal(key_a, (r, *in_shape), dtype) / r
        else:
            a = jax.random.uniform(key_a, (r, *in_shape), dtype, -bound, bound)
        if init is False:
            b = jax.random.uniform(key_b, (r, *out_shape), dtype, -bound, bound)
        else:
            b = jnp.zeros((r, *out_shape), dtype)
        return {LORA_A: a, LORA_B: b}

    return jax.vmap(one)(names)


def delta(x: Array, lora_a: Array, lora_b: Array, scaling: float, dtype: Any) -> Array:
    """Scaling * (x A) B, the low-rank product kept apart from the weight.

    Args:
        x: (..., *in), the contracted axes last.
        lora_a: (r, *in).
        lora_b: (r, *out).
        scaling: the factor on the product.
        dtype: of the computation and of the result.

    Returns:
        (..., *out).
    """
    r, out_shape = lora_b.shape[0], lora_b.shape[1:]
    leading = x.shape[: x.ndim - (lora_a.ndim - 1)]
    # Matrices, not batches of them: the factors' gradients sum over all tokens, and XLA transposes
    # the activations first where that sum runs over more than one axis.
    rows = x.reshape(-1, math.prod(lora_a.shape[1:])).astype(dtype)
    low = lax.dot_general(rows, lora_a.reshape(r, -1).astype(dtype), (((1,), (1,)), ((), ())))
    low = low * jnp.asarray(scaling, dtype)  # here it costs r products a token, after B `out`
    return (low @ lora_b.reshape(r, -1).astype(dtype)).reshape(*leading, *out_shape)


def dropout(x: Array, rate: float, key: Array) -> Array:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate)."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def stacks_of(sites: Iterable[Site]) -> dict[str, int]:
    """Path of each stacked module -> number of its layers."""
    return {s.stack: math.prod(s.batch_shape) for s in sites if s.stack is not None}


def iter_names(targets: Iterable[Target]) -> Iterator[tuple[str, Target]]:
    """Each adapted layer's own path, with the target that it belongs to."""
    for target in targets:
        for name in target.site.names:
            yield name, target
