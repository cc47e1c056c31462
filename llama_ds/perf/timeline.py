"""Where a pipeline step's time went, read from what its ranks recorded (`llama_ds.parallel.trace`).

A rank computes, or waits. Waiting for a message counts as exposed communication from when both it waits and the
message has been sent; before that the sender was not ready, and the wait is the schedule's bubble.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ds.errors import UserError
from llama_ds.schedules.schedule import Schedule
from llama_ds.schedules.simulate import StageCost, simulate

COMPUTE = ("F", "BW", "B", "W", "recompute")
COLLECTIVES = ("reduce", "gather")
Rank = dict[str, Any]  # a file's content


@dataclass(frozen=True)
class StepTime:
    """Shares of all ranks' time in one step; times in milliseconds."""

    ranks: int
    step_ms: float
    compute: float
    optimizer: float
    exposed_p2p: float
    exposed_dp: float
    bubble: float  # the rest: a rank waits for another's computation
    p2p_ms: float  # total time of all messages: each alone on its link
    exposed_p2p_of_total: float
    dp_ms: float  # total time in which reductions and gathers were under way
    exposed_dp_of_total: float
    simulated_bubble: float  # of the schedule in the event simulation with the measured times, messages free


def read(folder: str | Path) -> list[Rank]:
    """Read the files of all ranks.

    Raises:
        UserError: a folder without them.
    """
    files = sorted(Path(folder).glob("rank*.json"))
    if not files:
        raise UserError(f"{folder}: no rank*.json in it; set logging.trace_step and run, or give another folder")
    return [json.loads(file.read_text()) for file in files]


def analyse(ranks: Sequence[Rank]) -> StepTime:
    """Return where the step's time went."""
    steps = [_step(rank) for rank in ranks]
    length = max(e["end"] for e in steps) - min(e["begin"] for e in steps)
    sent = {_key(rank, e): e["begin"] for rank in ranks for e in _of(rank, "send activation", "send grad")}
    sizes = {_key(rank, e): e["bytes"] for rank in ranks for e in _of(rank, "send activation", "send grad")}
    whole = length * len(ranks)
    compute = sum(_durations(rank, *COMPUTE) for rank in ranks)
    optimizer = sum(_durations(rank, "optimizer") for rank in ranks)
    exposed_p2p, transfers = 0.0, defaultdict(list)
    for rank in ranks:
        exposed_p2p += _durations(rank, "send activation", "send grad")
        for event in _of(rank, "wait activation", "wait grad"):
            key = _key(rank, event)
            exposed_p2p += max(0.0, event["end"] - max(event["begin"], sent[key]))
            if event["begin"] <= sent[key]:  # it was awaited before it was sent: this was its whole way
                transfers[sizes[key]].append(event["end"] - sent[key])
    p2p = sum(statistics.median(transfers[size]) for size in sizes.values() if size in transfers)
    exposed_dp = sum(_durations(rank, "wait reduction", "wait weights") for rank in ranks)
    # DeepSpeed's own engine does nothing else meanwhile: what it waits is the whole.
    dp = sum(_union(_of(rank, *COLLECTIVES)) or _durations(rank, "wait reduction") for rank in ranks)
    rest = whole - compute - optimizer - exposed_p2p - exposed_dp
    return StepTime(
        ranks=len(ranks),
        step_ms=length / 1e3,
        compute=compute / whole,
        optimizer=optimizer / whole,
        exposed_p2p=exposed_p2p / whole,
        exposed_dp=exposed_dp / whole,
        bubble=rest / whole,
        p2p_ms=p2p / 1e3,
        exposed_p2p_of_total=exposed_p2p / p2p if p2p else 0.0,
        dp_ms=dp / 1e3,
        exposed_dp_of_total=exposed_dp / dp if dp else 0.0,
        simulated_bubble=simulated_bubble(ranks),
    )


def simulated_bubble(ranks: Sequence[Rank]) -> float:
    """Return the bubble of the ranks' schedule with their median times of forwards and backwards, stages made equal."""
    about = ranks[0]
    schedule = Schedule(
        about["schedule"], about["pp"], about["micro_batches"], about["virtual_stages"], about["extra_warmup"]
    )
    return simulate(schedule, mean_cost(ranks)).bubble


def mean_cost(ranks: Sequence[Rank]) -> StageCost:
    """Return the mean over stages of their median times; a whole backward counts half for inputs, half for weights."""
    times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rank in ranks:
        for event in _of(rank, *COMPUTE):
            times[event["what"]][event["stage"]].append(event["end"] - event["begin"])
    medians = {what: [statistics.median(t) for t in stages.values()] for what, stages in times.items()}
    forward = statistics.mean(medians["F"])
    if "W" in medians:
        return StageCost(forward, statistics.mean(medians["B"]), statistics.mean(medians["W"]))
    half = statistics.mean(medians["BW"]) / 2
    return StageCost(forward, half, half)


