"""From a configuration and the sites of a model to the plan: which sites, rank and scaling."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jlora import canonical, tables
from jlora.adapter import LORA_TOKENS, Site, Target
from jlora.config import ALL_LINEAR, LoraConfig, QuantConfig
from jlora.errors import JloraError
from jlora.matching import Choice, dotted, ends


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `inject` adapts. `str(plan)` is a table, `plan.compact()` a shorter one."""

    targets: tuple[Target, ...]
    whole: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Path -> shape of parameters that are trained as a whole: biases, modules to save."""
    tokens: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Path of an embedding -> its rows that are trained."""
    widths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Path of an embedding in `tokens` -> the size of a row."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every trained leaf, in the model's shape."""
        shapes = {t.site.leaf(name): s for t in self.targets for name, s in t.shapes.items()}
        rows = {f"{p}/{LORA_TOKENS}": (len(r), self.widths[p]) for p, r in self.tokens.items()}
        return shapes | rows | dict(self.whole)

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Path of each factor that is padded -> its layers' own ranks."""
        return {t.site.leaf(name): t.ranks for t in self.targets if t.layers for name in t.shapes}

    def layer_shapes(self, stacks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Canonical path -> shape of every trained leaf.

        Args:
            stacks: path of each stacked module -> number of its layers.
        """
        result = {}
        for path, shape in self.shapes.items():
            layers = canonical.layer_paths(path, stacks)
            own = self.ranks.get(path)
            if layers == [path]:
                result[path] = shape
            elif own is None:
                result |= dict.fromkeys(layers, shape[1:])
            else:
                result |= {x: (r, *shape[2:]) for x, r in zip(layers, own, strict=True) if r}
        return result

    @property
    def parameters(self) -> int:
        """Number of parameters that are trained, as PEFT counts them."""
        rest = sum(len(rows) * self.widths[path] for path, rows in self.tokens.items())
        rest += sum(map(math.prod, self.whole.values()))
        return sum(target.parameters for target in self.targets) + rest

    def difference(self, other: "Plan") -> str:
        """What another plan does otherwise; "" where nothing."""
        ours, theirs = ({t.site.path: (t.r, t.scaling) for t in p.targets} for p in (self, other))
        lines = [
            f"{path} has {_rank(ours.get(path))} in the module, {_rank(theirs.get(path))} there"
            for path in ours | theirs
            if ours.get(path) != theirs.get(path)
        ]
        if (self.whole, self.tokens) != (other.whole, other.tokens):
            lines.append("other biases, saved modules or token rows are trained")
        return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")

    def __str__(self) -> str:
        return self._table((path, 1, cells, size) for path, cells, size in self._rows())

    def compact(self) -> str:
        """The table with one row for all layers that differ in nothing but their index."""
        groups = tables.grouped((path, (*cells, str(n))) for path, cells, n in self._rows())
        return self._table(
            (name, len(paths), cells, int(size)) for name, paths, (*cells, size) in groups
        )

    def _rows(self) -> Iterator[tuple[str, tuple[str, ...], int]]:
        """Path; shape, rank and alpha; parameters."""
        for target in self.targets:
            rank = "/".join(map(str, sorted({r for r in target.ranks if r})))
            alpha = "/".join(f"{a:g}" for a in sorted({a for r, a, _ in target.layers if r}))
            cells = (str(target.site.shape), rank, alpha or f"{target.alpha:g}")
            yield target.site.path, cells, target.parameters
        for path, shape in self.whole.items():
            yield path, (str(shape), "", ""), math.prod(shape)
        for path, picked in self.tokens.items():
            yield path, (f"{len(picked)} rows", "", ""), len(picked) * self.widths[path]

    def _table(self, rows: Iterable[tuple[str, int, Sequence[str], int]]) -> str:
        header = ("path", "shape", "rank", "alpha", "parameters")
        lines = [(path, *cells, tables.times(n, size)) for path, n, cells, size in rows]
        total = ("total", "", "", "", f"{self.parameters:,d}")
        return tables.render([header, *lines, total], left=2)


def _rank(target: tuple[int, float | tuple[float, ...]] | None) -> str:
    return "no adapter" if target is None else f"rank {target[0]} and scaling {target[1]}"


def plan(
    config: LoraConfig,
    sites: Sequence[Site],
    output_head: str | None = None,
    *,
    modules: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None,
    biases: Mapping[str, str] | None = None,
    shared: Mapping[str, Sequence[str]] | None = None,
) -> Plan:
    """Choose what `config` targets, in the order of `sites`.

    Args:
        config: what to target.
        sites: all sites of the model.
        output_head: path of the output projection, which "all-linear" leaves out.
        modules: path of each module with parameters of its own -> their names and shapes.
        biases: path of each site's module -> the name of its bias, where it has one.
        shared: path of a site's module -> where else its weight is used.

    Raises:
        JloraError: a pattern or layer that matches nothing, with the nearest names; a weight that
            is used elsewhere too.
    """
    modules, biases = modules or {}, biases or {}
    choice = Choice(config, output_head)
    choice.check(sites, modules)
    targets = [target for site in sites if (target := choice.target(site)) is not None]
    for target in targets:
        if uses := (shared or {}).get(target.site.path):
            raise JloraError(
                f"{target.site.path}: its weight is also used by {', '.join(uses)}, which an "
                "adapter here would not change; leave it out (exclude_modules)"
            )
    _warn_of_ranks(targets)
    whole = {
        f"{path}/{name}".lstrip("/"): shape
        for path, shapes in modules.items()
        for name, shape in shapes.items()
        if (path and choice.saves(path))
        or (config.bias == "all" and "bias" in name)
        or (config.bias == "lora_only" and biases.get(path) == name
            and any(t.site.path == path for t in targets))
    }  # fmt: skip
    tokens = _token_rows(config, sites, shared or {})
    if not (targets or whole or tokens):
        raise JloraError("every targeted module is excluded again: nothing is left to train")
    by_path = {site.path: site for site in sites}
    return Plan(tuple(targets), whole, tokens, {p: by_path[p].shape[-1] for p in tokens})


def to_quantise(
    config: QuantConfig, sites: Sequence[Site], output_head: str | None = None
) -> list[Site]:
    """The sites that `config` chooses, in their order.

    Args:
        config: which.
        sites: all sites of the model.
        output_head: path of the output projection, which "all-linear" leaves out.

    Raises:
        JloraError: a pattern that matches nothing, with the nearest names; layers of one stack that
            are not all chosen; what is no linear layer.
    """
    patterns = LoraConfig(
        target_modules=config.target_modules, exclude_modules=config.exclude_modules
    )
    choice = Choice(patterns, output_head, owner="QuantConfig")
    choice.check(sites)
    chosen, problems, plain = [], [], []
    for site in sites:
        taken = [choice.takes(site, name) for name in site.names]
        if not any(taken):
            continue
        if not site.weight:
            plain.append(site.path)
            continue
        if not all(taken):
            problems.append(f"{site.path}: the layers of a stack are quantised all or none")
        elif site.kind != "linear":
            problems.append(f"{site.path} is no linear layer, and only these are quantised")
        chosen.append(site)
    if plain and (not chosen or config.target_modules != ALL_LINEAR):
        problems.append(
            f"{', '.join(plain[:5])}: weights in plain parameters cannot be quantised, only those "
            "of layers; jlora.register says how a layer type of your own uses its weight"
        )
    elif not chosen:
        problems.append("every targeted layer is excluded again: nothing is left to quantise")
    if problems:
        raise JloraError("QuantConfig: " + "; ".join(problems))
    return chosen


def head_among(sites: Sequence[Site]) -> str | None:
    """Path of the site whose module is called "lm_head"."""
    return next((s.path for s in sites if "lm_head" in s.path.split("/")[-2:]), None)


def _warn_of_ranks(targets: Sequence[Target]) -> None:
    above = [
        f"{t.site.path} ({t.r} > {full})"
        for t in targets
        if t.r > (full := min(math.prod(t.site.in_shape), math.prod(t.site.out_shape)))
    ]
    if above:
        warnings.warn(
            f"the rank is above what the weight itself can have at {', '.join(above[:5])}"
            + (f" and {len(above) - 5} more" if len(above) > 5 else ""),
            stacklevel=4,
        )


def _token_rows(
    config: LoraConfig, sites: Sequence[Site], shared: Mapping[str, Sequence[str]]
) -> dict[str, tuple[int, ...]]:
    """Path of each embedding -> its rows that are trained."""
    wanted = config.trainable_token_indices
    if not wanted:
        return {}
    embeddings = [site for site in sites if site.kind == "embedding"]
    names = ", ".join(dotted(site.path) for site in embeddings) or "none"
    if not isinstance(wanted, Mapping):
        if len(embeddings) != 1:
            raise JloraError(
                f"trainable_token_indices: name the embedding, of {names}: "
                f"{{'...': {list(wanted)}}}"
            )
        wanted = {dotted(embeddings[0].path): wanted}
    rows: dict[str, tuple[int, ...]] = {}
    for name, indices in wanted.items():
        found = [site for site in embeddings if ends(dotted(site.path), name)]
        if not found:
            raise JloraError(f"trainable_token_indices: no embedding {name!r}; there are: {names}")
        for site in found:
            if outside := [i for i in indices if not 0 <= i < site.shape[-2]]:
                raise JloraError(
                    f"trainable_token_indices: {outside} are no rows of {site.path}, which has "
                    f"{site.shape[-2]}"
                )
            if uses := shared.get(site.path):
                raise JloraError(
                    f"trainable_token_indices: the rows of {site.path} are also used by "
                    f"{', '.join(uses)}, which would not see their change"
                )
            rows[site.path] = tuple(indices)
    return rows
