"""Draw docs/architecture.svg: the rooms of llama_ds on their floors, with the imports between them.

python docs/architecture.py    # run it again when tests/test_docs.py says that the picture is out of date
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from html import escape
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from tests.test_architecture import FLOOR_OF, FLOORS, Names, module_of, room_of, source_files

PICTURE = REPO / "docs" / "architecture.svg"
WIDTH, TOP, BOX, GAP = 900, 46, 44, 34


class Room(NamedTuple):
    """Left and right edge of a room's box, and what the room holds."""

    left: int
    right: int
    holds: str
    colour: str = "grey"


ROOMS = {
    "__main__": Room(16, 884, "the command llama-ds: train and every program of tools"),
    "train": Room(16, 206, "the script of every rank", "blue"),
    "standby": Room(222, 330, "warm processes"),
    "tools": Room(346, 884, "one thin program per task"),
    "benchmarks": Room(346, 598, "steps, layers, data, machines"),
    "experiments": Room(614, 738, "runs side by side"),
    "launch": Room(346, 838, "hostfiles, launcher commands, preflight checks, supervision of a job"),
    "training": Room(16, 697, "the loop, its engines, feed, checkpoints of a run, reports", "blue"),
    "evaluation": Room(228, 322, "benchmarks"),
    "data": Room(16, 206, "text, shards, order of rows", "amber"),
    "checkpoint": Room(242, 440, "commit, formats, conversion", "green"),
    "parallel": Room(456, 684, "process groups, pipeline engine", "violet"),
    "model": Room(276, 548, "layers, attention, loss, initial weights", "blue"),
    "perf": Room(746, 884, "planner, traces"),
    "job": Room(594, 724, "heartbeat, folder"),
    "layout": Room(16, 848, "axes, stages, counts of FLOPs and bytes, placement of ranks on hosts"),
    "config": Room(16, 790, "run file, its rules, DeepSpeed JSON"),
    "schedules": Room(16, 884, "pipeline schedules as lists of instructions, their proof and simulation"),
}
COLOURS = {  # fill and border
    "grey": ("#f8fafc", "#94a3b8"),
    "blue": ("#eff6ff", "#3b82f6"),
    "amber": ("#fffbeb", "#f59e0b"),
    "green": ("#f0fdf4", "#22c55e"),
    "violet": ("#f5f3ff", "#8b5cf6"),
}

# Where an arrow runs: straight down at x, or down at the first x, across below a floor, and down at the second x.
ROUTES: dict[tuple[str, str], tuple[int] | tuple[int, str, int]] = {
    ("train", "training"): (173,),
    ("tools", "benchmarks"): (472,),
    ("tools", "experiments"): (676,),
    ("tools", "launch"): (769,),
    ("tools", "perf"): (861,),
    ("launch", "job"): (704,),
    ("launch", "layout"): (733,),
    ("training", "data"): (150,),
    ("training", "checkpoint"): (340,),
    ("training", "evaluation"): (275,),
    ("evaluation", "data"): (244, "evaluation", 190),
    ("evaluation", "checkpoint"): (300,),
    ("evaluation", "model"): (316, "evaluation", 446),
    ("evaluation", "job"): (312, "evaluation", 696),
    ("training", "parallel"): (500,),
    ("training", "model"): (448,),
    ("training", "layout"): (217,),
    ("training", "job"): (690,),
    ("training", "perf"): (694, "training", 754),
    ("checkpoint", "model"): (341,),
    ("checkpoint", "layout"): (258,),
    ("parallel", "model"): (474,),
    ("parallel", "layout"): (580,),
    ("parallel", "job"): (650,),
    ("parallel", "schedules"): (562, "job", 859),
    ("perf", "job"): (760, "perf", 717),
    ("perf", "layout"): (806,),
    ("perf", "schedules"): (877,),
    ("model", "layout"): (401,),
    ("layout", "schedules"): (820,),
}

