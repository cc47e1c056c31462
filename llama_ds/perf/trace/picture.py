"""A recorded step as an SVG: a row per rank, a box per event, and below it the communication in flight."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape

from llama_ds.perf.trace.kinds import COMPUTE, IN_FLIGHT
from llama_ds.perf.trace.read import Event, RankRecord

_COLOURS = {
    "F": "#4e79a7",
    "BW": "#59a14f",
    "B": "#59a14f",
    "W": "#edc948",
    "optimizer": "#9c755f",
    "orthogonalise": "#d37295",
    "recompute": "#b07aa1",
    "wait data": "#bab0ac",
    "wait activation": "#f4c7c3",
    "wait grad": "#f4c7c3",
    "wait norm": "#f4c7c3",
    "wait reduction": "#e15759",
    "wait weights": "#e15759",
    "wait matrices": "#e15759",
    "wait tp": "#e15759",
    "wait agreement": "#e15759",
    "send activation": "#e15759",
    "send grad": "#e15759",
}
_IN_FLIGHT_COLOURS = {"tp": "#86bcb6"} | dict.fromkeys(("reduce", "gather", "matrices", "agree"), "#76b7b2")


def picture(ranks: Iterable[RankRecord], title: str) -> str:
    """Return the SVG of the ranks' first recorded step."""
    kept = list(ranks)
    steps = [rank.steps()[0] for rank in kept]
    begin = min(step.begin for step, _ in steps)
    length = max(step.end for step, _ in steps) - begin
    width, row, left = 1200.0, 34, 70
    scale = (width - left - 10) / length
    height = 60 + row * len(kept) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="20" font-size="14">{escape(title)}: '
        f"{length / 1e3:.0f} ms</text>",
    ]
    for n, (rank, (_, inner)) in enumerate(zip(kept, steps, strict=True)):
        top = 34 + n * row
        parts.append(f'<text x="10" y="{top + 18}">rank {rank.rank}</text>')
        for event in inner:
            if event.what in _COLOURS or event.what in IN_FLIGHT:
                parts += _box(event, left + (event.begin - begin) * scale, event.length * scale, top)
    return "\n".join([*parts, *_legend(left, height), "</svg>"])


def _box(event: Event, x: float, width: float, top: int) -> list[str]:
    label = f"{event.what}{'' if event.micro_batch < 0 else f' {event.micro_batch}'}, {event.length / 1e3:.1f} ms"
    in_flight = event.what in IN_FLIGHT
    box = f'y="{top + 24}" height="4"' if in_flight else f'y="{top}" height="22"'
    colour = _IN_FLIGHT_COLOURS[event.what] if in_flight else _COLOURS[event.what]
    parts = [f'<rect x="{x:.1f}" {box} width="{max(width, 0.3):.1f}" fill="{colour}"><title>{label}</title></rect>']
    if event.what in COMPUTE and width > 14:
        parts.append(f'<text x="{x + 2:.1f}" y="{top + 15}" fill="white">{event.micro_batch}</text>')
    return parts


def _legend(left: float, height: int) -> list[str]:
    boxes = {
        "forward": "F",
        "backward": "BW",
        "weight gradients": "W",
        "recompute": "recompute",
        "optimizer": "optimizer",
        "wait for data": "wait data",
        "wait for a stage": "wait grad",
        "wait for communication": "wait tp",
    }
    parts, x = [], left
    for text, colour in {
        **{k: _COLOURS[v] for k, v in boxes.items()},
        "in flight": _IN_FLIGHT_COLOURS["gather"],
    }.items():
        parts.append(f'<rect x="{x:.0f}" y="{height - 22}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16:.0f}" y="{height - 12}">{text}</text>')
        x += 26 + 6.5 * len(text)
    return parts
