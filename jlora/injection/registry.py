"""How layer types use their weights; each flavour of Flax keeps a table of its own types."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora import adapter
from jlora.adapter import Site, split_equation
from jlora.config import QuantConfig
from jlora.errors import JloraError
from jlora.quant import checks, matmul
from jlora.quant import quantize as quantise
from jlora.quant.array import QuantArray


@dataclasses.dataclass(frozen=True)
class LayerType:
    """What adapters need to know of a type of layer."""

    weight: str
    """Name of the weight in the layer."""
    bias: str | None = "bias"
    """Name of what the layer adds to its output, where it has that."""
    methods: ClassVar[tuple[str, ...]] = ("__call__",)
    """Methods that use the weight; each takes the input first."""

    def equation(self, layer: Any, *args: Any, **kwargs: Any) -> str:
        """Input, weight -> output as for einsum; without arguments, leading axes are "..."."""
        raise NotImplementedError

    def site(self, layer: Any, path: str, shape: tuple[int, ...], *args: Any, **kw: Any) -> Site:
        """The site of a layer whose weight has `shape`; axes beyond its own stack layers."""
        inputs, weight, out = split_equation(self.equation(layer, *args, **kw))
        if "..." in weight or len(weight) > len(shape):
            raise JloraError(f"{path}: the equation does not fit a weight of shape {shape}")
        extra = len(shape) - len(weight)
        at = {c: i + extra for i, c in enumerate(weight)}
        return Site(
            path=path,
            shape=shape,
            contracting=tuple(at[c] for c in weight if c not in out),
            output=tuple(at[c] for c in weight if c not in inputs),
            batch=(*range(extra), *(at[c] for c in weight if c in inputs and c in out)),
            stacked=extra,
            weight=self.weight,
        )

    def delta(
        self,
        layer: Any,
        method: str,
        args: tuple,
        kwargs: dict[str, Any],
        factors: tuple[jax.Array, jax.Array],
        scaling: Any,
        dtype: Any,
    ) -> jax.Array:
        """The low-rank term of the layer's output for these arguments."""
        equation = self.equation(layer, *args, **kwargs)
        return adapter.delta(args[0], *factors, scaling, dtype, equation)

    def quantised(
        self, layer: Any, q: QuantArray, bias: Any, args: tuple, kwargs: dict[str, Any]
    ) -> jax.Array:
        """The layer's whole output for a quantised weight, which its own code could not read.

        Raises:
            JloraError: a type whose weight cannot be quantised.
        """
        raise JloraError(
            f"the weight of {type(layer).__name__} cannot be quantised: only those of layers that "
            "are an einsum of their input and their weight are"
        )


@dataclasses.dataclass(frozen=True)
class Contraction(LayerType):
    """A layer that is an einsum of its input and its weight."""

    weight: str = "kernel"
    form: str | Callable[..., str] = "...i,io->...o"
    """The equation, or what gives it for (layer, *args, **kwargs) of a call."""
    claimed: bool = False
    """Whether a user says so: it is then compared with what the layer's calls do."""

    def equation(self, layer: Any, *args: Any, **kwargs: Any) -> str:
        """Input, weight -> output."""
        return self.form if isinstance(self.form, str) else self.form(layer, *args, **kwargs)

    def quantised(
        self, layer: Any, q: QuantArray, bias: Any, args: tuple, kwargs: dict[str, Any]
    ) -> jax.Array:
        """The einsum and the bias, in the dtype and precision of Flax's own layers."""
        equation = self.equation(layer, *args, **kwargs)
        x = jnp.asarray(args[0])
        own = getattr(layer, "dtype", None)
        others = () if bias is None else (bias,)
        dtype = jnp.result_type(x, q.dtype, *others) if own is None else own
        precision = getattr(layer, "precision", None)
        y = matmul.contract(x, q, equation, dtype=dtype, precision=precision)
        if bias is None:
            return y
        _, weight, out = split_equation(equation)
        at = out.index("...") if "..." in out else len(out)
        out[at : at + 1] = "." * (y.ndim - len(out) + 1) if "..." in out else ""
        # A bias has the axes that the output has from the weight, in the output's order.
        own_axes = [size if c in weight else 1 for c, size in zip(out, y.shape, strict=True)]
        return y + bias.astype(dtype).reshape(own_axes)


