"""Plain-text tables, in which layers that are alike share a row."""

import math
import re
from collections.abc import Iterable, Sequence

Cells = tuple[str, ...]


def render(rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The rows as lines, in columns as wide as needed; the first `left` are flush left."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def grouped(rows: Iterable[tuple[str, Cells]]) -> list[tuple[str, list[str], Cells]]:
    """Rows in which paths that differ in nothing but the index of the layer are one.

    Args:
        rows: path -> the cells that have to be equal.

    Returns:
        Path with the layers' indices, "layers/0-2,5/up"; the paths it stands for; the cells.
    """
    groups: dict[tuple[str, str, Cells], tuple[list[int], list[str]]] = {}
    for path, cells in rows:
        before, *index, after = ["", *re.split(r"(?:^|(?<=/))(\d+)(?=/|$)", path, maxsplit=1)][-3:]
        indices, paths = groups.setdefault((before, after, cells), ([], []))
        indices.extend(map(int, index))
        paths.append(path)
    return [
        (before + ranges(indices) + after, paths, cells)
        for (before, after, cells), (indices, paths) in groups.items()
    ]


def times(count: int, size: int) -> str:
    """The size of `count` things: "30 × 1,024"."""
    return f"{count} × {size:,d}" if count > 1 else f"{size:,d}"


def span(values: Sequence[float]) -> str:
    """The smallest and the largest of some numbers, once where they look alike."""
    unknown = [value for value in values if math.isnan(value)]
    least, most = unknown[:1] * 2 or (min(values), max(values))
    ends = dict.fromkeys(f"{value:.3g}" for value in (least, most))
    return " to ".join(ends)


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] to "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
