"""The forwards with which a step begins, which may run before the global gradient norm of the step before is known.

If that norm clips or is not finite, the ranks discard these forwards and their messages, and compute them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from llama_ds.schedules.communication import Message, awaited, message_of
from llama_ds.schedules.instructions import COMPUTES, Instruction, Op, Placement
from llama_ds.schedules.schedule import Schedule
from llama_ds.schedules.simulate import StageCost, simulate_orders

Lists = Sequence[Sequence[Instruction]]  # one list per rank
Channel = tuple[str, int, int]


@dataclass(frozen=True)
class Leading:
    """A rank's leading forwards, and the messages that empty their channels when they are discarded."""

    count: int  # leading instructions of the rank
    unsent: tuple[Instruction, ...]  # sends after them, whose receives the other rank has posted
    unposted: tuple[Instruction, ...]  # posts after them, whose messages the other rank has sent


def leading_forwards(lists: Lists, placement: Placement) -> list[Leading]:
    """Return the leading forwards of every rank: those before its first backward and before the loss.

    Each depends on nothing but leading forwards.
    """
    counts = [_before_backward(rank, steps, placement) for rank, steps in enumerate(lists)]
    shrinks = True
    while shrinks:
        sent = _messages(lists, counts, placement, Op.SEND_ACTIVATION)
        shrinks = False
        for rank, steps in enumerate(lists):
            for n, step in enumerate(steps[: counts[rank]]):
                wanted = awaited(step, rank, placement) if step.op in COMPUTES else None
                if wanted and wanted not in sent:
                    counts[rank], shrinks = n, True
                    break
    sent = _messages(lists, counts, placement, Op.SEND_ACTIVATION)
    posted = _messages(lists, counts, placement, Op.POST_ACTIVATION)
    missing = Counter(m.channel for m in posted - sent), Counter(m.channel for m in sent - posted)
    return [
        Leading(
            counts[rank],
            _next(steps[counts[rank] :], rank, placement, Op.SEND_ACTIVATION, missing[0]),
            _next(steps[counts[rank] :], rank, placement, Op.POST_ACTIVATION, missing[1]),
        )
        for rank, steps in enumerate(lists)
    ]


def time_between_steps(
    schedule: Schedule, costs: StageCost | Sequence[StageCost], transfer: float = 0.0, latency: float = 0.0
) -> float:
    """Return the simulated time from step to step where leading forwards run before the norm of the step before.

    The norm is known a latency after the last rank has ended its step. Without leading forwards this is the length of
    the schedule.
    """
    placement, ranks = schedule.placement, range(schedule.ranks)
    lists = [schedule.computations(rank) for rank in ranks]
    leading = leading_forwards([schedule.instructions(rank) for rank in ranks], placement)
    counts = [sum(step.op in COMPUTES for step in schedule.instructions(rank)[: leading[rank].count]) for rank in ranks]
    timeline = simulate_orders(lists, placement, costs, transfer, latency)
    lengths = [timeline.length]
    for _ in range(3):  # all steps from the second on are alike
        ends = [steps[-1][2] for steps in timeline.ranks]
        gates = [(count, max(ends) + latency) for count in counts]
        timeline = simulate_orders(lists, placement, costs, transfer, latency, ends, gates)
        lengths.append(timeline.length)
    return lengths[-1] - lengths[-2]


def _before_backward(rank: int, steps: Sequence[Instruction], placement: Placement) -> int:
    for n, step in enumerate(steps):
        loss = step.op is Op.FORWARD and placement.stage(rank, step.chunk) == placement.stages - 1
        if loss or (step.op in COMPUTES and step.op is not Op.FORWARD):
            return n
    return len(steps)


def _messages(lists: Lists, counts: Sequence[int], placement: Placement, op: Op) -> set[Message]:
    return {
        message_of(step, rank, placement)
        for rank, steps in enumerate(lists)
        for step in steps[: counts[rank]]
        if step.op is op
    }


def _next(
    steps: Sequence[Instruction], rank: int, placement: Placement, op: Op, missing: Counter[Channel]
) -> tuple[Instruction, ...]:
    """Return the next posts or sends of the rank on its channels, as many as are missing there."""
    own, found = Counter(missing), []
    for step in steps:
        if step.op is op and own[channel := message_of(step, rank, placement).channel] > 0:
            own[channel] -= 1
            found.append(step)
    return tuple(found)
