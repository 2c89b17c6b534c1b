"""QuantArray: a quantised weight as one value that JAX's transformations carry through."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jlora.errors import JloraError
from jlora.quant import blockwise


class _NoAttributeError(JloraError, AttributeError):
    """So that hasattr() is False, and what is read all the same says why."""


class _NotAnArray:
    """Refuses what would have to dequantise, with one message for all of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise _NoAttributeError(f"{self!r} has no {name!r}. {_ADVICE}")


_ADVICE = (
    "It is a quantised weight, not an array. `.dequantize()` gives the array, as large as it was "
    "before; so that a layer computes with it as it is, inject or quantise the model through "
    "jlora, which knows its registered layer types."
)
_BINARY = "add sub mul matmul truediv floordiv mod pow"
# JAX and NumPy ask for the first two, and would else say less or make an array of objects.
_REFUSED = ["array", "jax_array", "getitem", "neg", "abs", "lt", "le", "gt", "ge"]
_REFUSED += [prefix + name for name in _BINARY.split() for prefix in ("", "r")]


def _refusal(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise JloraError(f"{self!r} was used as an array ({name}). {_ADVICE}")

    return method


for _name in _REFUSED:
    setattr(_NotAnArray, f"__{_name}__", _refusal(f"__{_name}__"))


class WeightPath(str):
    """Where a weight is, for messages; all are equal, so that like layers share one program."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WeightPath)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, WeightPath)

    def __hash__(self) -> int:
        return 0


_NOWHERE = WeightPath()
PLACES = ("contracting", "output", "batch", "in_shape", "out_shape", "dtype")
"""Where a weight's axes are, and what it is."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "nested_codes", "nested_absmax", "offset"],
    meta_fields=["kind", "block_size", *PLACES, "path"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantArray(_NotAnArray):
    """A weight as codes and scales; a pytree, whose leaves may have more leading axes.

    Those stack layers: a scan over a QuantArray, or a vmap, gives the function that of one layer.
    Below, *batch are these and then the weight's own batch axes, `in` and `out` the products of
    `in_shape` and `out_shape`. The layout is that of `jlora.quant.blockwise`.
    """

    codes: Any
    """uint8 (*batch, in_padded / 2, out); int8 (*batch, in, out) where kind is "int8"."""
    absmax: Any
    """float32 (*batch, blocks, out), one block where kind is "int8"; or None."""
    nested_codes: Any
    """Double quantisation, else None: uint8 (*batch, rows, 256), of absmax (out, blocks)."""
    nested_absmax: Any
    """float32 (*batch, rows), or None."""
    offset: Any
    """float32 (*batch,), or None."""
    kind: str
    """"nf4", "fp4" or "int8"."""
    block_size: int
    """Values of an output that have a scale; all of them where kind is "int8"."""
    contracting: tuple[int, ...]
    """Axes of the weight that are summed over with the input, counted from the end: negative."""
    output: tuple[int, ...]
    """Axes of the weight that become axes of the output, negative."""
    batch: tuple[int, ...]
    """Axes of the weight that input and output share, such as experts, negative."""
    in_shape: tuple[int, ...]
    """Sizes of the contracting axes."""
    out_shape: tuple[int, ...]
    """Sizes of the output axes."""
    dtype: Any
    """That of the weight that was quantised, and of `dequantize()`."""
    path: WeightPath = _NOWHERE
    """Of the weight in its model, where known; it makes no difference but to messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight: axes that stack layers, then its own."""
        leading, own = self._leading()
        sizes = dict(zip(self.contracting, self.in_shape, strict=True))
        sizes |= dict(zip(self.output, self.out_shape, strict=True))
        sizes |= dict(zip(self.batch, own, strict=True))
        return (*leading, *(sizes[axis] for axis in range(-len(sizes), 0)))

    @property
    def ndim(self) -> int:
        """How many axes the weight has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many numbers the weight has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What the codes and scales take."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def matrix(self, dtype: Any = None) -> jax.Array:
        """The weight as (*stack, *batch, in, out), of `dtype` or else its own."""
        return _matrix(self, jnp.dtype(self.dtype if dtype is None else dtype))

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The weight in its own shape and order of axes, of `dtype` or else its own.

        Multiplied in float32 and rounded once: on a CPU the values are those of bitsandbytes.
        """
        leading, own = self._leading()
        w = self.matrix(dtype).reshape(*leading, *own, *self.in_shape, *self.out_shape)
        order = np.argsort((*self.batch, *self.contracting, *self.output))
        return w.transpose(*range(len(leading)), *(len(leading) + order))

    def scales(self) -> jax.Array:
        """absmax, out of its own codes if need be: float32 (*stack, *batch, blocks, out)."""
        if self.absmax is not None:
            return self.absmax
        rows, out = self.codes.shape[-2:]
        blocks = 2 * rows // self.block_size
        nested = self.nested_codes, self.nested_absmax, self.offset
        return blockwise.dequantize_nested(*nested, blocks, out)

    def specs(self, axes: Sequence[Any]) -> "QuantArray":
        """How to shard it like the weight that it stands for.

        For a mesh whose axes are Auto: explicit ones would have to be named at each step within.
        Scales that are quantised run on from one output to the next, and are not divided along
        the inputs. What is divided is whole blocks: say so many that the mesh's axis divides them.

        Args:
            axes: names of mesh axes, or None, for each axis of the weight, those that stack
                layers included: what jax.sharding.PartitionSpec takes.

        Returns:
            A QuantArray of PartitionSpecs.

        Raises:
            JloraError: not one for each axis; one for an axis that is not the first of several
                that are contracted, or that become outputs, together.
        """
        axes = (*axes, *(None,) * (self.ndim - len(axes)))
        inner = [i for group in (self.contracting, self.output) for i in group[1:]]
        if len(axes) > self.ndim or any(axes[i] is not None for i in inner):
            raise JloraError(
                f"{self!r} cannot be divided as {axes}: its inputs are one axis in memory, and so "
                "are its outputs, of which only the first may be divided"
            )
        stacked = self.ndim - len(self.batch) - len(self.contracting) - len(self.output)
        leading = (*axes[:stacked], *(axes[i] for i in self.batch))
        ins, outs = axes[self.contracting[0]], axes[self.output[0]]
        own: dict[str, tuple[Any, ...]] = {"codes": (ins, outs)}
        own |= {"absmax": (ins if self.kind != "int8" else None, outs)}
        own |= {"nested_codes": (outs, None), "nested_absmax": (outs,), "offset": ()}
        specs: dict[str, Any] = {
            name: None if getattr(self, name) is None else PartitionSpec(*leading, *spec)
            for name, spec in own.items()
        }
        return dataclasses.replace(self, **specs)

    def _leading(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of the axes that stack layers, and of the weight's own batch axes."""
        leading = tuple(self.codes.shape[:-2])
        split = len(leading) - len(self.batch)
        return leading[:split], leading[split:]

    def __repr__(self) -> str:
        try:
            shape = str(self.shape)
        except Exception:  # within transformations of trees, leaves can be anything
            shape = "unknown"
        scales = ", double_quant" if self.nested_codes is not None else ""
        where = f", {self.path!s}" if len(self.path) else ""
        return (
            f"QuantArray({self.kind}, shape={shape}, dtype={self.dtype}, "
            f"block_size={self.block_size}{scales}{where})"
        )


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _matrix(q: QuantArray, dtype: Any) -> jax.Array:
    if q.kind == "int8":
        return blockwise.dequantize8(q.codes, q.absmax, dtype)
    return blockwise.dequantize4(q.codes, q.scales(), q.kind, math.prod(q.in_shape), dtype)
