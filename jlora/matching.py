"""Which module a pattern means: names are matched as PEFT matches them.

They are dotted, one for each layer also where layers are stacked. A pattern that matches nothing is
an error, never a smaller adapter than was asked for.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from jlora.adapter import Site, Target
from jlora.config import ALL_LINEAR, LoraConfig
from jlora.errors import JloraError, UnmatchedError


class Choice:
    """The patterns of a configuration, compiled: which module gets what rank and alpha.

    Args:
        config: what to target.
        output_head: path of the output projection, which "all-linear" leaves out.
        owner: what the patterns are from, for messages.
    """

    def __init__(
        self, config: LoraConfig, output_head: str | None = None, *, owner: str = "LoraConfig"
    ):
        self.config, self.head, self.owner = config, output_head, owner
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
            is_head = self.head is not None and ends(names[0], dotted(self.head))
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

    def values(self, names: tuple[str, ...]) -> tuple[int, float]:
        """Rank and alpha of a layer that patterns may call by any of `names`, which are dotted."""
        return self._ranks(names, self.config.r), self._alphas(names, self.config.lora_alpha)

    def target(self, site: Site) -> Target | None:
        """How the site is adapted, or None.

        Raises:
            JloraError: experts in layers that differ in rank.
        """
        own: list[tuple[int, float, float]] = []
        for name in site.names:
            if self.takes(site, name):
                r, alpha = self.values(_dotted_names(site, name))
                own.append((r, alpha, self.config.scaling(r, alpha)))
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
            UnmatchedError: what matches nothing, all at once, each with the nearest names.
            JloraError: something is no regular expression.
        """
        known = [n for site in sites for name in site.names for n in _dotted_names(site, name)]
        modules = modules or {}
        above = {m.rsplit("/", n)[0] for m in modules for n in range(m.count("/") + 1)}
        parameters = [dotted(f"{m}/{n}".lstrip("/")) for m, own in modules.items() for n in own]
        others = sorted({dotted(m) for m in above if m} | set(known))
        problems: list[str] = []
        patterns: list[tuple[str, str | int]] = []
        for field, pattern, matches in self.demands:
            among = others if field == "modules_to_save" else known
            if any(map(matches, among)):
                continue
            near = f"nearest: {_nearest(pattern, among)}"
            if field == "target_modules" and pattern == self.config.target_modules:
                near = _as_regex(pattern, known) or near
            elif "/" in pattern:
                near = f"names have dots: {dotted(pattern)!r}"
            elif stuck := [m for m in [*others, *parameters] if matches(m) and m not in known]:
                near = (
                    f"{stuck[0]} is there, but is of no type that can be adapted (weights in plain "
                    "parameters are found where `inputs` are given; modules_to_save trains a "
                    "module as a whole)"
                )
            problems.append(f"{field}: {pattern!r}; {near}")
            patterns.append((field, pattern))
        present = {index for name in known if (index := _layer(name)) is not None}
        for index in self.config.layers_to_transform or ():
            if index not in present:
                count = f"0 to {max(present)}" if present else "none"
                problems.append(f"layers_to_transform: no layer {index}; there are {count}")
                patterns.append(("layers_to_transform", index))
        title = f"{self.owner} matches nothing:\n  "
        if self.problems:
            raise JloraError(title + "\n  ".join(problems + self.problems))
        if problems:
            raise UnmatchedError(title + "\n  ".join(problems), patterns)

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
            self.demands.append((field, suffix, functools.partial(ends, suffix=suffix)))
        return lambda name: any(ends(name, suffix) for suffix in suffixes)

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
        except (re.error, OverflowError, RecursionError) as error:
            self.problems.append(f"{field}: {pattern!r} is no regular expression: {error}")
            return None


def _as_regex(pattern: str, known: Sequence[str]) -> str:
    """What to say of a single string that names the end of some module, as a list would."""
    if difflib.get_close_matches(pattern, [ALL_LINEAR], cutoff=0.8):
        return f"did you mean {ALL_LINEAR!r}?"
    if not any(ends(name, pattern) for name in known):
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
    return tuple(dotted(path) for path in found if path)


def dotted(path: str) -> str:
    return path.replace("/", ".")


def ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _layer(name: str) -> int | None:
    """The first whole number among the components: the index of the layer."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
