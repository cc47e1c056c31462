"""A search as one self-contained HTML page: ranking, memory by rank, schedule, scatter plot of layouts, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from llama_ds.layout.recompute import GIB
from llama_ds.perf.plan.cost import Cost
from llama_ds.perf.plan.estimate import Estimate, report
from llama_ds.perf.plan.memory import Memory
from llama_ds.perf.plan.search import SearchResult
from llama_ds.perf.plan.step import stage_costs, stage_message
from llama_ds.perf.plan.tables import RANKED, ranked
from llama_ds.schedules.simulate import simulate

_PARTS = {
    "weights": "#4e79a7",
    "gradients": "#59a14f",
    "optimizer": "#9c755f",
    "activations": "#f28e2b",
    "working": "#edc948",
    "margin": "#bab0ac",
    "matrices": "#b07aa1",
}
_OPS = {"F": "#4e79a7", "BW": "#59a14f", "B": "#59a14f", "W": "#edc948"}
_SCHEDULES = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#b07aa1")
_STYLE = (
    "body{font:14px sans-serif;margin:2em auto;max-width:1240px;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:3px 9px;border-bottom:1px solid #ddd;text-align:right}td.l,th.l{text-align:left}"
    "pre{background:#f6f6f6;padding:1em;overflow:auto}h2{margin-top:2em}"
)


def page(title: str, found: SearchResult, cost: Cost) -> str:
    """Return the page; its pictures show the best layout."""
    best = found.best[0]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{found.legal:,} legal layouts; {found.simulated:,} simulated, the others pruned by a lower bound.</p>",
        _table(RANKED, [ranked(position, item) for position, item in enumerate(found.best, 1)]),
        "<h2>The best layout</h2>",
        f"<pre>{escape(report(best))}</pre>",
        "<h2>Memory of the pipeline's ranks</h2>",
        memory_bars(best.memory, best.gpu.memory_gib),
        "<h2>Schedule</h2>",
        schedule_picture(best),
        "<h2>Layouts: speed and memory</h2>",
        scatter(found.points),
        "<h2>Cost of the run</h2>",
        cost_table(cost),
        "<h2>Layouts rejected or left out</h2>",
        _table(
            ("count", "reason", "example"),
            [
                (f"{item.count}", why, item.example)
                for why, item in (*sorted(found.rejected.items()), *found.ordering.left_out.items())
            ],
        ),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def memory_bars(ranks: Sequence[Memory], device_gib: float) -> str:
    """Return a bar per rank, in GiB, with the device's memory as a line."""
    width, row, left = 1000.0, 20, 60
    scale = width / max(device_gib, *(rank.total / GIB for rank in ranks)) * 0.98
    height = row * len(ranks) + 40
    parts = []
    for number, rank in enumerate(ranks):
        x, y = float(left), number * row
        parts.append(f'<text x="0" y="{y + 14}">rank {number}</text>')
        for name, held in rank.at_peak.items():
            size = held / GIB
            label = f"{name} {size:.2f} GiB"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="{row - 3}" fill="{_PARTS[name]}">'
                f"<title>{label}</title></rect>"
            )
            x += size * scale
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{rank.total / GIB:.1f} GiB</text>')
    edge, foot = left + device_gib * scale, row * len(ranks)
    parts.append(f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="0" y2="{foot}" stroke="#c00"/>')
    parts.append(f'<text x="{edge:.1f}" y="{foot + 12}" text-anchor="middle">{device_gib:g} GiB</text>')
    return _svg(width + left + 40, height, parts, _PARTS, height - 12)


def schedule_picture(found: Estimate) -> str:
    """Return the timeline of the step's first micro-batches, from the event simulation."""
    job = found.step.job
    shown = min(job.micro_batches, max(2 * job.pp, 8))
    shown -= shown % job.pp if job.schedule == "interleaved" else 0
    transfer, wait = stage_message(found.gpu, job)
    timeline = simulate(job.plan(shown), stage_costs(found.gpu, job), transfer, wait)
    width, row, left = 1000.0, 20, 60
    scale = width / timeline.length
    height = row * job.pp + 40
    parts = [f'<text x="{left}" y="{height - 26}">{shown} of {job.micro_batches} micro-batches</text>']
    for number, rank in enumerate(timeline.ranks):
        y = number * row
        parts.append(f'<text x="0" y="{y + 14}">rank {number}</text>')
        for step, start, end in rank:
            label = f"{step.op.value} chunk {step.chunk} micro-batch {step.micro_batch}: {(end - start) * 1e3:.1f} ms"
            parts.append(
                f'<rect x="{left + start * scale:.1f}" y="{y}" width="{max(0.4, (end - start) * scale - 0.4):.1f}" '
                f'height="{row - 3}" fill="{_OPS[step.op.value]}"><title>{label}</title></rect>'
            )
    legend = {"forward": _OPS["F"], "backward": _OPS["B"], "weight gradients, deferred": _OPS["W"]}
    return _svg(width + left + 40, height + 14, parts, legend, height + 2)


def scatter(points: Sequence[tuple[str, int, float, float]]) -> str:
    """Return a scatter plot of the simulated layouts: tokens/s/GPU over GiB, coloured by schedule."""
    width, height, left = 1000.0, 320.0, 60
    names = sorted({name for name, *_ in points})
    colours = {name: _SCHEDULES[n % len(_SCHEDULES)] for n, name in enumerate(names)}
    max_gib, fastest = max(p[2] for p in points) * 1.05, max(p[3] for p in points)
    slowest = min(p[3] for p in points)
    span = max(fastest - slowest, 0.05 * fastest)
    gib_step, speed_step = _round_step(max_gib), _round_step(span)
    parts = [
        f'<text x="{left}" y="12">tokens/s/GPU, over GiB of the fullest rank</text>',
        f'<line x1="{left}" x2="{left + width}" y1="{height}" y2="{height}" stroke="#888"/>',
        f'<line x1="{left}" x2="{left}" y1="20" y2="{height}" stroke="#888"/>',
    ]

    def position(gib: float, speed: float) -> tuple[float, float]:
        return left + gib / max_gib * width, height - 10 - (speed - slowest) / span * (height - 50)

    for tick in range(int(max_gib / gib_step) + 1):
        x, _ = position(tick * gib_step, slowest)
        parts.append(f'<text x="{x:.1f}" y="{height + 13}" text-anchor="middle">{tick * gib_step:g}</text>')
    for tick in range(math.ceil(slowest / speed_step), int((slowest + span) / speed_step) + 1):
        _, y = position(0, tick * speed_step)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick * speed_step:,g}</text>')
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
    for name, pp, gib, speed in points:
        x, y = position(gib, speed)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colours[name]}" fill-opacity="0.7">'
            f"<title>{name} pp {pp}: {speed:,.0f} tokens/s/GPU, {gib:.1f} GiB</title></circle>"
        )
    return _svg(width + left + 40, height + 40, parts, colours, height + 34)


