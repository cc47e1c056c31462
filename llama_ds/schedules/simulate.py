"""Simulates a schedule: when each computation starts and ends, and how long ranks wait.

All times are in the same, arbitrary unit. A message occupies its link (one for each direction of a pair of ranks) for
its transfer time and arrives a latency later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_ds.schedules.communication import Message, awaited, produced
from llama_ds.schedules.instructions import Instruction, Op, Placement

if TYPE_CHECKING:  # schedules that are ordered by their times are simulated themselves
    from llama_ds.schedules.schedule import Schedule


@dataclass(frozen=True)
class StageCost:
    """Times of one stage for one micro-batch."""

    forward: float
    input_backward: float
    weight_backward: float

    def of(self, op: Op) -> float:
        """Return the time of a computation."""
        times = {
            Op.FORWARD: self.forward,
            Op.INPUT_BACKWARD: self.input_backward,
            Op.WEIGHT_BACKWARD: self.weight_backward,
            Op.BACKWARD: self.input_backward + self.weight_backward,
        }
        return times[op]


@dataclass(frozen=True)
class Timeline:
    """Simulated computations of each rank: (instruction, start, end)."""

    ranks: list[list[tuple[Instruction, float, float]]]

    @property
    def length(self) -> float:
        """Time from the first start to the last end."""
        return max(end for rank in self.ranks for _, _, end in rank)

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time."""
        busy = sum(end - start for rank in self.ranks for _, start, end in rank)
        return 1 - busy / (self.length * len(self.ranks))


def simulate(
    schedule: Schedule, costs: StageCost | Sequence[StageCost], transfer: float = 0.0, latency: float = 0.0
) -> Timeline:
    """Return the timeline of one step with asynchronous messages; `costs` has one entry per stage, or one for all."""
    lists = [schedule.computations(rank) for rank in range(schedule.ranks)]
    return simulate_orders(lists, schedule.placement, costs, transfer, latency)


def simulate_orders(
    lists: Sequence[Sequence[Instruction]],
    placement: Placement,
    costs: StageCost | Sequence[StageCost],
    transfer: float = 0.0,
    latency: float = 0.0,
    free_from: Sequence[float] | None = None,
    gates: Sequence[tuple[int, float]] | None = None,
) -> Timeline:
    """Return the timeline of the computations `lists` of all ranks.

    Args:
        free_from: when each rank can begin; None: at 0.
        gates: for each rank, the number of its first computation that a time holds back, and this time.
    """
    at, clock = [0] * len(lists), list(free_from or [0.0] * len(lists))
    arrivals: dict[Message, float] = {}
    link_free: dict[tuple[int, int], float] = defaultdict(float)
    done: list[list[tuple[Instruction, float, float]]] = [[] for _ in lists]
    ready = list(range(len(lists)))
    waiting: dict[Message, int] = {}
    while ready:
        rank = ready.pop()
        while at[rank] < len(lists[rank]):
            step = lists[rank][at[rank]]
            wanted = awaited(step, rank, placement)
            if wanted and wanted not in arrivals:
                waiting[wanted] = rank
                break
            start = max(clock[rank], arrivals.pop(wanted)) if wanted else clock[rank]
            if gates and at[rank] == gates[rank][0]:
                start = max(start, gates[rank][1])
            cost = costs if isinstance(costs, StageCost) else costs[placement.stage(rank, step.chunk)]
            clock[rank] = end = start + cost.of(step.op)
            done[rank].append((step, start, end))
            at[rank] += 1
            message = produced(step, rank, placement)
            if message:
                link = message.source, message.target
                link_free[link] = max(link_free[link], end) + transfer
                arrivals[message] = link_free[link] + latency
                if message in waiting:
                    ready.append(waiting.pop(message))
    assert all(n == len(steps) for n, steps in zip(at, lists, strict=True)), "a schedule that verify() refuses"
    return Timeline(done)