# These rooms may use every room below, and those are used by every room above: most of their arrows would say nothing.
ENTRIES = {
    "train": ("training",),
    "standby": (),
    "tools": ("benchmarks", "experiments", "launch", "perf"),
    "benchmarks": (),
    "experiments": (),
}
MODULES = [name for floor in FLOORS for name in floor if name not in ROOMS and (REPO / f"llama_ds/{name}.py").exists()]
GROUND = ("config", *MODULES)
FEW = 8  # an arrow of fewer imports is left out where a longer way along other arrows leads to the same room
LEFT_OUT = (
    "Left out: arrows to config and to the lowest row;",
    "further arrows of train, tools and benchmarks, which",
    f"may use every room below; arrows of fewer than {FEW}",
    "imports where a longer way leads to the same room.",
)

# The way of a step, drawn over the imports: from x on the lower edge of one room to the upper edge of another, or back.
STEP = (
    ("data", "training", 76, "rows in an order that follows from seed and step"),
    ("training", "parallel", 560, "micro-batches and the learning rate"),
    ("parallel", "model", 508, "layers run forward and backward"),
    ("model", "parallel", 532, "activations and gradients; then the optimizer"),
    ("training", "checkpoint", 380, "weights and optimizer states"),
)
TITLE = "Rooms of llama_ds: imports point down, rooms on one floor do not import each other"
INK, MUTED, ARROW, ORANGE = "#0f172a", "#475569", "#64748b", "#ea580c"


def count_imports() -> Counter[tuple[str, str]]:
    """Count the imports from each room to each other: pairs of a file and what it names of the other room."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in source_files():
        here = room_of(module_of(path))
        names = Names(path, ast.parse((REPO / path).read_text(encoding="utf-8"), path))
        for name in {name for _, name in names.imported}:
            there = room_of(name)
            if here and there in FLOOR_OF and there != here:
                counts[here, there] += 1
    return counts


def arrows(counts: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Return the arrows that the picture shows, and their counts."""
    shown = {
        (here, there): count
        for (here, there), count in counts.items()
        if there not in GROUND and here not in GROUND and there in ENTRIES.get(here, (there,))
    }
    return {
        pair: count
        for pair, count in shown.items()
        if count >= FEW or pair[0] in ENTRIES or not leads_to(*pair, [other for other in shown if other != pair])
    }


def leads_to(start: str, end: str, pairs: list[tuple[str, str]]) -> bool:
    """Tell whether a way of pairs leads from `start` to `end`."""
    return any(here == start and (there == end or leads_to(there, end, pairs)) for here, there in pairs)


def top_of(room: str) -> int:
    """Return the upper edge of a room's box; floors without rooms have no row, and modules share the lowest."""
    floors = sorted({FLOOR_OF[name] for name in ROOMS}, reverse=True)
    return TOP + (floors.index(FLOOR_OF[room]) if room in ROOMS else len(floors)) * (BOX + GAP)