def table(found: dict[str, StepTime]) -> str:
    """Return the analyses of named steps for people."""
    width = max(map(len, found))
    lines = [
        f"{'':{width}} {'step ms':>8} {'compute':>8} {'bubble':>7} {'exposed p2p':>12} {'exposed dp':>11} "
        f"{'optimizer':>10} {'p2p hidden':>11} {'dp hidden':>10}"
    ]
    for name, step in found.items():
        p2p = f"{max(0.0, 1 - step.exposed_p2p_of_total):11.0%}" if step.p2p_ms else f"{'-':>11}"
        dp = f"{max(0.0, 1 - step.exposed_dp_of_total):10.0%}" if step.dp_ms else f"{'-':>10}"
        lines.append(
            f"{name:{width}} {step.step_ms:8.1f} {step.compute:8.1%} {step.bubble:7.1%} {step.exposed_p2p:12.1%} "
            f"{step.exposed_dp:11.1%} {step.optimizer:10.1%} {p2p} {dp}"
        )
    return "\n".join(lines)


_COLOURS = {
    "F": "#4e79a7",
    "BW": "#59a14f",
    "B": "#59a14f",
    "W": "#edc948",
    "recompute": "#b07aa1",
    "optimizer": "#9c755f",
    "wait activation": "#f4c7c3",
    "wait grad": "#f4c7c3",
    "wait reduction": "#e15759",
    "wait weights": "#e15759",
    "send activation": "#e15759",
    "send grad": "#e15759",
}


def picture(ranks: Sequence[Rank], title: str) -> str:
    """Return the step as an SVG: a row for each rank, a box for each thing it did, and below it what was under way."""
    begin = min(_step(rank)["begin"] for rank in ranks)
    length = max(_step(rank)["end"] for rank in ranks) - begin
    width, row, left = 1200.0, 34, 70
    scale = (width - left - 10) / length
    height = 60 + row * len(ranks) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="20" font-size="14">{title}: '
        f"{length / 1e3:.0f} ms</text>",
    ]
    for n, rank in enumerate(ranks):
        top = 34 + n * row
        parts.append(f'<text x="10" y="{top + 18}">rank {rank["rank"]}</text>')
        for event in _of(rank, *_COLOURS, *COLLECTIVES):
            x, w = left + (event["begin"] - begin) * scale, (event["end"] - event["begin"]) * scale
            label = f"{event['what']} {event['micro_batch']}, {(event['end'] - event['begin']) / 1e3:.1f} ms"
            if event["what"] in COLLECTIVES:
                box, colour = f'y="{top + 24}" height="4"', "#76b7b2"
            else:
                box, colour = f'y="{top}" height="22"', _COLOURS[event["what"]]
            parts.append(
                f'<rect x="{x:.1f}" {box} width="{max(w, 0.3):.1f}" fill="{colour}"><title>{label}</title></rect>'
            )
            if event["what"] in COMPUTE and w > 14:
                parts.append(f'<text x="{x + 2:.1f}" y="{top + 15}" fill="white">{event["micro_batch"]}</text>')
    x = float(left)
    legend = {**{k: v for k, v in _COLOURS.items() if not k.startswith("send")}, "reduce, gather under way": "#76b7b2"}
    for what, colour in legend.items():
        parts.append(f'<rect x="{x:.0f}" y="{height - 22}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16:.0f}" y="{height - 12}">{what}</text>')
        x += 26 + 6.5 * len(what)
    return "\n".join([*parts, "</svg>"])


def _step(rank: Rank) -> dict[str, Any]:
    return next(event for event in rank["events"] if event["what"] == "step")


def _of(rank: Rank, *what: str) -> list[dict[str, Any]]:
    """Return the events of some kinds that began within the step."""
    end = _step(rank)["end"]
    return [event for event in rank["events"] if event["what"] in what and event["begin"] < end]


def _durations(rank: Rank, *what: str) -> float:
    return sum(event["end"] - event["begin"] for event in _of(rank, *what))


def _key(rank: Rank, event: dict[str, Any]) -> tuple[Any, ...]:
    return rank["dp_rank"], rank["tp_rank"], event["what"].split()[1], event["stage"], event["micro_batch"]


def _union(events: Iterable[dict[str, Any]]) -> float:
    """Return the time in which at least one of `events` lasts."""
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["begin"]):
        total += max(0.0, event["end"] - max(event["begin"], reached))
        reached = max(reached, event["end"])
    return total
