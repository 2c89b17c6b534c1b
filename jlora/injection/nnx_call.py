"""NNX calls as functions of chosen weights: run on copies, what they change is written back."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from flax import nnx

from jlora.paths import join

# Tokens of the models one of whose methods runs.
_INSIDE: ContextVar[tuple] = ContextVar("inside", default=())


def inside(token: Any) -> bool:
    """Tell whether a method of the model with this token runs."""
    return any(token is running for running in _INSIDE.get())


@contextmanager
def running(token: Any) -> Any:
    """Note for the length of a block that a method of the model with this token runs."""
    before = _INSIDE.set((*_INSIDE.get(), token))
    try:
        yield
    finally:
        _INSIDE.reset(before)


@dataclasses.dataclass(eq=False)
class _Place:
    """Where an object of NNX stands in the model or the arguments."""

    path: tuple


class Call:
    """One call of one method of a model, as a function of some of the model's weights.

    Modules, variables and random streams among the arguments, in containers of any kind, are copied
    with the model: what the method changes in them is what `write` writes back.
    """

    def __init__(
        self,
        model: nnx.Module,
        names: Iterable[str],
        method: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        token: Any = None,
        prepare: Callable[[nnx.Module], None] = lambda copy: None,
    ):
        self.roots = (model, stateful((args, kwargs)))
        self.method, self.token, self.prepare = method, token, prepare
        names = set(names)
        self.places = {id(node): _Place(path) for path, node in _nodes(self.roots)}
        self.args, self.kwargs = replaced((tuple(args), dict(kwargs)), self.places)
        split: Any = nnx.split
        self.graphdef, chosen, changing, rest = split(
            self.roots, lambda keys, _: keys[0] == 0 and join(keys[1:]) in names, _CHANGING, ...
        )
        self.order = [(keys, join(keys[1:])) for keys, _ in nnx.to_flat_state(chosen)]
        self.rest = (changing, rest)

    def __call__(self, weights: Mapping[str, Any], given: Any, *args: Any, **kwargs: Any) -> Any:
        """The method's result, and what it changed, for `weights` and what else was `given`."""
        flat = nnx.from_flat_state([(keys, weights[path]) for keys, path in self.order])
        roots = nnx.merge(self.graphdef, flat, *given, copy=True)
        copies = list(_nodes(roots))
        by_path = dict(copies)
        own = {id(place): by_path[place.path] for place in self.places.values()}
        self.prepare(roots[0])
        args, kwargs = replaced((args, kwargs), own)
        with running(self.token):
            out = self.method(roots[0], *args, **kwargs)
        back = {id(node): _Place(path) for path, node in copies}
        return replaced(out, back), nnx.state(roots, _CHANGING)

    def write(self, out: Any, changed: Any) -> Any:
        """Write back what the call changed; its result, with the objects that were given."""
        if jax.tree.leaves(changed):
            nnx.update(self.roots, changed)
        nodes = dict(_nodes(self.roots))
        return _with_objects(out, nodes)


_CHANGING = nnx.Any(lambda keys, _: keys[0] == 1, nnx.Not(nnx.Param))
_STATEFUL = (nnx.Variable, nnx.Pytree)


def _nodes(roots: Any) -> Iterable[tuple[tuple, Any]]:
    return [(path, x) for path, x in nnx.iter_graph(roots) if isinstance(x, _STATEFUL)]


def stateful(tree: Any) -> list[Any]:
    """Collect the distinct objects of NNX in containers of any kind."""
    found: dict[int, Any] = {}

    def visit(x: Any) -> Any:
        if isinstance(x, _STATEFUL):
            found[id(x)] = x
        else:
            _mapped(visit, x)
        return x

    visit(tree)
    return list(found.values())


def replaced(tree: Any, table: Mapping[int, Any]) -> Any:
    """Put other objects in the place of those whose ids are in `table`."""

    def visit(x: Any) -> Any:
        if id(x) in table:
            return table[id(x)]
        return x if isinstance(x, _STATEFUL) else _mapped(visit, x)

    return visit(tree)


def _with_objects(tree: Any, nodes: Mapping[tuple, Any]) -> Any:
    def visit(x: Any) -> Any:
        if isinstance(x, _Place):
            return nodes[x.path]
        return x if isinstance(x, _STATEFUL) else _mapped(visit, x)

    return visit(tree)


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """`x` with what it holds replaced; itself where nothing is."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type) and _is_leaf(x):
        before = {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if hasattr(x, f.name)}
        after = {name: function(value) for name, value in before.items()}
        if all(after[name] is before[name] for name in before):
            return x
        twin = copy.copy(x)
        for name, value in after.items():
            object.__setattr__(twin, name, value)
        return twin
    if _is_leaf(x):
        return x
    children, treedef = jax.tree.flatten(x, is_leaf=lambda y: y is not x)
    mapped = [function(child) for child in children]
    same = all(one is other for one, other in zip(mapped, children, strict=True))
    return x if same else jax.tree.unflatten(treedef, mapped)


def _is_leaf(x: Any) -> bool:
    return x is None or jax.tree_util.all_leaves([x])