@dataclasses.dataclass(frozen=True)
class Lookup(LayerType):
    """An embedding: rows of the weight by index; `attend` multiplies by its transpose."""

    weight: str = "embedding"
    bias: str | None = None
    methods: ClassVar[tuple[str, ...]] = ("__call__", "attend")

    def equation(self, layer: Any, *args: Any, **kwargs: Any) -> str:
        """That of `attend`: the rows are what indices choose among."""
        return "...o,io->...i"

    def site(self, layer: Any, path: str, shape: tuple[int, ...], *args: Any, **kw: Any) -> Site:
        """Rows are the contracted axis, as if indices were one-hot."""
        linear = Contraction(self.weight).site(layer, path, shape)
        return dataclasses.replace(linear, kind="embedding")

    def delta(
        self,
        layer: Any,
        method: str,
        args: tuple,
        kwargs: dict[str, Any],
        factors: tuple[jax.Array, jax.Array],
        scaling: Any,
        dtype: Any,
    ) -> jax.Array:
        """Rows of A B, or the query times their transpose."""
        if method == "attend":
            return adapter.delta(args[0], factors[1], factors[0], scaling, dtype)
        return adapter.delta_rows(args[0], *factors, scaling, dtype)


@dataclasses.dataclass(frozen=True)
class Convolution(LayerType):
    """A convolution: A is one with r output channels, B mixes these (as in PEFT).

    Each group of channels has the same A, on its own inputs.
    """

    weight: str = "kernel"
    run: Callable[[Any, jax.Array, jax.Array, int], jax.Array] = None  # type: ignore[assignment]
    """(layer, x, kernel, features) -> the layer's convolution of x with another kernel, no bias."""

    def site(self, layer: Any, path: str, shape: tuple[int, ...], *args: Any, **kw: Any) -> Site:
        """The window and the inputs are contracted."""
        extra = len(shape) - len(window(layer)) - 2
        last = len(shape) - 1
        return Site(
            path=path,
            shape=shape,
            contracting=tuple(range(extra, last)),
            output=(last,),
            batch=tuple(range(extra)),
            stacked=extra,
            weight=self.weight,
            kind="convolution",
            peculiar=_peculiar(layer),
        )

    def delta(
        self,
        layer: Any,
        method: str,
        args: tuple,
        kwargs: dict[str, Any],
        factors: tuple[jax.Array, jax.Array],
        scaling: Any,
        dtype: Any,
    ) -> jax.Array:
        """The convolution with A, then B at each place."""
        lora_a, lora_b = factors
        r, groups = lora_a.shape[0], layer.feature_group_count
        if layer.mask is not None:  # it is of the kernel's shape, and of no low rank
            kernel = jnp.einsum("r...,ro->...o", lora_a, lora_b).astype(dtype) * layer.mask
            kernel = kernel * jnp.asarray(scaling, dtype)
            return self.run(layer, args[0].astype(dtype), kernel, kernel.shape[-1]).astype(dtype)
        kernel = jnp.tile(jnp.moveaxis(lora_a.astype(dtype), 0, -1), groups)
        low = self.run(layer, args[0].astype(dtype), kernel, groups * r).astype(dtype)
        low = low.reshape(*low.shape[:-1], groups, r) * jnp.asarray(scaling, dtype)
        term = jnp.einsum("...gr,rgo->...go", low, lora_b.astype(dtype).reshape(r, groups, -1))
        return term.reshape(*low.shape[:-2], -1)


def _peculiar(layer: Any) -> str:
    """In what PEFT's update of a convolution, another convolution, is not ours."""
    if layer.feature_group_count > 1:
        return "a convolution in groups, whose update in PEFT mixes them"
    if layer.mask is not None:
        return "a convolution with a mask, which torch's have not"
    for name in ("kernel_dilation", "input_dilation"):
        sizes = getattr(layer, name)
        if any(size != 1 for size in ((sizes,) if isinstance(sizes, int) else sizes or ())):
            return f"a convolution with {name}, which PEFT's update leaves out"
    if layer.padding in ("CIRCULAR", "REFLECT"):
        return f"a convolution with padding {layer.padding}, which PEFT's update leaves out"
    return ""


def quantize(site: Site, weight: Any, config: QuantConfig) -> QuantArray:
    """A site's weight, stacked or not, as `config` says."""
    ndim, own = len(site.shape), site.batch[site.stacked :]
    contracting, output, batch = (
        tuple(axis - ndim for axis in axes) for axes in (site.contracting, site.output, own)
    )
    return quantise.quantize(
        weight,
        kind=config.kind,
        block_size=config.block_size,
        double_quant=config.double_quant,
        contracting=contracting,
        output=output,
        batch=batch,
        path=site.weight_path,
    )


def check_weight(site: Site, weight: Any, config: QuantConfig) -> None:
    """Demand that `quantize` can be given a site's weight, which it doesn't change.

    Raises:
        JloraError: it is of no float dtype, is empty, or is not finite.
    """
    checks.options(weight, config.kind, config.block_size, config.double_quant, site.path)
    checks.finite(_largest(weight), weight, site.path)


@jax.jit
def _largest(weight: jax.Array) -> jax.Array:
    """Infinite where a value is not a number, which XLA:CPU's maximum passes over."""
    weight = weight.astype(jnp.float32)
    return jnp.where(jnp.isnan(weight), jnp.inf, jnp.abs(weight)).max()