def text(x: int, y: int, words: str, size: int, colour: str, more: str = "") -> str:
    """Return a line of text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}"{more}>{escape(words)}</text>'


def draw_room(name: str, room: Room) -> list[str]:
    """Return the box of a room, its name and what it holds."""
    fill, border = COLOURS[room.colour]
    y, middle = top_of(name), (room.left + room.right) // 2
    return [
        f'<rect x="{room.left}" y="{y}" width="{room.right - room.left}" height="{BOX}" rx="7" fill="{fill}" '
        f'stroke="{border}" stroke-width="1.5"/>',
        text(middle, y + 18, name, 14, INK, ' text-anchor="middle" font-weight="600"'),
        text(middle, y + 35, room.holds, 12, MUTED, ' text-anchor="middle"'),
    ]


def width_of(count: int) -> float:
    """Return the width of an arrow: four classes, so that one import more seldom changes the picture."""
    return 1.2 if count < 5 else 2.2 if count < 15 else 3.6 if count < 30 else 5.2


def draw_arrow(pair: tuple[str, str], count: int) -> str:
    """Return the arrow from the room that imports to the imported one."""
    here, there = pair
    route, width = ROUTES[pair], width_of(count)
    begin, end = top_of(here) + BOX, top_of(there) - 5 - round(width)
    x = route[-1]
    path = f"M{x} {begin}V{end}"
    if len(route) == 3:
        across = top_of(route[1]) + BOX + GAP // 2
        path = f"M{route[0]} {begin}V{across}H{x}V{end}"
    return f'<path d="{path}" fill="none" stroke="{ARROW}" stroke-width="{width}" marker-end="url(#import)"/>'


def draw_step(number: int, here: str, there: str, x: int) -> list[str]:
    """Return one numbered arrow of a step's way."""
    down = FLOOR_OF[here] > FLOOR_OF[there]
    begin = top_of(here) + BOX if down else top_of(here)
    end = top_of(there) - 8 if down else top_of(there) + BOX + 8
    return [
        f'<path d="M{x} {begin}V{end}" stroke="{ORANGE}" stroke-width="2.6" marker-end="url(#step)"/>',
        *numbered(number, x, (begin + end) // 2),
    ]


def numbered(number: int, x: int, y: int) -> list[str]:
    """Return a number in a circle."""
    return [
        f'<circle cx="{x}" cy="{y}" r="8.5" fill="{ORANGE}"/>',
        text(x, y + 4, str(number), 12, "#fff", ' text-anchor="middle" font-weight="600"'),
    ]


def draw_legend() -> list[str]:
    """Return what lines and numbers mean, below the rooms."""
    y = top_of(MODULES[0]) + BOX + 34
    lines = [text(16, y, "The way of a step", 14, ORANGE, ' font-weight="600"')]
    for number, (*_, words) in enumerate(STEP, 1):
        lines += [*numbered(number, 25, y + 20 * number - 4), text(42, y + 20 * number, words, 12, MUTED)]
    lines.append(text(410, y, "Imports", 14, INK, ' font-weight="600"'))
    for row, (count, words) in enumerate(((1, "1 to 4"), (5, "5 to 14"), (15, "15 to 29"), (30, "30 or more")), 1):
        width, at = width_of(count), y + 20 * row - 4
        path = f"M410 {at}H{450 - round(width)}"
        lines.append(f'<path d="{path}" stroke="{ARROW}" stroke-width="{width}" marker-end="url(#import)"/>')
        lines.append(text(468, at + 4, words, 12, MUTED))
    lines += [text(566, y + 20 * row, words, 12, MUTED) for row, words in enumerate(LEFT_OUT, 1)]
    return lines


def marker(name: str, colour: str, size: float) -> str:
    """Return the definition of an arrow's head."""
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="2" refY="4" markerWidth="{size}" markerHeight="{size}" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
    )


def draw() -> str:
    """Return the picture. A new room needs a place in ROOMS, a new arrow one in ROUTES."""
    if unplaced := sorted(set(FLOOR_OF) - set(ROOMS) - set(GROUND)):
        raise SystemExit(f"docs/architecture.py: no entry in ROOMS for {unplaced}; add where the box is")
    shown = arrows(count_imports())
    if missing := sorted(set(shown) - set(ROUTES)):
        raise SystemExit(f"docs/architecture.py: no entry in ROUTES for {missing}; add where the arrow runs")
    height = top_of(MODULES[0]) + BOX + 146
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif">',
        f"<defs>{marker('import', ARROW, 12)}{marker('step', ORANGE, 12)}</defs>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        text(16, 30, TITLE, 16, INK, ' font-weight="600"'),
        *(draw_arrow(pair, count) for pair, count in sorted(shown.items())),
    ]
    for name, room in ROOMS.items():
        lines += draw_room(name, room)
    lines += draw_room(", ".join(MODULES), Room(16, 884, "modules below all rooms"))
    for number, (here, there, x, _) in enumerate(STEP, 1):
        lines += draw_step(number, here, there, x)
    return "\n".join([*lines, *draw_legend(), "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
