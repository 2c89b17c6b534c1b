"""From a configuration and the sites of a model to the plan: which sites, rank and scaling.

Names are matched as PEFT matches them (dotted, one per layer also where layers are stacked). A
pattern that matches nothing is an error, never a smaller adapter than was asked for.
"""

import dataclasses
import difflib
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

from jlora import canonical
from jlora.adapter import LORA_TOKENS, Site, Target
from jlora.config import ALL_LINEAR, LoraConfig
from jlora.errors import JloraError


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `inject` adapts. `str(plan)` is a table."""

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

    def __str__(self) -> str:
        rows = [("path", "shape", "rank", "alpha", "parameters")]
        for target in self.targets:
            site = target.site
            rank = "/".join(map(str, sorted({r for r in target.ranks if r})))
            alpha = "/".join(f"{a:g}" for a in sorted({a for r, a, _ in target.layers if r}))
            number = (site.path, str(site.shape), rank, alpha or f"{target.alpha:g}")
            rows.append((*number, f"{target.parameters:,d}"))
        for path, shape in self.whole.items():
            rows.append((path, str(shape), "", "", f"{math.prod(shape):,d}"))
        for path, picked in self.tokens.items():
            size = len(picked) * self.widths[path]
            rows.append((path, f"{len(picked)} rows", "", "", f"{size:,d}"))
        rows.append(("total", "", "", "", f"{self.parameters:,d}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


class Choice:
    """The patterns of a configuration, compiled: which module gets what rank and alpha.

    Args:
        config: what to target.
        output_head: path of the output projection, which "all-linear" leaves out.
    """

    def __init__(self, config: LoraConfig, output_head: str | None = None):
        self.config, self.head = config, output_head
        self.problems: list[str] = []
        self.demands: list[tuple[str, str, Callable[[str], object]]] = []
        self._wanted = self._names("target_modules", config.target_modules)
        self._excluded = self._names("exclude_modules", config.exclude_modules)
        self._ranks = self._values("rank_pattern", config.rank_pattern)
        self._alphas = self._values("alpha_pattern", config.alpha_pattern)
        self.saved = self._names("modules_to_save", config.modules_to_save)

    def takes(self, site: Site, name: str) -> bool:
        """Whether the layer called `name` (with "/") of `site` is to be adapted."""
        names = _dotted_names(site, name)
        if self.config.target_modules == ALL_LINEAR:
            is_head = self.head is not None and _ends(names[0], _dotted(self.head))
            found = site.kind == "linear" and not is_head
        else:
            found = any(map(self._wanted, names))
        layers = self.config.layers_to_transform
        return (
            found
            and not any(map(self._excluded, names))
            and not self.saves(name)
            and (layers is None or _layer(names[0]) in layers)
        )

    def saves(self, name: str) -> bool:
        """Whether the module called `name`, or one above it, is trained as a whole."""
        parts = name.split("/")
        return any(self.saved(".".join(parts[:n])) for n in range(1, len(parts) + 1))

    def target(self, site: Site) -> Target | None:
        """How the site is adapted, or None.

        Raises:
            JloraError: experts in layers that differ in rank.
        """
        c = self.config
        own: list[tuple[int, float, float]] = []
        for name in site.names:
            if self.takes(site, name):
                names = _dotted_names(site, name)
                r, alpha = self._ranks(names, c.r), self._alphas(names, c.lora_alpha)
                own.append((r, alpha, c.scaling(r, alpha)))
            else:
                own.append((0, 0.0, 0.0))
        if len(set(own)) == 1:
            r, alpha, scaling = own[0]
            return Target(site, r, alpha, scaling) if r else None
        if len(site.batch) > 1:
            raise JloraError(f"{site.path}: stacked layers of experts must all be adapted alike")
        r, alpha, _ = max(own)
        return Target(site, r, alpha, tuple(s for _, _, s in own), tuple(own))

    def check(
        self, sites: Sequence[Site], modules: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        """Demand that each pattern matches something.

        Args:
            sites: all that can be adapted.
            modules: path of each module -> the names of its parameters.

        Raises:
            JloraError: what matches nothing or is no regular expression, all at once, each with the
                nearest names.
        """
        known = [n for site in sites for name in site.names for n in _dotted_names(site, name)]
        modules = modules or {}
        above = {m.rsplit("/", n)[0] for m in modules for n in range(m.count("/") + 1)}
        parameters = [_dotted(f"{m}/{n}".lstrip("/")) for m, own in modules.items() for n in own]
        others = sorted({_dotted(m) for m in above if m} | set(known))
        problems = []
        for field, pattern, matches in self.demands:
            among = others if field == "modules_to_save" else known
            if any(map(matches, among)):
                continue
            near = f"nearest: {_nearest(pattern, among)}"
            if field == "target_modules" and pattern == self.config.target_modules:
                near = _as_regex(pattern, known) or near
            elif "/" in pattern:
                near = f"names have dots: {_dotted(pattern)!r}"
            elif stuck := [m for m in [*others, *parameters] if matches(m) and m not in known]:
                near = (
                    f"{stuck[0]} is there, but is of no type that can be adapted (weights in plain "
                    "parameters are found where `inputs` are given; modules_to_save trains a "
                    "module as a whole)"
                )
            problems.append(f"{field}: {pattern!r}; {near}")
        problems += self.problems
        present = {index for name in known if (index := _layer(name)) is not None}
        for index in self.config.layers_to_transform or ():
            if index not in present:
                count = f"0 to {max(present)}" if present else "none"
                problems.append(f"layers_to_transform: no layer {index}; there are {count}")
        if problems:
            raise JloraError("LoraConfig matches nothing:\n  " + "\n  ".join(problems))

    def _names(self, field: str, patterns: str | Iterable[str] | None) -> Callable[[str], bool]:
        if patterns is None or (patterns == ALL_LINEAR and field == "target_modules"):
            return lambda name: False
        if isinstance(patterns, str):
            regex = self._compile(field, patterns)
            if regex is None:
                return lambda name: False
            self.demands.append((field, patterns, regex.fullmatch))
            return lambda name: bool(regex.fullmatch(name))
        suffixes = tuple(patterns)
        for suffix in suffixes:
            self.demands.append((field, suffix, functools.partial(_ends, suffix=suffix)))
        return lambda name: any(_ends(name, suffix) for suffix in suffixes)

    def _values(self, field: str, patterns: dict) -> Callable:
        compiled = []
        for pattern, value in patterns.items():
            regex = self._compile(field, rf"(.*\.)?({pattern})$")
            if regex is not None:
                self.demands.append((field, pattern, regex.match))
                compiled.append((regex, value))

        def setting(names: tuple[str, ...], default: float) -> float:
            return next((v for regex, v in compiled if any(map(regex.match, names))), default)

        return setting

    def _compile(self, field: str, pattern: str) -> re.Pattern | None:
        try:
            return re.compile(pattern)
        except re.error as error:
            self.problems.append(f"{field}: {pattern!r} is no regular expression: {error}")
            return None


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
    names = ", ".join(_dotted(site.path) for site in embeddings) or "none"
    if not isinstance(wanted, Mapping):
        if len(embeddings) != 1:
            raise JloraError(
                f"trainable_token_indices: name the embedding, of {names}: "
                f"{{'...': {list(wanted)}}}"
            )
        wanted = {_dotted(embeddings[0].path): wanted}
    rows: dict[str, tuple[int, ...]] = {}
    for name, indices in wanted.items():
        found = [site for site in embeddings if _ends(_dotted(site.path), name)]
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


def _as_regex(pattern: str, known: Sequence[str]) -> str:
    """What to say of a single string that names the end of some module, as a list would."""
    if difflib.get_close_matches(pattern, [ALL_LINEAR], cutoff=0.8):
        return f"did you mean {ALL_LINEAR!r}?"
    if not any(_ends(name, pattern) for name in known):
        return ""
    return (
        "one string is a regular expression for the whole name; for all that end so write "
        f"'.*\\.{pattern}', or, in Python and TOML, a list of names"
    )


def _nearest(pattern: str, known: Sequence[str]) -> str:
    """Known suffixes, of as many components as the pattern, that look most like it."""
    depth = pattern.count(".") + 1
    suffixes = {".".join(name.split(".")[-depth:]): None for name in known}
    close = difflib.get_close_matches(pattern, list(suffixes), n=3, cutoff=0.4)
    return ", ".join(close or list(suffixes)[:8]) or "(the model has no such layers at all)"


def _dotted_names(site: Site, name: str) -> tuple[str, ...]:
    """What patterns may match for the layer called `name`.

    Where a stack is itself the layer, its path too; for a weight in a plain parameter, its module.
    """
    found = [name, site.path] if site.stack == site.path else [name]
    if not site.weight:
        found += [path.rpartition("/")[0] for path in found]
    return tuple(_dotted(path) for path in found if path)


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _layer(name: str) -> int | None:
    """The first whole number among the components: the index of the layer."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
