"""Compile with less optimisation: each function is called a handful of times."""

import jax

jax.config.update("jax_disable_most_optimizations", True)
