"""What an adapter on disk is, as text: its configuration, layers, norms and files."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora import adapters, conversion, norms, peft, tables
from jlora.checkpoint import StoredAdapter
from jlora.config import LoraConfig
from jlora.updates import Update, others, updates

_ALWAYS = ("r", "lora_alpha", "target_modules")  # also where they are the default
_SHOWN = 8  # of a list; of longer ones the first three


def describe(path: str | Path, *, all_layers: bool = False) -> str:
    """Tables of the adapter at `path`.

    Args:
        path: as for `load_adapter`.
        all_layers: a row for each layer; otherwise layers that are alike share one.

    Raises:
        JloraError: nothing readable at `path`; factors that are not what its configuration says.
    """
    stored = adapters.read(path)
    where = Path(stored.where)
    found = updates(stored)
    sizes = {name: norms.norm(update) for name, update in found.items()}
    form = "PEFT" if (where / peft.CONFIG_FILE).is_file() else "Orbax"
    about = [("adapter", f"{path} ({form})"), ("base model", _base_model(where) or "not said")]
    if stored.base is not None:
        about.append(("trained on", str(stored.base)))
    parts = [
        tables.render([*about, *settings(stored.config).items()], left=2),
        _layers(stored, found, sizes, all_layers),
        tables.render([(name, _size(n)) for name, n in _files(where).items()]),
    ]
    zero = [name for name, size in sizes.items() if size == 0]
    if zero:
        what = "everywhere" if len(zero) == len(sizes) else f"at {_some(zero)}"
        parts.append(f"the low-rank update is zero {what}: it changes nothing there")
    return "\n\n".join(parts)


def settings(config: LoraConfig) -> dict[str, str]:
    """The fields that matter, by name: those always shown, and what is not at its default."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    default = LoraConfig()
    return {
        name: text(value)
        for name, value in fields.items()
        if name in _ALWAYS or value != getattr(default, name)
    }


def text(value: Any) -> str:
    """A setting as a person would write it."""
    if isinstance(value, dict):
        value = tuple(f"{key}: {text(v)}" for key, v in value.items())
    return _some(list(map(str, value))) if isinstance(value, tuple) else str(value)


def _layers(
    stored: StoredAdapter, found: dict[str, Update], sizes: dict[str, float], all_layers: bool
) -> str:
    rows = [
        (name, (str(update.shape), str(update.r), f"{update.alpha:g}", str(update.parameters)))
        for name, update in found.items()
    ]
    more = others(stored)
    rows += [(p, (str(leaf.shape), "", "", str(math.prod(leaf.shape)))) for p, leaf in more.items()]
    lines: list[Sequence[str]] = [("path", "shape", "rank", "alpha", "norm", "parameters")]
    total = 0
    for name, own, cells in rows_of(rows, all_layers):
        *start, count = cells
        norm = tables.span([sizes[path] for path in own]) if own[0] in sizes else ""
        lines.append((name, *start, norm, tables.times(len(own), int(count))))
        total += len(own) * int(count)
    # What else is trained has a norm only beside the base.
    norm = "" if more else f"{math.hypot(*sizes.values()):.3g}"
    lines.append(("total", "", "", "", norm, f"{total:,d}"))
    return tables.render(lines, left=2)


def rows_of(
    rows: Sequence[tuple[str, tables.Cells]], all_layers: bool
) -> list[tuple[str, list[str], tables.Cells]]:
    """The rows as `tables.grouped` gives them, or each on its own."""
    return [(p, [p], cells) for p, cells in rows] if all_layers else tables.grouped(rows)


def _base_model(where: Path) -> str | None:
    """The base model that the files of an adapter, or of the run it is in, name."""
    config = where / peft.CONFIG_FILE
    if config.is_file():
        name = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if name:
            return str(name)
    for parent in list(where.parents)[:2]:  # RUN/adapter, RUN/checkpoints/STEP
        if (parent / "config.toml").is_file():
            name = conversion.read_toml(parent / "config.toml").get("model")
            return None if name is None else str(name)
    return None


def _files(where: Path) -> dict[str, int]:
    """Each entry of the directory -> its bytes, those of a directory all together."""
    return {
        entry.name + "/" * entry.is_dir(): sum(
            file.stat().st_size for file in (entry, *entry.rglob("*")) if file.is_file()
        )
        for entry in sorted(where.iterdir())
    }


def _size(n: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n} bytes"


def _some(names: Sequence[str]) -> str:
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:3])} and {len(names) - 3} more"
