"""Low-rank updates of weights that a function uses in its own way: y = x W + s (x A) B.

The function is traced to a jaxpr, and its equations are evaluated one by one. A weight with an
update travels as W, A and B side by side: what only rearranges W is done to each of them, and where
W is contracted the two thin products are added to x W. What needs the whole value gets W + s·BA,
formed there. Equations that no such weight reaches are bound as they are, custom derivatives and
effects included; nothing of JAX is replaced. Knows JAX and no Flax.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Literal

from jlora.adapter import Site
from jlora.errors import JloraError, nearest
from jlora.injection import lowrank
from jlora.injection.lowrank import (
    LowRank,
    Use,
    Weight,
    bind,
    check,
    full,
    spread,
    start,
    warn,
)


def find_uses(
    fn: Callable[..., Any], weights: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[str, list[Use | str]]:
    """Every way in which `fn(weights, *args, **kwargs)` uses each weight; computes nothing.

    Args:
        fn: the function.
        weights: path -> array or ShapeDtypeStruct.
        *args: of fn, arrays or ShapeDtypeStructs wherever it expects arrays.
        **kwargs: likewise.

    Returns:
        path -> distinct uses, in the order met. A contraction is a Use; whatever else reads the
        values is the name of its primitive ("gather", "mul"), or "return" where fn returns them;
        OWN_CALL where they went through `in_own_call`, whatever becomes of them afterwards.
    """
    found: dict[str, list[Use | str]] = {path: [] for path in weights}

    def note(path: str, use: Use | str) -> None:
        if use not in found[path]:  # a body may be traced more than once
            found[path].append(use)

    def evaluate(arrays: list[Any], dynamic: list[Any]) -> None:
        tracked = [start(path, x, note) for path, x in zip(weights, arrays, strict=True)]
        for out in _run(closed, [*tracked, *dynamic]):
            full(out, "return")

    closed, dynamic, _ = _trace(fn, weights, weights, args, kwargs)
    jax.eval_shape(evaluate, list(weights.values()), dynamic)
    return found


OWN_CALL = "own call"


def _jlora_own_call(weight: Array) -> Array:
    return weight


in_own_call = jax.jit(_jlora_own_call)
"""Mark the value of a weight that the call of its own layer reads, for `find_uses`."""


def direct(uses: Sequence[Use | str]) -> list[Use | str]:
    """Pick the uses of a layer's weight that are outside of the layer's own call."""
    return [use for use in uses if use != OWN_CALL]


def tied(site: Site, uses: Sequence[Use | str]) -> str:
    """Say why PEFT's update of a layer is another, given the uses of its weight; "" if it is not.

    PEFT adapts an embedding's look-ups alone.
    """
    if site.kind != "embedding" or set(direct(uses)) <= {"gather"}:
        return ""
    return (
        "an embedding whose table the model's own code multiplies too, which PEFT leaves as it is"
    )


def call(
    fn: Callable[..., Any],
    weights: Mapping[str, Array],
    updates: Mapping[str, LowRank],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What `fn(weights, *args, **kwargs)` gives with W + s·BA in place of each updated weight W.

    At contractions and look-ups of rows the low-rank product is kept apart, in the dtype that they
    work in. Elsewhere W + s·BA is formed, in float32 and rounded to W's dtype, and the log names
    the weight and the primitive, once.

    Args:
        fn: traced at each call, so `call` belongs under jit. Its result may be any pytree.
        weights: path -> array.
        updates: path -> update, for some of the weights.
        *args: of fn. JAX arrays are traced; all else, NumPy arrays too, reaches fn as it is.
        **kwargs: likewise.

    Raises:
        JloraError: an update of a weight that is not there, or whose axes or shapes do not fit it.
    """
    if not updates:
        return fn(weights, *args, **kwargs)
    tracked = []
    for path, update in updates.items():
        if path not in weights:
            raise JloraError(f"no weight {path!r} to update{nearest(path, weights)}")
        shape = weights[path].shape
        check(path, shape, update)
        a = spread(update.lora_a, shape, update.batch, update.contracting)
        b = spread(update.lora_b, shape, update.batch, update.output)
        tracked.append(start(path, weights[path], warn, a, b, update.scaling))
    closed, dynamic, rebuild = _trace(fn, weights, updates, args, kwargs)
    return rebuild([full(out, "return") for out in _run(closed, [*tracked, *dynamic])])


