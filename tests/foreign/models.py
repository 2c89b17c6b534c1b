"""One table of tiny random models of other libraries, and what each row says of its model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HIDDEN, POSITIONS = 96, 32, 2, 4, 2, 48, 32
DECODED = 3  # tokens
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, VOCAB, (2, 8)))
IMAGES = jnp.asarray(np.random.default_rng(1).random((2, 16, 16, 3)), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, how it is called, and how many sites and parameters `all-linear` trains in it."""

    name: str
    library: str
    build: Callable[[], tuple[Any, Any]]
    """() -> the module and its variables; None for those of NNX."""
    inputs: Callable[[], tuple]
    """() -> the positional arguments of a call."""
    sites: int
    parameters: int
    logits: Callable[[Any], Any] = lambda out: out
    """Take the logits from what a call returns."""
    decode: Callable[[Any, Any], Any] | None = None
    """(module, variables) -> logits (B, DECODED, V), one token after the other through a cache."""
    target_modules: Any = "all-linear"
    rate: float = 3e-2
    """Learning rate of AdamW, 12 steps of which are to lower the loss."""
    unused: tuple[str, ...] = ()
    """Sites that the call does not use, which the library is to say."""

    def call(self, model: Any, variables: Any) -> Any:
        """Return the logits for `inputs`."""
        args = self.inputs()
        out = model(*args) if variables is None else model.apply(variables, *args)
        return self.logits(out)


def positions(tokens):
    """0, 1, 2... for each row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)


def one_by_one(step):
    """Return the logits of the first TOKENS that step(token (B, 1), position) gives for each."""
    each = [step(TOKENS[:, i : i + 1], i) for i in range(DECODED)]
    return jnp.concatenate(each, axis=1)


def table() -> dict[str, Model]:
    """Name -> row, of all libraries."""
    import bonsai_like
    import flax_examples
    import flaxmodels_vision
    import transformers_flax
    import tunix_nnx

    modules = (transformers_flax, tunix_nnx, flax_examples, flaxmodels_vision, bonsai_like)
    return {row.name: row for module in modules for row in module.ROWS}