def own_code(q: QuantArray, run: Callable[[jax.Array], Any]) -> Any:
    """What a layer's own code gives for a quantised weight, which is dequantised for it alone.

    The backward pass dequantises again rather than keep the array; the weight gets no gradient.
    """
    return jax.checkpoint(lambda q: run(jax.lax.stop_gradient(q.dequantize())))(q)


def abstract(weight: Any) -> Any:
    """A weight, or the shape and dtype that a quantised one stands for."""
    if isinstance(weight, QuantArray):
        return jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    return weight


def check_options(layer: Any, path: str, usual: Mapping[str, Any]) -> None:
    """Demand that a layer of Flax's multiplies in the way of its type.

    Args:
        layer: the layer.
        path: of it.
        usual: options that would change how, and what they are where they don't.

    Raises:
        JloraError: it has an option of its own.
    """
    for name in ("dot_general", "dot_general_cls", "preferred_element_type", *usual):
        if getattr(layer, name, None) not in (usual.get(name), None):
            raise JloraError(
                f"{path}: {name} of this {type(layer).__name__} is one of its own, with which a "
                "quantised weight is not multiplied; leave the layer out (exclude_modules)"
            )


def float32(weight: Any) -> jax.Array:
    """A weight, quantised or not, in float32."""
    if isinstance(weight, QuantArray):
        return weight.dequantize(jnp.float32)
    return weight.astype(jnp.float32)


def check_equation(equation: str) -> None:
    """Demand "input,weight->output" in which each letter of the weight has one role.

    Raises:
        JloraError: it is something else.
    """
    inputs, weight, out = split_equation(equation)
    one_each = all(len(set(term)) == len(term) for term in (inputs, weight, out))
    whole = equation.replace(" ", "") == f"{''.join(inputs)},{''.join(weight)}->{''.join(out)}"
    used = all((c in inputs) or (c in out) for c in weight)
    made = all((c in inputs) or (c in weight) for c in out)
    if not (whole and weight and one_each and used and made):
        raise JloraError(
            f"{equation!r} is no equation of input, weight and output, such as '...i,io->...o': "
            "each letter of the weight is one of the input's, of the output's or of both"
        )


def token_term(
    method: str, x: jax.Array, indices: tuple[int, ...], rows: jax.Array, y: jax.Array
) -> jax.Array:
    """What trained rows (n, D) at `indices` add to an embedding's output for the input `x`."""
    if method == "attend":
        logits = x.astype(y.dtype) @ rows.astype(y.dtype).T
        return jnp.zeros_like(y).at[..., jnp.asarray(indices)].set(logits)
    hits = x[..., None] == jnp.asarray(indices, x.dtype)
    return hits.astype(y.dtype) @ rows.astype(y.dtype)


def window(layer: Any) -> tuple[int, ...]:
    """Sizes of a convolution's window."""
    size = layer.kernel_size
    return (size,) if isinstance(size, int) else tuple(size)


def general(ndim: int | None, axis: Iterable[int], batch: Iterable[int], outputs: int) -> str:
    """The equation of DenseGeneral and LinearGeneral.

    Args:
        ndim: of the input; None where it isn't known: the contracted axes then stand last.
        axis: axes of the input that are contracted.
        batch: axes that input, weight and output share.
        outputs: number of output axes.
    """
    axis, batch = tuple(axis), tuple(batch)
    ins, outs = "abcdefgh"[: len(axis)], "ijklmnop"[:outputs]
    shared, free = "qrstuvwx"[: len(batch)], "ABCDEFGHIJKLMNOP"
    if ndim is None:
        return f"{shared}...{ins},{shared}{ins}{outs}->{shared}...{outs}"
    names = dict(zip(sorted(a % ndim for a in batch), shared, strict=True))
    names |= dict(zip(sorted(a % ndim for a in axis), ins, strict=True))
    rest = "".join(free[i] for i in range(ndim) if i not in names)
    inputs = "".join(names.get(i, free[i]) for i in range(ndim))
    return f"{inputs},{shared}{ins}{outs}->{shared}{rest}{outs}"


def own_methods(cls: type, root: type) -> set[str]:
    """Names of the public methods that a class has beyond those of `root`, `__call__` included."""
    return {
        name
        for base in cls.__mro__
        if issubclass(base, root) and base is not root
        for name, value in vars(base).items()
        if inspect.isfunction(value) and (name == "__call__" or not name.startswith("_"))
    }


def find(table: dict[type, LayerType], cls: type) -> LayerType | None:
    """The entry of the nearest registered class that `cls` is or inherits from."""
    return next((table[base] for base in cls.__mro__ if base in table), None)
