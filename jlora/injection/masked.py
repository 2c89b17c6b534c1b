"""Whole trees in optax, of which the adapters alone are trained."""

from typing import Any

import jax
import optax
from flax import nnx

from jlora.injection import params


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for the adapters in a whole tree: the base gets no state, and updates of zero.

    For Linen's trees of parameters (nn.Partitioned or not) and NNX's states; where adapters alone
    are differentiated, as `partition` gives them, `tx` itself is what is needed. Of trees with
    quantised weights take the gradient with allow_int=True, and give `update` the parameters.
    """

    def labels(tree: Any) -> Any:
        def label(path: tuple, leaf: Any) -> str:
            names = [str(key.key) for key in path if hasattr(key, "key")]  # not those within a box
            by_name = bool(names) and params.is_trained(names[-1])
            trained = isinstance(leaf, nnx.LoRAParam) or by_name
            return "adapters" if trained else "base"

        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        return jax.tree_util.tree_map_with_path(label, tree, is_leaf=is_variable)

    nothing = optax.stateless(params.no_updates)
    return optax.partition({"adapters": tx, "base": nothing}, labels)
