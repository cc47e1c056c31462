"""The rank map, as a table and as an SVG picture: which ranks run on which host."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from llama_ds.layout.axes import Axes, Coords
from llama_ds.layout.nodelist import compress
from llama_ds.layout.placement import PlacedRank, by_host, sizes


def table(ranks: Sequence[PlacedRank], every_host: bool = False) -> str:
    """Return the ranks of a job as a table; neighbouring hosts with the same pattern share a line.

    A host has a line for each stage if its stages have different coordinates along the other axes.
    """
    hosts = list(by_host(ranks).values())
    runs = [[host] for host in hosts] if every_host else _runs(hosts)
    inner = [axis for axis in sizes(ranks).named if axis != "pp"]
    rows = [("hosts", "count", "slots", "ranks", "stage", *inner)]
    for run in runs:
        names = compress(host[0].host for host in run)
        for part in _parts(run):
            rows.append(
                (
                    *(names, str(len(run)), spans(r.slot for r in part), spans(r.rank for r in part)),
                    *(spans(r.coords.pp for r in part), *(_along(axis, part, run) for axis in inner)),
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def svg(ranks: Sequence[PlacedRank], title: str) -> str:
    """Return the ranks of a job as an SVG: a box per host, slots coloured by stage, tp groups outlined."""
    axes = sizes(ranks)
    hosts = by_host(ranks)
    spanning = {
        _tp_group(r) for host in hosts.values() for r in host if r.coords.tp and ranks[r.rank - 1].host != r.host
    }
    grid = _grid(hosts, 5 * max(len(_coords_label(rank)) for rank in ranks) + 4)
    legend, top = _legend(axes, grid.width)
    about = f"{len(hosts)} hosts, {len(ranks)} ranks: {axes.words(' * ')}"
    parts = [_head(grid.width, top + grid.height, title, about), *legend]
    colours = _colours(axes.pp)
    for n, (name, found) in enumerate(hosts.items()):
        x, y = grid.corner(n)
        parts += _host(name, found, x, y + top, grid, colours)
        if axes.tp > 1:
            parts += _outlines(found, spanning, grid.slot)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _runs(hosts: Iterable[list[PlacedRank]]) -> list[list[list[PlacedRank]]]:
    """Group neighbouring hosts whose ranks have the same coordinates relative to the dp coordinate of their first."""
    runs: list[list[list[PlacedRank]]] = []
    last: list[Coords] = []
    for host in hosts:
        shape = [r.coords._replace(dp=r.coords.dp - host[0].coords.dp) for r in host]
        if shape == last:
            runs[-1].append(host)
        else:
            runs.append([host])
        last = shape
    return runs


def _parts(run: Sequence[list[PlacedRank]]) -> list[list[PlacedRank]]:
    """Return the ranks of a run of hosts, split by stage if stages differ in coordinates along the other axes."""
    stages: dict[int, list[PlacedRank]] = {}
    for host in run:
        for rank in host:
            stages.setdefault(rank.coords.pp, []).append(rank)
    patterns = {tuple(r.coords._replace(pp=0) for r in stage) for stage in stages.values()}
    return [[rank for stage in stages.values() for rank in stage]] if len(patterns) == 1 else list(stages.values())


def _along(axis: str, part: Sequence[PlacedRank], run: Sequence[list[PlacedRank]]) -> str:
    """Return the coordinates along an axis; for dp also the number of replicas with ranks on each host of the run."""
    each = len({rank.coords.dp for rank in run[0]})
    more = f" ({each} a host)" if axis == "dp" and len(run) > 1 else ""
    return spans(getattr(r.coords, axis) for r in part) + more


def _tp_group(rank: PlacedRank) -> Coords:
    """Return the key of the rank's tensor-parallel group."""
    return rank.coords._replace(tp=0)


