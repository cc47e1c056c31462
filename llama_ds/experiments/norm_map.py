"""Heat maps of the norms of a run: a row for each layer, a column for each measured step, as self-contained SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

COLUMNS = 160  # more lines than that share columns, which show the largest
CELL, HEIGHT, LEFT, TOP = 5, 9, 78, 20
MAX_LABELS = 40
# From a quarter of the row's median and less to eight times it and more, a step for each factor of sqrt(2).
COLOURS = ("#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#e8e8e8", "#fddbc7", "#f4a582", "#e58368", "#d6604d", "#b2182b",
           "#67001f")  # fmt: skip
MIDDLE = 4

Rows = dict[str, list[float | None]]  # by name of the layer, a number for each line


def heat_map(lines: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Return the SVG of the norms of a kind: those of all weights of a layer together, beside their median."""
    columns = _columns(lines)
    rows = {name: _largest(values, columns) for name, values in layer_norms(lines, kind).items()}
    cells: dict[int, list[str]] = {}
    for y, values in enumerate(rows.values()):
        usual = median([value for value in values if value] or [1.0])
        for x, value in enumerate(values):
            if value is not None:
                place = f"M{LEFT + x * CELL} {TOP + y * HEIGHT}h{CELL}v{HEIGHT}h-{CELL}z"
                cells.setdefault(_level(value, usual), []).append(place)
    width, height = LEFT + CELL * len(columns) + 10, TOP + HEIGHT * len(rows) + 20
    parts = [f'<path fill="{COLOURS[level]}" d="{"".join(found)}"/>' for level, found in sorted(cells.items())]
    first, last = lines[0]["step"], lines[-1]["step"]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(width, 460)} {height}" '
        f'width="{max(width, 460)}" height="{height}" font-family="sans-serif" font-size="9" fill="currentColor">'
        f"{''.join(_scale(kind))}{''.join(parts)}{''.join(_labels(list(rows)))}"
        f'<text x="{LEFT}" y="{height - 6}">step {first:,} to {last:,}</text></svg>'
    )


def layer_norms(lines: Sequence[Mapping[str, Any]], kind: str) -> Rows:
    """Return the norm of each layer at each line: embedding, decoder layers from 1, final norm and head."""
    roles = lines[-1]["norms"].get(kind, {})
    layers = max((len(values) for values in roles.values()), default=0)
    single = [role for role, values in roles.items() if len(values) == 1]
    if layers > 1:
        inner = [role for role in roles if role not in single]
        rows = {f"layer {n + 1}": [_together(line, kind, inner, n) for line in lines] for n in range(layers)}
    else:
        rows = {}
    outer = {role: [_together(line, kind, [role], 0) for line in lines] for role in single}
    return {role: outer.pop(role) for role in single[:1]} | rows | outer


def _together(line: Mapping[str, Any], kind: str, roles: Sequence[str], layer: int) -> float | None:
    found = [line["norms"].get(kind, {}).get(role, []) for role in roles]
    values = [row[layer] if layer < len(row) else None for row in found]
    numbers = [value for value in values if value is not None]
    return math.hypot(*numbers) if len(numbers) == len(values) else None


def _columns(lines: Sequence[Any]) -> list[range]:
    per = -(-len(lines) // COLUMNS)
    return [range(start, min(start + per, len(lines))) for start in range(0, len(lines), per)]


def _largest(values: Sequence[float | None], columns: Sequence[range]) -> list[float | None]:
    return [max((v for i in column if (v := values[i]) is not None), default=None) for column in columns]


def _level(value: float, usual: float) -> int:
    ratio = 2 * math.log2(value / usual) if value > 0 else -MIDDLE
    return min(max(round(ratio) + MIDDLE, 0), len(COLOURS) - 1)


def _labels(names: Sequence[str]) -> Iterator[str]:
    every = -(-len(names) // MAX_LABELS)
    for y, name in enumerate(names):
        if y % every == 0:
            yield f'<text x="{LEFT - 4}" y="{TOP + y * HEIGHT + 8}" text-anchor="end">{escape(name)}</text>'


def _scale(kind: str) -> Iterator[str]:
    left = LEFT + 230
    yield f'<text x="{left - 4}" y="12" text-anchor="end">{kind}, relative to the layer\'s median: 1/4</text>'
    for level, colour in enumerate(COLOURS):
        yield f'<rect x="{left + level * 10}" y="4" width="10" height="10" fill="{colour}"/>'
    yield f'<text x="{left + 10 * len(COLOURS) + 4}" y="12">8</text>'
