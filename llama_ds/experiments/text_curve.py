"""A curve as lines of text, for terminals."""

from __future__ import annotations

import math

from llama_ds.experiments.records import Curve

WIDTH, HEIGHT = 64, 12  # characters
BLOCKS = " ▁▂▃▄▅▆▇█"


def text_curve(curve: Curve, width: int = WIDTH, height: int = HEIGHT, encoding: str | None = "utf-8") -> str:
    """Return a chart of the means of neighbouring values, `width` columns of at most `height` lines.

    Values that are not finite are left out; "" if there is no other. A terminal whose `encoding` has no block elements
    gets # for at least half a block.
    """
    blocks = BLOCKS if _encodable(BLOCKS, encoding) else "    #####"
    points = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if math.isfinite(value)]
    if not points:
        return ""
    width = min(width, len(points))
    groups = [points[len(points) * i // width : len(points) * (i + 1) // width] for i in range(width)]
    means = [math.fsum(value for _, value in group) / len(group) for group in groups]
    low, high = min(means), max(means)
    # The lowest column has one eighth of a line, so that every column shows.
    eighths = [1 + round((mean - low) / (high - low or 1.0) * (8 * height - 1)) for mean in means]
    labels = {height - 1: f"{high:.3f}", 0: f"{low:.3f}"}
    margin = max(map(len, labels.values()))
    lines = []
    for line in reversed(range(height)):
        bars = "".join(blocks[min(8, max(0, size - 8 * line))] for size in eighths)
        lines.append(f"{labels.get(line, ''):>{margin}} {bars}".rstrip())
    first, last = f"step {points[0][0]:,}", f"{points[-1][0]:,}"
    lines.append(" " * (margin + 1) + first + last.rjust(max(len(last) + 1, width - len(first))))
    return "\n".join(lines)


def _encodable(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
