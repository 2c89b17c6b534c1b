"""Groups examples of similar length into padded batches of few shapes.

Every shape is compiled once, and every padded position is computed in vain, so the lengths are
chosen to waste as little as they can. The order of an epoch is a function of (seed, epoch) alone,
which is what lets a resumed run continue at any step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jlora.data.chat import Example
from jlora.errors import JloraError

# With fewer shapes than allowed, padding must stay below this for the others to be spared.
_PADDING_AIM = 0.15


class Batch(NamedTuple):
    """B rows of T tokens, padded on the right; a pytree of NumPy arrays."""

    tokens: np.ndarray  # int32 (B, T), 0 where padded
    mask: np.ndarray  # bool (B, T), True for real tokens
    targets: np.ndarray  # bool (B, T), True where that token is to be predicted
    rows: np.ndarray  # int32 (B,), index of the example; -1 for a filler row, which is all padding


def choose_lengths(
    lengths: Sequence[int] | np.ndarray, max_shapes: int, multiple: int = 8
) -> tuple[int, ...]:
    """Return the row lengths, ascending, that pad the rows of these `lengths` with fewest tokens.

    There are at most `max_shapes` of them, each is a multiple of `multiple`, the largest covers
    the longest row, and each row is padded to the smallest that covers it. The optimum is exact.

    Raises:
        JloraError: no lengths, a length below 1, or `max_shapes` or `multiple` below 1.
    """
    if max_shapes < 1 or multiple < 1:
        raise JloraError(f"max_shapes = {max_shapes} and multiple = {multiple} must be at least 1.")
    if len(lengths) == 0 or min(lengths) < 1:
        raise JloraError("every row must have at least one token, and there must be a row.")
    rounded = -(-np.asarray(lengths, np.int64) // multiple) * multiple
    values, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])  # below[i]: rows shorter than values[i]
    # cost[i, j]: tokens of the rows from values[i] to values[j], all padded to values[j].
    cost = (below[None, 1:] - below[:-1, None]) * values[None, :].astype(np.float64)
    cost[np.tril_indices(len(values), -1)] = np.inf

    best = cost[0]  # best[j]: the rows up to values[j], in as many shapes as there were rounds
    cuts = []  # cuts[k][j]: where the last shape of that optimum begins
    for _ in range(min(max_shapes, len(values)) - 1):
        total = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        cuts.append(np.argmin(total, axis=0))
        best = np.min(total, axis=0)
    chosen = []
    end = len(values) - 1
    for cut in reversed(cuts):
        chosen.append(int(values[end]))
        end = int(cut[end]) - 1
    chosen.append(int(values[end]))
    return tuple(reversed(chosen))


class Batches:
    """The batches of a data set, addressed by step, without end.

    Rows are grouped by length. Those of a length that do not fill a batch move up to the next
    longer, so each epoch holds every example exactly once, at most one of its batches has filler
    rows, and all epochs have the same number of batches. With `shuffle`, the order of rows and
    of batches is drawn anew in each epoch; without, lengths ascend and rows keep their order.

    The number of shapes is the smallest that keeps padding below 15 %, or `max_shapes` where
    none does: `padding_fraction()` tells what is left. All steps are repeatable for the same
    examples and arguments, on any platform and with any version of NumPy.

    Attributes:
        shapes: the (B, T) that batches can have, by ascending T.
        batches_per_epoch: the same in each epoch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        max_shapes: int = 4,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        """Choose the shapes; `examples` is kept, not copied.

        Raises:
            JloraError: no examples, one without tokens, or a number that is out of range.
        """
        if batch_size < 1 or max_shapes < 1 or seed < 0:
            raise JloraError(
                f"batch_size = {batch_size} and max_shapes = {max_shapes} must be at least 1, "
                f"and seed = {seed} at least 0."
            )
        self._examples = examples
        self._lengths = np.array([len(example.tokens) for example in examples], np.int64)
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        for shapes in range(1, max_shapes + 1):
            self._widths = np.array(choose_lengths(self._lengths, shapes))
            self._buckets = np.searchsorted(self._widths, self._lengths)
            self._plan_of = (0, self._make_plan(0))
            if len(self._widths) < shapes or self.padding_fraction() < _PADDING_AIM:
                break
        self.shapes = tuple((batch_size, int(width)) for width in self._widths)

    @property
    def batches_per_epoch(self) -> int:
        """Steps in one epoch; the last, partly filled batch counts as one."""
        return -(-len(self._examples) // self._batch_size)

    def epoch(self, number: int) -> list[np.ndarray]:
        """Return the rows of each batch of an epoch, in order: int64 (b,), with 1 <= b <= B."""
        cached, plan = self._plan_of
        if cached != number:
            plan = self._make_plan(number)
            self._plan_of = (number, plan)  # in one go, for threads that prefetch
        return plan

    def batch_at(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0 through all epochs, in any order of calls.

        Raises:
            JloraError: `step` is negative.
        """
        if step < 0:
            raise JloraError(f"step is {step}; steps count from 0.")
        epoch, position = divmod(step, self.batches_per_epoch)
        return self._fill(self.epoch(epoch)[position])

    def padding_fraction(self, epoch: int = 0) -> float:
        """Return the part of an epoch's B x T positions, filler rows included, that is padding."""
        computed = sum(self._width(rows) * self._batch_size for rows in self.epoch(epoch))
        return 1 - float(self._lengths.sum()) / computed

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        order = np.arange(len(self._examples))
        # Philox's raw output is fixed for good, as Generator.permutation is not.
        random = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
        if self._shuffle:
            order = _shuffled(order, random)
        plan = []
        left = order[:0]
        for bucket in range(len(self._widths)):
            rows = np.concatenate([left, order[self._buckets[order] == bucket]])
            full = len(rows) - len(rows) % self._batch_size
            plan += list(rows[:full].reshape(-1, self._batch_size))
            left = rows[full:]
        if len(left):
            plan.append(left)
        if self._shuffle:
            plan = [plan[i] for i in _shuffled(np.arange(len(plan)), random)]
        return plan

    def _width(self, rows: np.ndarray) -> int:
        """Return the shortest row length that covers these rows."""
        return int(self._widths[self._buckets[rows].max()])

    def _fill(self, rows: np.ndarray) -> Batch:
        shape = (self._batch_size, self._width(rows))
        batch = Batch(
            tokens=np.zeros(shape, np.int32),
            mask=np.zeros(shape, bool),
            targets=np.zeros(shape, bool),
            rows=np.full(self._batch_size, -1, np.int32),
        )
        batch.rows[: len(rows)] = rows
        for i, row in enumerate(rows):
            example = self._examples[row]
            length = len(example.tokens)
            batch.tokens[i, :length] = example.tokens
            batch.mask[i, :length] = True
            batch.targets[i, :length] = example.trained
        return batch


def _shuffled(values: np.ndarray, random: np.random.Philox) -> np.ndarray:
    return values[np.argsort(random.random_raw(len(values)), kind="stable")]