def _trace(
    fn: Callable[..., Any], weights: Mapping[str, Any], tracked: Any, args: Any, kwargs: Any
) -> tuple[Any, list[Any], Callable[[list[Any]], Any]]:
    """The jaxpr of fn, in which the tracked weights come first.

    Returns:
        the closed jaxpr, its inputs after the tracked weights, and what makes fn's result of its
        outputs.
    """
    rest = {path: x for path, x in weights.items() if path not in tracked}
    leaves, tree = jax.tree.flatten((rest, args, kwargs))
    dynamic = [x if isinstance(x, Array | jax.ShapeDtypeStruct) else None for x in leaves]
    slot = object()
    result: list[Any] = []

    def flat(arrays: list[Any], dynamic: list[Any]) -> list[Any]:
        filled = (x if d is None else d for x, d in zip(leaves, dynamic, strict=True))
        rest, args, kwargs = jax.tree.unflatten(tree, filled)
        rest |= zip(tracked, arrays, strict=True)
        outs, out_tree = jax.tree.flatten(fn({k: rest[k] for k in weights}, *args, **kwargs))
        result[:] = [out_tree, [slot if isinstance(x, Array) else x for x in outs]]
        return [x for x in outs if isinstance(x, Array)]

    closed = jax.make_jaxpr(flat)([weights[path] for path in tracked], dynamic)

    def rebuild(arrays: list[Any]) -> Any:
        out_tree, outs = result
        each = iter(arrays)
        return out_tree.unflatten(next(each) if x is slot else x for x in outs)

    return closed, [x for x in dynamic if x is not None], rebuild


