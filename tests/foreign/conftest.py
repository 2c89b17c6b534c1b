"""Of each compiled function a handful of calls is made: XLA's optimisations cost more than that."""

import jax

jax.config.update("jax_disable_most_optimizations", True)