def spans(numbers: Iterable[int]) -> str:
    """Return integers as ranges: "0-3,6"."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


# Pixels: minimum width and height of a slot, height of a host's name, gap between hosts.
_SLOT, _ROW, _NAME, _GAP = 34, 28, 16, 10
_STAGE = 180  # pixels: width of a legend entry
_STYLE = (
    "text{fill:#222}.n{font-size:11px;font-weight:bold}.r{font-size:10px;font-weight:bold;text-anchor:middle}"
    ".p{font-size:8px;text-anchor:middle}.h{fill:#f4f4f4;stroke:#999}.g{fill:none;stroke:#222;stroke-width:1.6}"
    ".x{fill:none;stroke:#d00;stroke-width:2;stroke-dasharray:4 2}.s{stroke:#fff;stroke-width:.6}"
)


@dataclass(frozen=True)
class _Grid:
    """A grid of host boxes, all as wide as the largest host."""

    slot: int  # width of a slot in pixels
    slots: int
    columns: int
    rows: int

    @property
    def box(self) -> tuple[int, int]:
        return self.slots * self.slot + 8, _NAME + _ROW + 6

    @property
    def width(self) -> int:
        return max(self.columns * (self.box[0] + _GAP) + _GAP, 560)

    @property
    def height(self) -> int:
        return self.rows * (self.box[1] + _GAP) + _GAP

    def corner(self, n: int) -> tuple[int, int]:
        row, column = divmod(n, self.columns)
        return _GAP + column * (self.box[0] + _GAP), row * (self.box[1] + _GAP)


def _grid(hosts: dict[str, list[PlacedRank]], label: int) -> _Grid:
    """Arrange the hosts in a picture somewhat wider than high, with a power of two of them in a row."""
    slot = max(_SLOT, label)
    slots = max(*map(len, hosts.values()), *(-(-len(name) * 7 // slot) for name in hosts))
    width, height = _Grid(slot, slots, 1, 1).box
    columns = (1.5 * len(hosts) * (height + _GAP) / (width + _GAP)) ** 0.5
    columns = min(len(hosts), 2 ** max(0, round(math.log2(columns))))
    return _Grid(slot, slots, columns, -(-len(hosts) // columns))


def _coords_label(rank: PlacedRank) -> str:
    return ".".join(map(str, rank.coords.named.values()))


def _text(text: str) -> str:
    """Escape a text for XML, which cannot represent most control characters."""
    return escape("".join(c if c.isprintable() else "?" for c in text))


def _head(width: int, height: int, title: str, subtitle: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif"><title>{_text(title)}</title><style>{_STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n'
        f'<text x="{_GAP}" y="22" font-size="15">{_text(title)}</text>'
        f'<text x="{_GAP}" y="40" font-size="12">{_text(subtitle)}</text>'
    )


def _legend(axes: Axes, width: int) -> tuple[list[str], int]:
    """Return the legend's elements and the y coordinate below it."""
    columns = max(1, (width - _GAP) // _STAGE)
    parts = []
    for stage, colour in enumerate(_colours(axes.pp)):
        x, y = _GAP + stage % columns * _STAGE, 50 + stage // columns * 18
        first = axes.rank(pp=stage)
        what = f"stage {stage}: ranks {first}-{first + axes.stride('pp') - 1}"
        parts.append(f'<rect x="{x}" y="{y}" width="14" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 19}" y="{y + 10}" font-size="11">{what}</text>')
    y = 50 + -(-axes.pp // columns) * 18
    parts.append(f'<rect class="g" x="{_GAP}" y="{y}" width="14" height="12"/>')
    parts.append(f'<text x="{_GAP + 19}" y="{y + 10}" font-size="11">tp group</text>')
    parts.append(f'<rect class="x" x="{_GAP + 80}" y="{y}" width="14" height="12"/>')
    parts.append(f'<text x="{_GAP + 99}" y="{y + 10}" font-size="11">tp group over several hosts</text>')
    order = ".".join("stage" if axis == "pp" else axis for axis in axes.named)
    parts.append(f'<text x="{_GAP + 270}" y="{y + 10}" font-size="11">in a slot: rank, below it {order}</text>')
    return parts, y + 26


def _colours(pp: int) -> list[str]:
    """Return a light colour for each stage, evenly spaced in hue and alternating in lightness."""
    colours = []
    for stage in range(pp):
        rgb = colorsys.hls_to_rgb(stage / pp, 0.8 if stage % 2 else 0.7, 0.65)
        colours.append("#" + "".join(f"{round(255 * channel):02x}" for channel in rgb))
    return colours


def _host(name: str, found: Sequence[PlacedRank], x: int, y: int, grid: _Grid, colours: Sequence[str]) -> list[str]:
    """Draw a host's box and slots as a group with its origin at the first slot's corner."""
    width, height = grid.box
    parts = [
        f'<g id={quoteattr("host-" + name)} transform="translate({x + 4} {y + _NAME})">'
        f'<rect class="h" x="-4" y="-{_NAME}" width="{width}" height="{height}" rx="3"/>'
        f'<text class="n" y="-4">{_text(name)}</text>'
    ]
    for r in found:
        left, middle = r.slot * grid.slot, r.slot * grid.slot + grid.slot // 2
        coords = ", ".join(f"{'stage' if axis == 'pp' else axis} {at}" for axis, at in r.coords.named.items())
        label = f"rank {r.rank}: {r.host} slot {r.slot}, {coords}"
        parts.append(
            f"<g><title>{_text(label)}</title>"
            f'<rect class="s" x="{left}" width="{grid.slot}" height="{_ROW}" fill="{colours[r.coords.pp]}"/>'
            f'<text class="r" x="{middle}" y="12">{r.rank}</text>'
            f'<text class="p" x="{middle}" y="23">{_coords_label(r)}</text></g>'
        )
    return parts


def _outlines(found: Sequence[PlacedRank], spanning: set[Coords], slot: int) -> list[str]:
    """Draw a frame around each tp group's slots on a host."""
    groups: dict[Coords, list[int]] = {}
    for rank in found:
        groups.setdefault(_tp_group(rank), []).append(rank.slot)
    return [
        f'<rect class="{"x" if group in spanning else "g"}" x="{slots[0] * slot + 1}" y="1" '
        f'width="{len(slots) * slot - 2}" height="{_ROW - 2}" rx="3"/>'
        for group, slots in groups.items()
    ]
