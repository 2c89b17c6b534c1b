"""A model of the table as it was and as jlora injects it, in one form for Linen and NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.core import meta

import jlora


def bits(tree):
    """Copies of all arrays, out of their boxes."""
    return jax.tree.map(np.array, meta.unbox(tree))


def assert_same_bits(got, expected):
    """Bit by bit, and one structure."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def assert_close(got, expected, tolerance=1e-5):
    """Within a part of the largest value."""
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


class Linen:
    """The module, its variables, the injected module, and its tree on these parameters."""

    def __init__(self, row, config):
        self.row, self.config = row, config
        self.module, self.variables = row.build()
        self.injected = jlora.inject(self.module, config)
        init = jax.jit(lambda: self.injected.init(jax.random.key(1), *row.inputs()))
        fresh, _ = jlora.partition(init()["params"])
        tree = jlora.combine(fresh, self.variables["params"])
        self.adapters, self.base = jlora.partition(tree)
        self.before = bits(self.variables["params"])

    def given(self, params):
        """The module's variables with other parameters."""
        return {**self.variables, "params": params}

    def tree(self, adapters):
        return jlora.combine(adapters, self.base)

    def plain(self, run, params=None):
        """run(model, variables) of the model as it was; `params` in place of its own."""
        return run(self.module, self.given(self.variables["params"] if params is None else params))

    def adapted(self, run, adapters):
        """The same of the injected model with `adapters`."""
        return run(self.injected, self.given(self.tree(adapters)))

    def merged(self, adapters):
        """Return what `plain` takes, with the adapters in the weights."""
        merged = jlora.merge(self.injected, self.tree(adapters))
        assert jax.tree.structure(merged) == jax.tree.structure(self.variables["params"])
        return merged

    def assert_restored(self, adapters):
        """The base's bits are those of before, and so is the module."""
        _, rest = jlora.partition(self.tree(adapters))
        rest = {k: v for k, v in rest.rest.items() if k in self.base.rest}
        assert_same_bits(bits(rest), bits(self.base.rest))
        assert_same_bits(bits(self.variables["params"]), self.before)
        assert jlora.eject(self.injected) == self.module


class Nnx:
    """A model that is injected in place, and another of the same build as it was."""

    def __init__(self, row, config):
        self.row, self.config = row, config
        self.model, _ = row.build()
        self.graphdef = nnx.graphdef(self.model)
        self.before = bits(nnx.to_pure_dict(nnx.state(self.model)))
        self.params = nnx.state(nnx.clone(self.model))
        jlora.inject(self.model, config, rngs=nnx.Rngs(0), inputs=row.inputs())
        self.adapters, self.base = jlora.partition(self.model)

    def plain(self, run, params=None):
        """run(model, None) of the model as it was; `params`, a state, in place of its own."""
        model = nnx.merge(self.graphdef, self.params if params is None else params, copy=True)
        return run(model, None)

    def adapted(self, run, adapters):
        """The same of the injected model with `adapters`."""
        return run(jlora.combine(adapters, self.base), None)

    def merged(self, adapters):
        """Return what `plain` takes, with the adapters in the weights."""
        merged = jlora.merge(jlora.combine(adapters, self.base))
        assert nnx.graphdef(merged) == self.graphdef
        return nnx.state(merged)

    def assert_restored(self, adapters):
        """The model without its factors is the one of before, bit by bit."""
        model = jlora.combine(adapters, self.base)
        jlora.eject(model)
        assert nnx.graphdef(model) == self.graphdef
        assert_same_bits(bits(nnx.to_pure_dict(nnx.state(model))), self.before)


def subject(row, config):
    """Build and inject a model."""
    model, _ = row.build()
    return (Linen if isinstance(model, nn.Module) else Nnx)(row, config)


def train(subject, steps, rate):
    """Fit fixed labels drawn at random.

    Returns:
        the adapters, the loss of each step, and the gradients of the last.
    """
    run, tx = subject.row.call, optax.adamw(rate)
    shape = jax.eval_shape(lambda a: subject.adapted(run, a), subject.adapters).shape
    labels = np.random.default_rng(3).integers(0, shape[-1], shape[:-1])

    @jax.jit
    def step(adapters, state):
        def loss(adapters):
            logits = subject.adapted(run, adapters).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value, grads

    adapters, losses = subject.adapters, []
    state = tx.init(adapters)
    for _ in range(steps):
        adapters, state, loss, grads = step(adapters, state)
        losses.append(float(loss))
    return adapters, losses, grads
