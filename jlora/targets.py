"""From a configuration and the sites of a model to the plan: which sites, rank and scaling.

Names are matched as PEFT matches them (dotted, one per layer also where layers are stacked). A
pattern that matches nothing is an error, never a smaller adapter than was asked for.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Sequence

from jlora.adapter import Site, Target
from jlora.config import ALL_LINEAR, LoraConfig
from jlora.errors import JloraError


def plan(
    config: LoraConfig, sites: Sequence[Site], output_head: str | None = None
) -> tuple[Target, ...]:
    """Choose the sites that `config` targets, in the order of `sites`.

    Args:
        config: what to target.
        sites: all sites of the model.
        output_head: path of the output projection, which "all-linear" leaves out.

    Raises:
        JloraError: a pattern or layer that matches nothing, with the nearest names; a stack of
            layers that would be adapted only in part or with different ranks.
    """
    names = [_dotted(name) for site in sites for name in site.names]
    head = None if output_head is None else _dotted(output_head)
    matchers = _Matchers(names)
    wanted = matchers.names("target_modules", config.target_modules, head)
    excluded = matchers.names("exclude_modules", config.exclude_modules, None)
    ranks = matchers.values("rank_pattern", config.rank_pattern)
    alphas = matchers.values("alpha_pattern", config.alpha_pattern)
    layers = matchers.layers(config.layers_to_transform)
    matchers.check()

    def chosen(name: str) -> bool:
        return wanted(name) and not excluded(name) and layers(name)

    targets = []
    for site in sites:
        dotted = [_dotted(name) for name in site.names]
        taken = [name for name in dotted if chosen(name)]
        if not taken:
            continue
        settings = {(ranks(n, config.r), alphas(n, config.lora_alpha)) for n in taken}
        if len(taken) < len(dotted) or len(settings) > 1:
            raise JloraError(
                f"{site.path} stacks {len(dotted)} layers, of which {len(taken)} are targeted with "
                f"(rank, alpha) in {sorted(settings)}: a stack needs all its layers, alike; load "
                "the model unrolled (scan_layers=False) to treat layers differently"
            )
        r, alpha = settings.pop()
        targets.append(Target(site, r, alpha, config.scaling(r, alpha)))
    if not targets:
        raise JloraError("every targeted module is excluded again: nothing is left to train")
    return tuple(targets)


class _Matchers:
    """Turns patterns into predicates over names, collecting those that match nothing."""

    def __init__(self, names: Sequence[str]):
        self.known = names
        self.problems: list[str] = []

    def names(
        self, field: str, patterns: str | Iterable[str] | None, head: str | None
    ) -> Callable[[str], bool]:
        if patterns is None:
            return lambda name: False
        if patterns == ALL_LINEAR and field == "target_modules":
            return lambda name: name != head
        if isinstance(patterns, str):
            regex = self._compile(field, patterns)
            if regex is None:
                return lambda name: False
            self._demand(field, patterns, regex.fullmatch, self._as_regex(patterns))
            return lambda name: bool(regex.fullmatch(name))
        suffixes = tuple(patterns)
        for suffix in suffixes:
            self._demand(field, suffix, functools.partial(_ends, suffix=suffix))
        return lambda name: any(_ends(name, suffix) for suffix in suffixes)

    def values(self, field: str, patterns: dict) -> Callable:
        compiled = []
        for pattern, value in patterns.items():
            regex = self._compile(field, rf"(.*\.)?({pattern})$")
            if regex is not None:
                self._demand(field, pattern, regex.match)
                compiled.append((regex, value))

        def setting(name: str, default: float) -> float:
            return next((v for regex, v in compiled if regex.match(name)), default)

        return setting

    def layers(self, indices: tuple[int, ...] | None) -> Callable[[str], bool]:
        if indices is None:
            return lambda name: True
        present = {index for name in self.known if (index := _layer(name)) is not None}
        for index in indices:
            if index not in present:
                count = f"0 to {max(present)}" if present else "none"
                self.problems.append(f"layers_to_transform: no layer {index}; there are {count}")
        return lambda name: _layer(name) in indices

    def check(self) -> None:
        if self.problems:
            raise JloraError("LoraConfig matches nothing:\n  " + "\n  ".join(self.problems))

    def _compile(self, field: str, pattern: str) -> re.Pattern | None:
        try:
            return re.compile(pattern)
        except re.error as error:
            self.problems.append(f"{field}: {pattern!r} is no regular expression: {error}")
            return None

    def _demand(
        self, field: str, pattern: str, matches: Callable[[str], object], advice: str = ""
    ) -> None:
        if not any(map(matches, self.known)):
            near = advice or f"nearest: {self._nearest(pattern)}"
            self.problems.append(f"{field}: {pattern!r}; {near}")

    def _as_regex(self, pattern: str) -> str:
        """What to say of a single string that names the end of some module, as a list would."""
        if not any(_ends(name, pattern) for name in self.known):
            return ""
        return (
            "one string is a regular expression for the whole name; for all that end so write "
            f"'.*\\.{pattern}', or a list of more than one name"
        )

    def _nearest(self, pattern: str) -> str:
        """Known suffixes, of as many components as the pattern, that look most like it."""
        depth = pattern.count(".") + 1
        suffixes = {".".join(name.split(".")[-depth:]): None for name in self.known}
        close = difflib.get_close_matches(pattern, list(suffixes), n=3, cutoff=0.4)
        return ", ".join(close or list(suffixes)[:8]) or "(the model has no such layers at all)"


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _layer(name: str) -> int | None:
    """The first whole number among the components: the index of the layer."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
