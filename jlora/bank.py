"""A bank of adapters over one base: all resident, one or one a row in use, nothing compiled anew.

Each adapted weight's factors are stacked over slots, padded with zeros to the bank's rank; which
slots are used is an argument of the compiled program. The last slot is all zeros: the base alone.
"""

import functools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jlora import adapters, fingerprint, injection
from jlora.adapter import LORA_A, LORA_B, Site
from jlora.checkpoint import StoredAdapter
from jlora.config import LoraConfig
from jlora.errors import JloraError, nearest
from jlora.injection.nnx_layer import by_row
from jlora.matching import dotted
from jlora.paths import SHOWN
from jlora.selection import Selection


class Bank:
    """Low-rank adapters over one NNX model, to switch between, or to use one for each row.

    Switching moves no factor and compiles nothing: the shapes are those of the bank, whatever the
    adapters' ranks. For inference; factors are float32, and their scaling is folded into B. (In
    Linen adapters are trees: `jlora.combine(adapters, params)` puts any of them on its base.)

    Args:
        model: an NNX model without adapters. It stays as it is: the bank works on a view of it
            that shares its arrays as they are now.
        config: the bank's room: adapters may have its targets, or some of them, with ranks up to
            the highest that it gives to any. Its other settings do not matter.
        capacity: the most adapters that are held; all the memory is taken at once, that of
            capacity + 1 adapters of the bank's rank.

    Attributes:
        rank: the highest that an adapter may have.
        capacity: the most adapters.

    Raises:
        JloraError: what `jlora.inject` would raise; a configuration that trains more than low-rank
            factors.
    """

    def __init__(self, model: Any, config: LoraConfig, *, capacity: int = 16):
        if capacity < 1:
            raise JloraError(f"capacity is {capacity}; a bank holds at least 1 adapter")
        with warnings.catch_warnings(action="ignore"):  # a rank is what there is room for
            plan = injection.plan(model, config)
            if other := [*plan.whole, *plan.tokens]:
                raise JloraError(
                    f"a bank holds low-rank factors alone, not {', '.join(other[:SHOWN])}: leave "
                    "bias, modules_to_save and trainable_token_indices out of its configuration"
                )
            self.rank = max(max(target.ranks) for target in plan.targets)
            view, room = _view(model), _room((target.site for target in plan.targets), self.rank)
            targets = injection.plan(model, room).targets
            injection.inject(view, room, rngs=jax.random.key(0), training=False)
        self.capacity = capacity
        self._active: str | None = None
        self._model = _view(model)
        self._sites = {t.site.leaf(name): t.site for t in targets for name in (LORA_A, LORA_B)}
        leaves, self._base = injection.partition(view)
        by_row(view)
        _, self._base_by_row = injection.partition(view)
        self._axes = tuple((path, site.stacked) for path, site in self._sites.items())
        self._slots = {
            path: jnp.zeros(
                (*leaves[path].shape[:axis], capacity + 1, *leaves[path].shape[axis:]), jnp.float32
            )
            for path, axis in self._axes
        }
        self._held: dict[str | None, int] = {None: capacity}  # the slot of zeros

    @classmethod
    def of(cls, model: Any, paths: Mapping[str, str | Path], *, force: bool = False) -> "Bank":
        """A bank that has room for just these adapters, and holds them.

        Args:
            model: as for the class.
            paths: name -> what `jlora.load_adapter` reads.
            force: as for `add`.

        Raises:
            JloraError: no adapters; what `add` raises.
        """
        if not paths:
            raise JloraError("a bank of no adapters has no rank: give its configuration instead")
        read = {name: adapters.read(path) for name, path in paths.items()}
        plans = [adapters.fitted(stored, model, force=force)[1] for stored in read.values()]
        targets = [target for plan in plans for target in plan.targets]
        rank = max((max(target.ranks) for target in targets), default=0)
        if not rank:
            raise JloraError(
                f"none of {', '.join(map(str, paths.values()))} has low-rank factors, and a bank "
                "holds these alone"
            )
        bank = cls(model, _room((t.site for t in targets), rank), capacity=len(paths))
        for name, stored in read.items():
            bank.add(name, stored, force=force)
        return bank

    def __repr__(self) -> str:
        more = ["…"] if len(self.names) > SHOWN else []
        return (
            f"Bank(rank={self.rank}, capacity={self.capacity}, active={self.active!r}, "
            f"names=[{', '.join([*map(repr, self.names[:SHOWN]), *more])}])"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters, in the order in which they were added."""
        return tuple(name for name in self._held if name is not None)

    @property
    def model(self) -> Any:
        """The model that the adapters are for."""
        return self._model

    @property
    def active(self) -> str | None:
        """Name of the adapter in use, None for the base alone."""
        return self._active

    def add(self, name: str, adapter: Any, *, force: bool = False) -> None:
        """Put an adapter into a free slot; the first of an empty bank becomes the active one.

        What `partition` gave before is used up: its arrays are written to in place.

        Args:
            name: a new one.
            adapter: a path that `jlora.load_adapter` reads, what was read from one, or an injected
                NNX model like the bank's, whose factors are copied.
            force: also one that was trained on another base, or that changes nothing.

        Raises:
            JloraError: the name is taken, the bank is full, the adapter is not for this model or
                not for the bank's room (all mismatches at once), or trains more than low-rank
                factors. The bank is then as it was.
        """
        self._check_new(name)
        free = set(range(self.capacity)).difference(self._held.values())
        if not free:
            raise JloraError(
                f"the bank is full with {self.capacity} adapters: delete one of "
                f"{', '.join(self.names[:SHOWN])}, or make a bank of more capacity"
            )
        values = self._values(name, self._loaded(adapter, force), force)
        slot = min(free)
        self._slots = _write(self._slots, values, np.int32(slot), axes=self._axes)
        self._held[name] = slot
        if len(self.names) == 1:
            self._active = name

    def set_active(self, name: str) -> None:
        """Use this adapter where rows have none of their own.

        Raises:
            JloraError: there is none of the name.
        """
        self._check_held([name])
        self._active = name

    def disable(self) -> None:
        """Use the base alone, until `set_active`."""
        self._active = None

    def delete(self, name: str) -> None:
        """Free the slot of an adapter.

        Raises:
            JloraError: there is none of the name; it is the active one.
        """
        self._check_held([name])
        if name == self.active:
            raise JloraError(
                f"{name!r} is the active adapter: set_active another, or disable(), before it is "
                "deleted"
            )
        del self._held[name]

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; it stays in its place among `names`.

        Raises:
            JloraError: there is none of the old name; the new one is taken.
        """
        self._check_held([old])
        if new == old:
            return
        self._check_new(new)
        self._held = {new if name == old else name: slot for name, slot in self._held.items()}
        self._active = new if self._active == old else self._active

    def partition(self, rows: Sequence[str | None] | None = None) -> tuple[Selection, Any]:
        """The view as `jlora.partition` splits a model; give both to a jitted function.

        In there `jlora.combine(adapters, base)` is the model. Its compiled program is the same
        whichever adapters are chosen; one for a number of rows is another than that for one
        adapter. `add` makes new ones necessary: call this again after it.

        Args:
            rows: the name of each row's adapter, or None for the base alone. The model is then to
                be run on as many rows, which must be the first axis of what each adapted layer is
                given (of which only the size is checked). If left out, all rows use the active
                adapter.

        Raises:
            JloraError: names that are unknown, all at once.
        """
        if rows is None:
            return self._select(np.int32(self._held[self.active])), self._base
        if isinstance(rows, str):
            raise JloraError(
                f"rows is {rows!r}: give a list with the name of each row's adapter, or set_active "
                "one for all"
            )
        self._check_held(name for name in rows if name is not None)
        index = np.array([self._held[name] for name in rows], np.int32)
        return self._select(index), self._base_by_row

    def _select(self, index: Any) -> Selection:
        return Selection(self._slots, index, self._axes)

    def _check_held(self, names: Iterable[str]) -> None:
        unknown = dict.fromkeys(name for name in names if name not in self.names)
        if unknown:
            asked = "; ".join(f"{n!r}{nearest(str(n), self.names)}" for n in list(unknown)[:SHOWN])
            raise JloraError(
                f"the bank holds no adapter {asked}; it holds "
                f"{', '.join(map(repr, self.names)) or 'none yet: add one'}"
            )

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise JloraError(f"an adapter's name is a text that is not empty, not {name!r}")
        if name in self._held:
            raise JloraError(f"the bank holds an adapter {name!r} already: delete or rename it")

    def _loaded(self, adapter: Any, force: bool) -> Any:
        """The model with an adapter on it, in a view of its own."""
        if isinstance(adapter, str | Path | StoredAdapter):
            view = _view(self._model)
            return adapters.load_adapter(adapter, view, force=force, allow_zero=force)
        differs = fingerprint.of(adapter).differences(fingerprint.of(self._model))
        if differs and not force:
            raise JloraError(
                "\n  ".join(["the model's base is another than the bank's:", *differs])
                + "\nforce=True takes its adapter all the same"
            )
        return adapter

    def _values(self, name: str, model: Any, force: bool) -> dict[str, np.ndarray]:
        """The slot's content for a model's adapters, scaled and padded.

        Raises:
            JloraError: they do not fit.
        """
        trained, _ = injection.partition(model)
        if not trained:
            raise JloraError(
                f"{name!r}: the model holds no adapter; give an injected one, or a path"
            )
        scalings, problems = injection.scalings(model), []
        values = {}
        for path, axis in self._axes:
            shape = self._slots[path].shape
            values[path] = np.zeros((*shape[:axis], *shape[axis + 1 :]), np.float32)
        for path, leaf in trained.items():
            if (site := self._sites.get(path)) is None:
                problems.append(f"no room: {path} {leaf.shape}")
                continue
            room, at = values[path], len(site.batch)
            r = leaf.shape[at] if leaf.ndim == room.ndim else 0
            if leaf.shape != (*room.shape[:at], r, *room.shape[at + 1 :]):
                problems.append(f"shape: {path} is {leaf.shape}, expected {room.shape}")
            elif r > self.rank:
                problems.append(f"rank: {path} has {r}, the bank {self.rank}")
            else:
                value = np.asarray(leaf, np.float32)
                if path == site.leaf(LORA_B):
                    scaling = np.asarray(scalings[site.path], np.float32)
                    value = value * scaling.reshape(scaling.shape + (1,) * (leaf.ndim - 1))
                room[(*[slice(None)] * at, slice(r))] = value
                if not np.isfinite(value).all():
                    problems.append(f"values that are not finite: {path}")
        if problems:
            raise JloraError(
                "\n  ".join([f"{name!r} does not fit the bank:", *problems[:SHOWN]])
                + (f"\n  … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
                + "\nmake a bank whose configuration has these targets and ranks, or Bank.of the "
                "adapters; what is no low-rank factor has no room in any, but in a model of its own"
            )
        factors = ((p, p.removesuffix(LORA_B) + LORA_A) for p in values if p.endswith(LORA_B))
        if not force and not any(values[b].any() and values[a].any() for b, a in factors):
            raise JloraError(f"{name!r} changes nothing, its factors are zero; force=True takes it")
        return values


def _view(model: Any) -> Any:
    """A new model around the same arrays."""
    return injection.combine(*injection.partition(model))


def _room(sites: Iterable[Site], rank: int) -> LoraConfig:
    """All layers of the sites, one rank, no scaling."""
    names = dict.fromkeys(dotted(name) for site in sites for name in site.names)
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="|".join(map(re.escape, names)))


@functools.partial(jax.jit, donate_argnums=0, static_argnames="axes")
def _write(
    slots: dict[str, Array],
    values: dict[str, Array],
    slot: Array,
    axes: tuple[tuple[str, int], ...],
) -> dict[str, Array]:
    """`slots` with `values` in one of them, in place."""
    return {
        path: jax.lax.dynamic_update_index_in_dim(slots[path], values[path], slot, axis)
        for path, axis in axes
    }
