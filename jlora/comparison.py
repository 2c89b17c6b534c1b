"""Two adapters side by side: their settings, layers, and how far apart the updates are."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora import adapters, norms, tables
from jlora.checkpoint import StoredAdapter
from jlora.config import LoraConfig
from jlora.description import rows_of, text
from jlora.errors import JloraError
from jlora.updates import Update, others, updates


@dataclasses.dataclass(frozen=True)
class Change:
    """Inner products of what two adapters, A and B, have for one weight, or for several."""

    aa: float
    bb: float
    ab: float
    same: bool
    """Whether both are the same bits, with the same scaling."""

    @property
    def relative(self) -> float:
        """Norm of the difference over that of A's; inf where A's is zero and B's is not."""
        apart = math.sqrt(max(self.aa - 2 * self.ab + self.bb, 0.0))
        return apart / math.sqrt(self.aa) if self.aa else math.inf if self.bb else 0.0

    @property
    def cosine(self) -> float:
        """Of the angle between the two; nan where one is zero."""
        product = math.sqrt(self.aa) * math.sqrt(self.bb)
        return self.ab / product if product else math.nan


@dataclasses.dataclass(frozen=True)
class Difference:
    """What `compare` finds. `str(difference)` is for people."""

    settings: Mapping[str, tuple[str, str]]
    """Fields of the configurations that differ."""
    only_a: Mapping[str, tuple[int, ...]]
    """Paths that B lacks -> shape."""
    only_b: Mapping[str, tuple[int, ...]]
    unlike: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Paths where the shapes differ."""
    changes: Mapping[str, Change]
    """All other paths."""
    cells: Mapping[str, tables.Cells]
    """Rank and alpha of these, as text."""

    @property
    def same(self) -> bool:
        """Whether both hold the same bits for each weight; settings may be in other words."""
        apart = self.only_a or self.only_b or self.unlike
        return not apart and all(change.same for change in self.changes.values())

    @property
    def total(self) -> Change:
        """All that both have."""
        every = self.changes.values()
        return Change(
            aa=sum(change.aa for change in every),
            bb=sum(change.bb for change in every),
            ab=sum(change.ab for change in every),
            same=all(change.same for change in every),
        )

    def table(self, *, all_layers: bool = False) -> str:
        """The whole report; layers that are alike share a row unless `all_layers`."""
        parts = []
        if self.settings:
            lines = [(name, *values) for name, values in self.settings.items()]
            parts.append(tables.render([("setting", "A", "B"), *lines], left=3))
        for title, paths in (("only in A", self.only_a), ("only in B", self.only_b)):
            rows = rows_of([(path, (str(x),)) for path, x in paths.items()], all_layers)
            if rows:
                shapes = [(name, *cells) for name, _, cells in rows]
                parts.append(tables.render([(title, "shape"), *shapes], left=2))
        if self.unlike:
            lines = [(path, str(a), str(b)) for path, (a, b) in self.unlike.items()]
            parts.append(tables.render([("shapes differ", "A", "B"), *lines], left=3))
        if self.changes:
            header = ("path", "rank", "alpha", "norm of A", "norm of B", "difference", "cosine")
            body = [
                (name, *cells, *_numbers([self.changes[path] for path in own]))
                for name, own, cells in rows_of(list(self.cells.items()), all_layers)
            ]
            total = ("total", "", "", *_numbers([self.total]))
            parts.append(tables.render([header, *body, total]))
        if self.same:
            parts.append("both adapters hold the same for each weight, bit for bit")
        return "\n\n".join(parts)

    __str__ = table


def compare(a: str | Path | StoredAdapter, b: str | Path | StoredAdapter) -> Difference:
    """Compare two adapters, each a path as for `load_adapter`, or what was read of one.

    Updates are compared as products, so that other factors of the same update are no difference
    but in their bits.

    Raises:
        JloraError: nothing readable at a path; factors that are not what their configuration says;
            biases, saved modules or token rows in two different forms.
    """
    one, two = adapters.read(a), adapters.read(b)
    if bool(one.tensors) != bool(two.tensors) and (others(one) or others(two)):
        raise JloraError(
            f"{one.where} and {two.where} are in different forms, and train more than factors, "
            "which only a model can match: jlora import writes a PEFT directory as an Orbax adapter"
        )
    ours: dict[str, Any] = {**updates(one), **others(one)}
    theirs: dict[str, Any] = {**updates(two), **others(two)}
    both = [path for path in ours if path in theirs]
    like = [path for path in both if _form(ours[path]) == _form(theirs[path])]
    return Difference(
        settings=_settings(one.config, two.config),
        only_a={path: tuple(leaf.shape) for path, leaf in ours.items() if path not in theirs},
        only_b={path: tuple(leaf.shape) for path, leaf in theirs.items() if path not in ours},
        unlike={p: (tuple(ours[p].shape), tuple(theirs[p].shape)) for p in both if p not in like},
        changes={path: _change(ours[path], theirs[path]) for path in like},
        cells={path: _cells(ours[path], theirs[path]) for path in like},
    )


def _settings(a: LoraConfig, b: LoraConfig) -> dict[str, tuple[str, str]]:
    pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)}
    return {name: (text(x), text(y)) for name, (x, y) in pairs.items() if x != y}


def _change(x: Any, y: Any) -> Change:
    if isinstance(x, Update):
        same = x.scaling == y.scaling and _same_bits(x.matrices(), y.matrices())
        return Change(norms.inner(x, x), norms.inner(y, y), norms.inner(x, y), same)
    p, q = (np.asarray(leaf, np.float64).ravel() for leaf in (x, y))
    return Change(float(p @ p), float(q @ q), float(p @ q), _same_bits([x], [y]))


def _same_bits(x: Iterable[Any], y: Iterable[Any]) -> bool:
    pairs = zip(map(np.asarray, x), map(np.asarray, y), strict=True)
    return all(p.dtype == q.dtype and p.tobytes() == q.tobytes() for p, q in pairs)


def _form(leaf: Any) -> tuple[int, ...]:
    """The shape, without the axes of factored weights, which the PEFT format has as one."""
    if not isinstance(leaf, Update):
        return tuple(leaf.shape)
    return (*leaf.batch_shape, math.prod(leaf.in_shape), math.prod(leaf.out_shape))


def _cells(x: Any, y: Any) -> tables.Cells:
    if not isinstance(x, Update):
        return "", ""
    return _either(str(x.r), str(y.r)), _either(f"{x.alpha:g}", f"{y.alpha:g}")


def _either(a: str, b: str) -> str:
    return a if a == b else f"{a} | {b}"


def _numbers(changes: list[Change]) -> tuple[str, ...]:
    return (
        tables.span([math.sqrt(change.aa) for change in changes]),
        tables.span([math.sqrt(change.bb) for change in changes]),
        "same bits"
        if all(change.same for change in changes)
        else tables.span([change.relative for change in changes]),
        tables.span([change.cosine for change in changes]),
    )