def _run(jaxpr: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr, closed or without constants, on arrays and _Weights."""
    if hasattr(jaxpr, "consts"):
        values, jaxpr = [*jaxpr.consts, *values], jaxpr.jaxpr
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if _is_var(v)}
    last.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if _is_var(v))
    for i, eqn in enumerate(jaxpr.eqns):
        values = [env[v] if _is_var(v) else v.val for v in eqn.invars]
        scope = str(eqn.source_info.name_stack)
        with jax.named_scope(scope) if scope else nullcontext(), eqn.ctx.manager:
            outs = _apply(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
        for v in (*eqn.invars, *eqn.outvars):  # outside jit, memory
            if _is_var(v) and last.get(v, -1) <= i:
                env.pop(v, None)
    return [env[v] if _is_var(v) else v.val for v in jaxpr.outvars]


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, Literal)


def _apply(eqn: Any, values: list[Any]) -> list[Any]:
    if any(isinstance(x, Weight) for x in values):
        rule = _RULES.get(eqn.primitive.name)
        outs = rule(eqn, values) if rule else None
        if outs is not None:
            return outs
        values = [full(x, eqn.primitive.name) for x in values]
    return bind(eqn, values)


def _inline(eqn: Any, values: list[Any]) -> list[Any]:
    if eqn.params.get("name") == _jlora_own_call.__name__:
        return [full(x, OWN_CALL) for x in values][: len(eqn.outvars)]
    with jax.named_scope(str(eqn.params.get("name", eqn.primitive.name))):
        return _run(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"], values)


def _checkpoint(eqn: Any, values: list[Any]) -> list[Any]:
    p = eqn.params
    body = functools.partial(_run, p["jaxpr"])
    return jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(values)


def _scan(eqn: Any, values: list[Any]) -> list[Any]:
    p = eqn.params
    length, n, k = p["length"], p["num_consts"], p["num_consts"] + p["num_carry"]
    consts, init, xs = values[:n], [full(x, "scan") for x in values[n:k]], values[k:]
    swap = functools.partial(jnp.swapaxes, axis1=0, axis2=1)  # layers first, r second: A as stored

    def enter(x: Any) -> Any:
        if not isinstance(x, Weight):
            return x
        stacked = x.axes[0] == ((x.layers, x.shape[x.layers] if x.layers < len(x.shape) else 0),)
        if not stacked or any(f is not None and f.shape[1] != length for f in (x.a, x.b)):
            return full(x, "scan")
        return x.moved([x.base], x.axes[1:], swap, swap, layers=x.layers + 1)

    def leave(x: Any) -> Any:
        if not isinstance(x, Weight):
            return x
        axes = (((x.layers - 1, length),), *x.axes)
        return x.moved([x.base], axes, swap, swap, layers=x.layers - 1)

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = _run(p["jaxpr"], [*consts, *carry, *slices])
        stacked = {(x.path, x.layers) for x in slices if isinstance(x, Weight)}
        kept = [getattr(x, "path", None) and (x.path, x.layers) in stacked for x in outs]
        kept[: len(carry)] = [False] * len(carry)
        outs = [x if keep else full(x, "scan") for x, keep in zip(outs, kept, strict=True)]
        return outs[: len(carry)], outs[len(carry) :]

    names = ("length", "reverse", "unroll", "_split_transpose")
    options = {name: p[name] for name in names if name in p}
    carry, ys = lax.scan(body, init, [enter(x) for x in xs], **options)
    return [*carry, *map(leave, ys)]


def _cond(eqn: Any, values: list[Any]) -> list[Any]:
    index, *operands = values

    def of(branch: Any) -> Callable[[list[Any]], list[Any]]:
        return lambda xs: [full(x, "cond") for x in _run(branch, xs)]

    return lax.switch(index, [of(branch) for branch in eqn.params["branches"]], operands)


def _while(eqn: Any, values: list[Any]) -> list[Any]:
    p, n = eqn.params, eqn.params["cond_nconsts"]
    k = n + p["body_nconsts"]

    def body(carry: list[Any]) -> list[Any]:
        return [full(x, "while") for x in _run(p["body_jaxpr"], [*values[n:k], *carry])]

    def more(carry: list[Any]) -> Any:
        return full(_run(p["cond_jaxpr"], [*values[:n], *carry])[0], "while")

    return lax.while_loop(more, body, [full(x, "while") for x in values[k:]])


# By name, since some names change between versions of JAX: an unknown one costs memory, no error.
_RULES: dict[str, Callable[[Any, list[Any]], list[Any] | None]] = lowrank.ARRAY_RULES | {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "core_closed_call"), _inline),
    **dict.fromkeys(("remat2", "remat", "checkpoint"), _checkpoint),
    "scan": _scan,
    "cond": _cond,
    "while": _while,
}


def check_claim(
    layer: type, site: Site, fn: Callable[..., Any], weight: Any, args: Any, kwargs: Any
) -> None:
    """Demand that a layer contracts its weight as it was registered to.

    Args:
        layer: its type.
        site: by the registered equation.
        fn: (weights, *args, **kwargs) -> the layer's output.
        weight: the layer's.
        args: of the layer's call.
        kwargs: likewise.

    Raises:
        JloraError: it contracts other axes, or uses the weight in another way.
    """
    said = Use(site.contracting, site.output, site.batch)
    found = find_uses(fn, {site.path: weight}, *args, **kwargs)[site.path]
    if found != [said]:
        does = [f"contracts {u.contracting}" if isinstance(u, Use) else repr(u) for u in found]
        raise JloraError(
            f"{site.path}: {layer.__name__} is registered as contracting axes "
            f"{site.contracting} of {site.weight} {site.shape} with its input, for the output's "
            f"{site.output}; what its call does with it: {', '.join(does) or 'nothing'}. Correct "
            "the equation, or leave the layer unregistered: weights are then found by tracing"
        )


_ELEMENTWISE = {"mul", "add", "add_any", "sub", "div", "broadcast_in_dim", "return"}


def site(path: str, shape: tuple[int, ...], uses: Sequence[Use | str]) -> Site | None:
    """The site of a weight with these uses; None for one that only scales or shifts, or is idle.

    A weight that is looked up is an embedding, whatever else it does. One that is used by no
    contraction alone has its last axis as the output: W + s·BA is then formed where it is used.
    """
    contractions = [use for use in uses if isinstance(use, Use)]
    if _ELEMENTWISE.issuperset(uses) or len(shape) < 2:  # as norms and biases do
        return None
    axes = tuple(range(len(shape)))
    if "gather" in uses:
        use, kind = Use(axes[:-1], axes[-1:]), "embedding"
    elif contractions:
        use, kind = contractions[0], "linear"
    else:
        use, kind = Use(axes[:-1], axes[-1:]), "other"
    return Site(
        path=path,
        shape=shape,
        contracting=use.contracting,
        output=use.output,
        batch=(*range(use.layers), *use.batch),
        stacked=use.layers,
        stack=path if use.layers else None,
        weight="",
        kind=kind,  # type: ignore[arg-type]
    )


def update(site: Site, lora_a: Array, lora_b: Array, scaling: float | tuple[float, ...]) -> LowRank:
    """Return the update of a site's weight by its factors.

    Args:
        site: the site.
        lora_a: (*batch, r, *in).
        lora_b: (*batch, r, *out).
        scaling: the factor on the product, or one for each stacked layer.
    """
    if isinstance(scaling, tuple):
        each = jnp.asarray(scaling, lora_a.dtype)
        lora_a, scaling = lora_a * each.reshape(-1, *[1] * (lora_a.ndim - 1)), 1.0
    return LowRank(lora_a, lora_b, scaling, site.contracting, site.output, site.batch)


def with_rows(site: Site, of: LowRank | None, rows: Array, indices: tuple[int, ...]) -> LowRank:
    """Return the update of an embedding whose rows (n, D) at `indices` have more added to them.

    Args:
        site: of the embedding.
        of: the update by its factors, if there are any.
        rows: what is added, (n, D).
        indices: which rows.
    """
    count = site.shape[site.contracting[0]]
    hits = (jnp.arange(count) == jnp.asarray(indices)[:, None]).astype(rows.dtype)
    if of is None:
        return LowRank(hits, rows, 1.0, site.contracting, site.output, site.batch)
    a = jnp.concatenate([of.lora_a * of.scaling, hits])
    return dataclasses.replace(of, lora_a=a, lora_b=jnp.concatenate([of.lora_b, rows]), scaling=1.0)