def _round_step(span: float) -> float:
    """Return a tick spacing for about five ticks on an axis: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return power * next(step for step in (1, 2, 5, 10) if step * power >= span / 5)


def cost_table(cost: Cost) -> str:
    """Return the run's cost as a table."""
    return _table(
        ("GPU-hours", "days", "MWh", "t CO2eq"),
        [
            (
                f"{cost.gpu_hours:,.0f}",
                f"{cost.days:,.1f}",
                f"{cost.megawatt_hours:,.0f}",
                f"{cost.carbon_tonnes:,.0f}",
            )
        ],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(kind: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{kind}{'' if text[:1].isdigit() else ' class=' + chr(34) + 'l' + chr(34)}>{escape(text)}</{kind}>"
            for text in row
        )

    lines = [f"<tr>{cells('th', head)}</tr>", *(f"<tr>{cells('td', row)}</tr>" for row in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _svg(width: float, height: float, parts: Sequence[str], legend: dict[str, str], y: float) -> str:
    keys, x = [], 60.0
    for name, colour in legend.items():
        keys.append(f'<rect x="{x:.0f}" y="{y - 9:.0f}" width="11" height="11" fill="{colour}"/>')
        keys.append(f'<text x="{x + 15:.0f}" y="{y:.0f}">{escape(name)}</text>')
        x += 30 + 7 * len(name)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" font-family="sans-serif" '
        f'font-size="11">' + "".join([*parts, *keys]) + "</svg>"
    )
