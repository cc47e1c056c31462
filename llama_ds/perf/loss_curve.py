"""The loss of a run over its tokens, as a self-contained SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

TRAIN, VALIDATION = "#4e79a7", "#f28e2b"
MAX_POINTS = 800  # more would not show
WIDTH, HEIGHT, LEFT, TOP = 720.0, 300.0, 60.0, 34.0

Curve = Sequence[tuple[float, float]]  # (tokens, loss) in order


def loss_curve(train: Curve, validation: Curve) -> str:
    """Return the SVG of the training loss and the validation losses; losses that are not finite are left out."""
    curves = [[(x, y) for x, y in curve if math.isfinite(y)] for curve in (train, validation)]
    curves[0] = _thinned(curves[0])
    points = [point for curve in curves for point in curve] or [(0.0, 0.0)]
    last = max(x for x, _ in points) or 1.0
    ticks = _ticks(min(y for _, y in points), max(y for _, y in points))
    bottom, top = ticks[0], ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / last * WIDTH, TOP + (top - y) / (top - bottom) * HEIGHT

    parts = [*_axes(ticks, last, place(0, bottom)[1]), *_legend()]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curves[0]))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{TRAIN}" stroke-width="1.5"/>')
    for tokens, loss in curves[1]:
        x, y = place(tokens, loss)
        title = f"<title>{tokens:,.0f} tokens: validation loss {loss:.4f}</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{VALIDATION}">{title}</circle>')
    size = f"{LEFT + WIDTH + 30:.0f}", f"{TOP + HEIGHT + 46:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
        f'height="{size[1]}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        + "".join(parts)
        + "</svg>\n"
    )


def _thinned(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return a curve of at most MAX_POINTS points, each the mean of as many neighbours."""
    size = -(-len(curve) // MAX_POINTS)
    groups = [curve[i : i + size] for i in range(0, len(curve), size or 1)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _ticks(lowest: float, highest: float) -> list[float]:
    """Return three to eight round numbers that enclose the losses."""
    rough = max(highest - lowest, 1e-3) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.floor(lowest / step)
    return [step * i for i in range(first, max(math.ceil(highest / step), first + 1) + 1)]


def _axes(ticks: list[float], last: float, base: float) -> list[str]:
    parts = []
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0])))
    for tick in ticks:
        y = TOP + (ticks[-1] - tick) / (ticks[-1] - ticks[0]) * HEIGHT
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.{digits}f}</text>')
    for part in range(5):
        x = LEFT + part / 4 * WIDTH
        parts.append(f'<text x="{x:.1f}" y="{base + 18:.1f}" text-anchor="middle">{_short(part / 4 * last)}</text>')
    parts.append(f'<text x="{LEFT + WIDTH / 2:.0f}" y="{base + 38:.0f}" text-anchor="middle">tokens</text>')
    return parts


def _legend() -> list[str]:
    return [
        f'<line x1="{LEFT}" x2="{LEFT + 20}" y1="14" y2="14" stroke="{TRAIN}" stroke-width="1.5"/>'
        f'<text x="{LEFT + 26}" y="18">training loss</text>',
        f'<circle cx="{LEFT + 150}" cy="14" r="3.5" fill="{VALIDATION}"/>'
        f'<text x="{LEFT + 160}" y="18">validation loss</text>',
        f'<text x="{LEFT + WIDTH}" y="18" text-anchor="end">nats per token</text>',
    ]


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"
