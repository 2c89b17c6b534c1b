"""The low-rank term where each row of a batch has factors of its own."""

from typing import Any

import jax

from jlora.adapter import split_equation
from jlora.errors import JloraError
from jlora.injection.registry import Contraction, Convolution, LayerType, window


def delta(
    layer_type: LayerType,
    layer: Any,
    method: str,
    args: tuple,
    kwargs: dict[str, Any],
    factors: tuple[jax.Array, jax.Array],
    scaling: Any,
    dtype: Any,
) -> jax.Array:
    """`layer_type.delta` for factors of each row's own, on an axis before their others.

    Raises:
        JloraError: the rows are not the first axis of the layer's input.
    """
    x, *rest = args
    count = len(factors[0])
    if not _leads(layer_type, layer, method, args, kwargs) or len(x) != count:
        raise JloraError(
            f"a {type(layer).__name__} with an adapter for each of {count} rows was given an input "
            f"of shape {x.shape}: the first axis of what each adapted layer is given must be the "
            "rows that Bank.partition was given; leave the layer out of the bank "
            "(exclude_modules), or run the rows adapter by adapter"
        )

    def one(x: jax.Array, *factors: Any) -> jax.Array:
        # A batch of one, so that the other axes are where the layer has them.
        return layer_type.delta(layer, method, (x[None], *rest), kwargs, factors, scaling, dtype)[0]

    # Batched thin dots. On XLA:CPU one adapter's are no faster where a row is many tokens; where it
    # is one, a single product with the factors of all rows, and what is another row's masked, was
    # 1.3 times slower at rank 8 and twice at 64.
    return jax.vmap(one)(x, *factors)


def _leads(layer_type: LayerType, layer: Any, method: str, args: tuple, kwargs: Any) -> bool:
    """Whether the first axis of the input is also that of the output, and none of the weight."""
    x = args[0]
    if isinstance(layer_type, Contraction):
        inputs, weight, out = split_equation(layer_type.equation(layer, *args, **kwargs))
        free = inputs[0] != "..." or x.ndim > len(inputs) - 1
        return free and inputs[0] not in weight and inputs[0] == out[0]
    if isinstance(layer_type, Convolution):
        return x.ndim > len(window(layer)) + 1
    return x.ndim > (method == "attend")  # a look-up
