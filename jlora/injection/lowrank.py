"""A weight with a low-rank update on its way through a function: W, A and B side by side.

What only rearranges W is done to each of them; where W is contracted, or its rows are looked up,
the thin products are added to W's own. Each rule gives the outputs of an equation of a jaxpr, or
None where it needs the whole value.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora import adapter
from jlora.errors import JloraError

_log = logging.getLogger("jlora")


@dataclasses.dataclass(frozen=True)
class Use:
    """How one contraction uses a weight; axes of the weight as it is stored, in increasing order.

    An axis of size one that was dropped on the way counts as an output axis.
    """

    contracting: tuple[int, ...]
    """Summed over with the input."""
    output: tuple[int, ...]
    """Become axes of the output."""
    batch: tuple[int, ...] = ()
    """Shared with the input, not summed over: experts."""
    layers: int = 0
    """Number of leading axes, in none of the others, that a scan (or an index) slices off."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lora_a", "lora_b"],
    meta_fields=["scaling", "contracting", "output", "batch"],
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The update scaling·BA of one weight, each of whose axes has one of three roles.

    A pytree of its factors. The axes of each role are in increasing order.
    """

    lora_a: Array
    """(*batch, r, *contracting)."""
    lora_b: Array
    """(*batch, r, *output)."""
    scaling: float
    contracting: tuple[int, ...]
    output: tuple[int, ...]
    batch: tuple[int, ...] = ()
    """Each index along these has factors of its own: experts, and the layers of a stack."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b"],
    meta_fields=["axes", "layers", "path", "shape", "note", "scaling"],
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight on its way through the function: the value is base + scaling * sum_r a * b."""

    base: Array
    """(*dims): the weight itself, as it is by now."""
    a: Any
    """(r, *dims) with 1 in place of the output axes; None where uses are only looked for."""
    b: Any
    """(r, *dims) with 1 in place of the contracted axes."""
    axes: tuple[tuple[tuple[int, int], ...], ...]
    """For each axis of base, the parts it is merged of: (axis of the stored weight, size)."""
    layers: int
    """Leading axes of the stored weight that scans have sliced off."""
    path: str
    shape: tuple[int, ...]
    """Of the stored weight."""
    note: Callable[[str, Any], None]
    scaling: float

    def moved(self, base: list[Array], axes: Any, *moves: Callable, **other: Any) -> "Weight":
        """The weight after a rearrangement; `moves` are those of a and of b."""
        if self.a is not None:
            other |= {"a": moves[0](self.a), "b": moves[1](self.b)}
        return dataclasses.replace(self, base=base[0], axes=tuple(axes), **other)

    def ordered(
        self, contracting: Sequence[int], output: Sequence[int], batch: Sequence[int] = ()
    ) -> tuple[Array, Array] | None:
        """Factors (*batch, r, in) and (*batch, r, out), as matrices; None if the roles don't fit.

        Which of the two factors is contracted first is all the same: a tied embedding's logits
        contract the axis that is the output of its look-up.
        """
        dims = self.base.shape
        for first, second in ((self.a, self.b), (self.b, self.a)):
            apart = all(second.shape[i + 1] == 1 for i in contracting)
            apart = apart and all(first.shape[i + 1] == 1 for i in output)
            if apart and all(f.shape[i + 1] == dims[i] for i in batch for f in (first, second)):
                order = [i + 1 for i in (*batch, -1, *contracting, *output)]
                heads = [*(dims[i] for i in batch), first.shape[0]]
                return (
                    first.transpose(order).reshape(*heads, math.prod(dims[i] for i in contracting)),
                    second.transpose(order).reshape(*heads, math.prod(dims[i] for i in output)),
                )
        return None


def start(path: str, x: Any, note: Any, a: Any = None, b: Any = None, s: float = 1.0) -> Weight:
    """The weight as the function receives it."""
    axes = tuple(((i, size),) for i, size in enumerate(x.shape))
    return Weight(x, a, b, axes, 0, path, tuple(x.shape), note, s)


def check(path: str, shape: tuple[int, ...], update: LowRank) -> None:
    roles = (update.batch, update.contracting, update.output)
    ordered = all(list(axes) == sorted(axes) for axes in roles)
    if not ordered or sorted(sum(roles, ())) != list(range(len(shape))):
        raise JloraError(
            f"{path}: each axis of {shape} must be contracting, output or batch, once and in "
            f"increasing order, not {update.contracting}, {update.output} and {update.batch}"
        )
    heads, ins, outs = (tuple(shape[i] for i in axes) for axes in roles)
    r = update.lora_a.shape[len(heads)] if update.lora_a.ndim > len(heads) else 1
    wanted = {"lora_a": (*heads, r, *ins), "lora_b": (*heads, r, *outs)}
    found = {name: tuple(getattr(update, name).shape) for name in wanted}
    if wanted != found:
        raise JloraError(f"{path}: factors of shapes {found}, where the weight needs {wanted}")


def spread(
    factor: Array, shape: tuple[int, ...], batch: tuple[int, ...], own: tuple[int, ...]
) -> Array:
    """(*batch, r, *own) -> (r, *shape), with 1 in place of the axes that the factor lacks."""
    held = [*batch, -1, *own]
    factor = factor.transpose(sorted(range(len(held)), key=held.__getitem__))
    return factor.reshape(-1, *(size if i in held else 1 for i, size in enumerate(shape)))


@functools.cache
def warn(path: str, primitive: str) -> None:
    message = (
        "%s: W + s·BA is formed for %r, which needs the whole weight; it costs time and memory"
    )
    _log.warning(message, path, primitive)


def full(value: Any, name: str) -> Any:
    """The array that a value stands for; `name` is what needs it."""
    if not isinstance(value, Weight):
        return value
    value.note(value.path, name)
    if value.a is None:
        return value.base
    # Over r as a dot, or the product of all three sizes might be written out.
    axes = range(1, value.base.ndim + 1)
    a, b = (
        (f.astype(jnp.float32).squeeze(gone), [0, *(i for i in axes if i not in gone)])
        for f in (value.a, value.b)
        for gone in [tuple(i for i in axes if f.shape[i] != value.base.shape[i - 1])]
    )
    product = jnp.einsum(*a, *b, list(axes), precision=lax.Precision.HIGHEST)
    whole = value.base.astype(jnp.float32) + jnp.float32(value.scaling) * product
    return whole.astype(value.base.dtype)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _same(eqn: Any, values: list[Any]) -> list[Any] | None:
    """What changes the weight in dtype or place alone."""
    weight = values[0]
    if len(values) > 1 or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
        return None
    return [dataclasses.replace(weight, base=bind(eqn, [weight.base])[0])]


def _each(eqn: Any, values: list[Any]) -> list[Any]:
    """What has the same meaning for W and its factors."""
    if eqn.primitive.name == "stop_gradient":
        return [jax.tree.map(lax.stop_gradient, x) for x in values]
    return list(lax.optimization_barrier(values))


def _transpose(eqn: Any, values: list[Any]) -> list[Any]:
    (weight,), order = values, eqn.params["permutation"]

    def move(f: Array) -> Array:
        return f.transpose(0, *(i + 1 for i in order))

    return [weight.moved(bind(eqn, [weight.base]), [weight.axes[i] for i in order], move, move)]


def _reshape(eqn: Any, values: list[Any]) -> list[Any] | None:
    """Also squeezes, and new axes of size one. An axis may not come to hold two roles."""
    weight, dims, name = values[0], eqn.outvars[0].aval.shape, eqn.primitive.name
    parts: Any
    if name == "squeeze":
        parts = [x for i, x in enumerate(weight.axes) if i not in eqn.params["dimensions"]]
    elif math.prod(dims) != weight.base.size or 0 in dims or len(values) > 1:
        return None  # a broadcast proper, or sizes known at run time alone
    elif name == "broadcast_in_dim":
        old = dict(zip(eqn.params["broadcast_dimensions"], weight.axes, strict=True))
        parts = [old.get(i, ()) for i in range(len(dims))]
    else:
        parts = _regroup(weight.axes, dims)
    if parts is None or (name == "reshape" and eqn.params["dimensions"] is not None):
        return None
    moves = []
    for f in (weight.a, weight.b) if weight.a is not None else ():
        held = {i for x, n in zip(weight.axes, f.shape[1:], strict=True) if n > 1 for i, _ in x}
        mine = [{i in held for i, size in x if size > 1} for x in parts]
        if any(len(x) > 1 for x in mine):
            return None
        shape = [n if True in x else 1 for n, x in zip(dims, mine, strict=True)]
        moves.append(lambda f, shape=shape: f.reshape(f.shape[0], *shape))
    return [weight.moved(bind(eqn, [weight.base]), parts, *moves)]


def _regroup(axes: Any, dims: tuple[int, ...]) -> list[Any] | None:
    """The parts of each axis after a reshape to `dims`; None where no part is whole."""
    left = [part for parts in axes for part in parts]
    result = []
    for n in dims:
        parts: list[tuple[int, int]] = []
        while n > 1 or (not parts and left and left[0][1] == 1):
            axis, size = left.pop(0)
            take = math.gcd(size, n)
            if take not in (size, n):
                return None
            if take < size:
                left.insert(0, (axis, size // take))
            parts.append((axis, take))
            n //= take
        result.append(tuple(parts))
    return result


def _slice(eqn: Any, values: list[Any]) -> list[Any] | None:
    """A part of some axes: one layer of a stack, one matrix of a fused kernel."""
    weight, dims = values[0], eqn.outvars[0].aval.shape
    cut = [n != size for n, size in zip(dims, weight.base.shape, strict=True)]
    if 0 in dims or any(c and len(x) != 1 for c, x in zip(cut, weight.axes, strict=True)):
        return None
    axes = [((x[0][0], n),) if c else x for c, n, x in zip(cut, dims, weight.axes, strict=True)]

    def move(f: Array) -> Array:
        mine = [c and n > 1 for c, n in zip(cut, f.shape[1:], strict=True)]
        if eqn.primitive.name == "dynamic_slice":
            starts = [i if m else 0 for m, i in zip(mine, values[1:], strict=True)]
            sizes = [n if m else k for m, n, k in zip(mine, dims, f.shape[1:], strict=True)]
            return lax.dynamic_slice(f, [0, *starts], [f.shape[0], *sizes])
        starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
        steps = eqn.params["strides"] or [1] * len(dims)
        where = [slice(*x) for x in zip(starts, stops, steps, strict=True)]
        return f[:, *(w if m else slice(None) for w, m in zip(where, mine, strict=True))]

    return [weight.moved(bind(eqn, [weight.base, *values[1:]]), axes, move, move)]


def _dot_general(eqn: Any, values: list[Any]) -> list[Any] | None:
    side = 1 if isinstance(values[1], Weight) else 0
    weight, x = values[side], full(values[1 - side], "dot_general")
    summed, heads = eqn.params["dimension_numbers"]
    contracting, batch = summed[side], heads[side]
    output = [i for i in range(weight.base.ndim) if i not in (*contracting, *batch)]
    operands = (x, weight.base) if side else (weight.base, x)
    if weight.a is None:
        weight.note(weight.path, _use(weight, contracting, output, batch))
        return bind(eqn, operands)
    factors = weight.ordered(contracting, output, batch)
    if factors is None:
        return None
    (plain,) = bind(eqn, operands)
    wide = max(
        x.dtype, weight.base.dtype, key=lambda d: (jnp.issubdtype(d, jnp.inexact), d.itemsize)
    )
    dtype = wide if wide.itemsize > 1 else plain.dtype  # eight bits are too few to sum in
    free = [i for i in range(x.ndim) if i not in (*summed[1 - side], *heads[1 - side])]
    low = functools.partial(adapter.delta, scaling=weight.scaling, dtype=dtype)
    for _ in batch:
        low = jax.vmap(low)
    n, k = len(batch), len(free)
    rows = x.transpose(*heads[1 - side], *free, *summed[1 - side])
    shape = rows.shape[: n + k]
    rows = rows.reshape(*shape[:n], math.prod(shape[n:]), factors[0].shape[-1])
    with _precision(eqn.params["precision"]):
        out = low(rows, *factors).reshape(*shape, *(weight.base.shape[i] for i in output))
    if side == 0:  # the weight's axes come first
        out = jnp.moveaxis(out, range(n, n + k), range(out.ndim - k, out.ndim))
    return [plain + out.astype(plain.dtype)]


def _precision(precision: Any) -> Any:
    """The context in which dots have the precision of an equation."""
    name = getattr(precision[0] if isinstance(precision, tuple) else precision, "name", None)
    return nullcontext() if name is None else jax.default_matmul_precision(name.lower())


def _use(
    weight: Weight, contracting: Sequence[int], output: Sequence[int], batch: Sequence[int]
) -> Use | str:
    """The contraction in terms of the stored weight, or its name where an axis has two roles."""
    found = [{i for k in role for i, _ in weight.axes[k]} for role in (contracting, output, batch)]
    gone = set(range(weight.layers, len(weight.shape))).difference(*found)
    found[1] |= {i for i in gone if weight.shape[i] == 1}
    cut = gone - found[1]  # by an index, one layer at a time
    layers = weight.layers + len(cut)
    leading = cut == set(range(weight.layers, layers))
    if not leading or sum(map(len, found)) + layers != len(weight.shape):
        return "dot_general"
    contracted, out, shared = (tuple(sorted(axes)) for axes in found)
    return Use(contracted, out, shared, layers)


def _gather(eqn: Any, values: list[Any]) -> list[Any] | None:
    """Rows of the weight: those of one factor are looked up, then multiplied by the other."""
    weight, ids = values
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    rows = numbers.start_index_map
    rest = [i for i in range(weight.base.ndim) if i not in rows]
    whole = all(p["slice_sizes"][i] == weight.base.shape[i] for i in rest)
    whole = whole and rows == numbers.collapsed_slice_dims and len(rows) == 1
    factors = weight.ordered(rows, rest) if weight.a is not None and whole else None
    if factors is None or numbers.operand_batching_dims:
        return None
    first, second = (f.astype(weight.base.dtype) for f in factors)
    thin = lax.GatherDimensionNumbers((ids.ndim - 1,), (1,), (1,))
    # Filled with 0: the weight's own rows are filled as they should be.
    low = lax.gather(first, ids, thin, (first.shape[0], 1), mode=p["mode"], fill_value=0)
    out = jnp.tensordot(low * jnp.asarray(weight.scaling, low.dtype), second, 1)
    out = out.reshape(*ids.shape[:-1], *(weight.base.shape[i] for i in rest))
    out = jnp.moveaxis(out, range(ids.ndim - 1, out.ndim), numbers.offset_dims)
    (plain,) = bind(eqn, [weight.base, ids])
    return [plain + out]


ARRAY_RULES: dict[str, Callable[[Any, list[Any]], list[Any] | None]] = {
    **dict.fromkeys(("convert_element_type", "copy", "copy_p", "name", "device_put"), _same),
    **dict.fromkeys(("sharding_constraint", "layout_constraint", "reshard"), _same),
    **dict.fromkeys(("stop_gradient", "optimization_barrier"), _each),
    **dict.fromkeys(("reshape", "squeeze", "broadcast_in_dim"), _reshape),
    **dict.fromkeys(("slice", "dynamic_slice"), _slice),
    "transpose": _transpose,
    "dot_general": _dot_general,
    "gather": _gather,
}
