"""The maths of combining adapters at one weight: several low-rank updates become one.

Throughout, A is float32 (n, r, in) and B (n, r, out), where n counts the weight's experts or is 1.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jlora.updates import Update

# Which entries the ways of merging drop.
PRUNED = {
    "magnitude_prune": "smallest",
    "ties": "smallest",
    "dare_linear": "random",
    "dare_ties": "random",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One adapter's part."""

    a: Array
    b: Array
    scaling: float
    weight: float
    key: Array
    """Of what is dropped at random."""


def task(update: Update, weight: float, key: Array) -> Task:
    """The part of `update`."""
    a, b = (x.astype(jnp.float32) for x in update.matrices())
    return Task(a, b, update.scaling, float(weight), key)


def key_of(seed: int, name: str, index: int) -> Array:
    """For the adapter `index` at a weight: what is dropped there depends on no other weight."""
    named = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(named, index)


@dataclasses.dataclass(frozen=True)
class Merge:
    """How the entries of several tensors become those of one."""

    kind: str
    """linear, or one of `PRUNED`."""
    density: float = 1.0
    """The part of each tensor's entries that is kept."""
    majority_sign_method: str = "total"

    def __call__(
        self, tensors: Sequence[Array], weights: Sequence[float], keys: Sequence[Array]
    ) -> Array:
        """Tensors (n, ...), each with a weight and a key -> (n, ...)."""
        if self.kind in PRUNED and self.density < 1:
            keep = _largest if PRUNED[self.kind] == "smallest" else _random
            tensors = [keep(x, self.density, key) for x, key in zip(tensors, keys, strict=True)]
        stack = jnp.stack(tensors)
        weighted = stack * jnp.asarray(weights, jnp.float32).reshape(-1, *[1] * (stack.ndim - 1))
        if "ties" not in self.kind:
            return weighted.sum(0)
        signs = jnp.sign(stack)
        votes = stack if self.majority_sign_method == "total" else signs
        agree = (signs == jnp.where(votes.sum(0) >= 0, 1.0, -1.0)).astype(jnp.float32)
        return (weighted * agree).sum(0) / jnp.maximum(agree.sum(0), 1)


def merged_factors(tasks: Sequence[Task], merge: Merge) -> tuple[Array, Array]:
    """A of the A, and B of the B, of tasks that have one rank."""
    weights = [task.weight * task.scaling for task in tasks]
    roots = [math.sqrt(abs(weight)) for weight in weights]
    # The sign goes to one of the factors: in both, it would be gone from their product.
    signed = [math.copysign(*pair) for pair in zip(roots, weights, strict=True)]
    keys = [jax.random.split(task.key) for task in tasks]
    a = merge([task.a for task in tasks], signed, [key[0] for key in keys])
    b = merge([task.b for task in tasks], roots, [key[1] for key in keys])
    return a, b


def merged_delta(tasks: Sequence[Task], merge: Merge) -> Array:
    """The updates themselves, merged: (n, in, out)."""
    deltas = [jnp.einsum("nri,nro->nio", task.a, task.b) * task.scaling for task in tasks]
    return merge(deltas, [task.weight for task in tasks], [task.key for task in tasks])


def concatenated(tasks: Sequence[Task]) -> tuple[Array, Array]:
    """Factors of the weighted sum of the updates, exactly; the ranks add up."""
    a = [task.a * (task.weight * task.scaling) for task in tasks]
    return jnp.concatenate(a, axis=1), jnp.concatenate([task.b for task in tasks], axis=1)


def cut(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The nearest factors of at most `rank` (Eckart & Young 1936), without forming A B."""
    rank = min(rank, a.shape[2], b.shape[2])
    (la, qa), (lb, qb) = _orthogonal(a), _orthogonal(b)
    core = jnp.asarray(la.swapaxes(1, 2) @ lb, jnp.float32)
    small_a, small_b = decomposed(core, rank)
    return small_a @ jnp.asarray(qa, jnp.float32), small_b @ jnp.asarray(qb, jnp.float32)


def _orthogonal(x: Array) -> tuple[np.ndarray, np.ndarray]:
    """L (n, r, r) and Q (n, r, size), float64: x = L Q, and Q's rows are orthogonal, or 0.

    By the eigenvectors of x x^T, in float64, where what squaring it costs is below the rounding of
    float32. (A QR decomposition of a thin matrix is a hundred small steps, between which LAPACK's
    threads wait for each other: on a machine with other work it took forty times as long.)
    """
    rows = np.asarray(x, np.float64)
    if not np.isfinite(rows).all():  # for which eigh has only an exception, without saying where
        return np.full((*rows.shape[:2], rows.shape[1]), np.nan), np.full_like(rows, np.nan)
    # Of length 1: beside large rows small ones would be lost, whose counterparts in B may be large.
    lengths = np.linalg.norm(rows, axis=2, keepdims=True)
    rows = rows / np.where(lengths > 0, lengths, 1)
    values, vectors = np.linalg.eigh(rows @ rows.swapaxes(1, 2))
    root = np.sqrt(np.maximum(values, 0))[:, None]
    seen = root > np.finfo(np.float32).eps * root.max(-1, keepdims=True)
    inverse = np.divide(1, root, out=np.zeros_like(root), where=seen)
    return lengths * vectors * root, (vectors * inverse).swapaxes(1, 2) @ rows


def decomposed(delta: Array, rank: int) -> tuple[Array, Array]:
    """The nearest factors of at most `rank`, equally large, of (n, in, out)."""
    u, s, v = jnp.linalg.svd(delta, full_matrices=False)
    root = jnp.sqrt(s[:, :rank, None])
    return root * u.swapaxes(1, 2)[:, :rank], root * v[:, :rank]


def _largest(x: Array, density: float, key: Array) -> Array:
    """Each (n,) its int(density * size) largest entries, and 0."""
    del key
    flat = x.reshape(x.shape[0], -1)
    _, kept = lax.top_k(jnp.abs(flat), int(density * flat.shape[1]))
    rows = jnp.arange(len(flat))[:, None]
    return jnp.zeros_like(flat).at[rows, kept].set(flat[rows, kept]).reshape(x.shape)


def _random(x: Array, density: float, key: Array) -> Array:
    """Each entry with probability `density`, or 0; scaled so that the mean stays."""
    return jnp.where(kept_at_random(key, density, x.shape), x, 0) / density


def kept_at_random(key: Array, density: float, shape: tuple[int, ...]) -> Array:
    """What DARE keeps: bool, of `shape`."""
    return jax.random.bernoulli(key, density, shape)
