"""NNX models whose own code uses weights, in plain parameters or of layers: found by tracing."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jlora.adapter import Site
from jlora.injection import plain
from jlora.injection.lowrank import Use
from jlora.injection.nnx_call import Call
from jlora.injection.nnx_tree import KEPT
from jlora.paths import join
from jlora.quant.array import QuantArray


def find_uses(
    model: nnx.Module, call: Any, args: Sequence[Any], kwargs: Mapping[str, Any], own: Any
) -> dict[str, list[Use | str]]:
    """Find how a method of a model uses each of its weights, which computes nothing.

    Args:
        model: is traced.
        call: the method.
        args: of the call, arrays or their shapes.
        kwargs: likewise.
        own: (copy of the model) -> None, that has each layer mark what its own call reads.

    Returns:
        path of each parameter with two axes or more -> its uses.
    """
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    weights = {
        join(keys): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for keys, leaf in flat
        if len(leaf.shape) > 1
        and not isinstance(leaf, nnx.LoRAParam)
        and not isinstance(leaf.get_value(), QuantArray)
        and not str(keys[-1]).startswith(KEPT)
    }
    uses = getattr(model, "lora_uses", None)
    token = None if uses is None else uses.token
    function = Call(model, weights, call, args, kwargs, token=token, prepare=own)
    return plain.find_uses(function, weights, function.rest, *function.args, **function.kwargs)


def sites(uses: Mapping[str, Sequence[Use | str]], shapes: Any, known: set[str]) -> list[Site]:
    """Make the sites of the parameters that no layer's are, of what `find_uses` found.

    Args:
        uses: path of each parameter -> its uses.
        shapes: path of each parameter -> its shape.
        known: paths of layers, whose parameters are their own.
    """
    found = (
        plain.site(path, shapes[path], each)
        for path, each in uses.items()
        if path.rpartition("/")[0] not in known
    )
    return [site for site in found if site is not None]
