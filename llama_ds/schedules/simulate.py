"""Simulates a schedule: when each computation starts and ends, and how long ranks wait.

All times are in the same, arbitrary unit. A message occupies its link (one for each direction of a pair of ranks) for
its transfer time and arrives a latency later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from llama_ds.schedules.communication import awaited, produced
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
    arrivals: dict[_Output, float] = {}
    link_free: dict[tuple[int, int], float] = defaultdict(float)
    done: list[list[tuple[Instruction, float, float]]] = [[] for _ in lists]
    ready = list(range(len(lists)))
    waiting: dict[_Output, int] = {}
    passes: list[dict[tuple[Op, int], _Pass]] = [{} for _ in lists]
    while ready:
        rank = ready.pop()
        steps, known = lists[rank], passes[rank]
        for number in range(at[rank], len(steps)):
            step = steps[number]
            op, chunk, micro_batch = step
            kind = known.get((op, chunk))
            if kind is None:
                kind = known[op, chunk] = _pass(step, rank, placement, costs)
            start = clock[rank]
            if kind.awaited:
                wanted = (*kind.awaited, micro_batch)
                if wanted not in arrivals:
                    at[rank] = number
                    waiting[wanted] = rank
                    break
                start = max(start, arrivals.pop(wanted))
            if gates and number == gates[rank][0]:
                start = max(start, gates[rank][1])
            clock[rank] = end = start + kind.time
            done[rank].append((step, start, end))
            if kind.produced:
                link_free[kind.link] = sent = max(link_free[kind.link], end) + transfer
                output = (*kind.produced, micro_batch)
                arrivals[output] = sent + latency
                if output in waiting:
                    ready.append(waiting.pop(output))
        else:
            at[rank] = len(steps)
    assert all(n == len(steps) for n, steps in zip(at, lists, strict=True)), "a schedule that verify() refuses"
    return Timeline(done)


_Output = tuple[str, int, int]  # kind of a message, receiving stage, micro-batch


class _Pass(NamedTuple):
    """What the computations of one operation and chunk on a rank have in common."""

    time: float
    awaited: tuple[str, int] | None  # kind and receiving stage of the message that it waits for
    produced: tuple[str, int] | None  # the same of the message that it sends
    link: tuple[int, int]  # ranks between which it is sent


def _pass(step: Instruction, rank: int, placement: Placement, costs: StageCost | Sequence[StageCost]) -> _Pass:
    cost = costs if isinstance(costs, StageCost) else costs[placement.stage(rank, step.chunk)]
    wanted, output = awaited(step, rank, placement), produced(step, rank, placement)
    return _Pass(
        cost.of(step.op),
        (wanted.kind, wanted.into) if wanted else None,
        (output.kind, output.into) if output else None,
        (output.source, output.target) if output else (rank, rank),
    )
