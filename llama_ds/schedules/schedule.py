"""The schedules by name: their requirements on a layout, and their instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from llama_ds.errors import listed
from llama_ds.schedules import dualpipe_v, interleaved, one_f_one_b, zero_bubble_h1
from llama_ds.schedules.communication import with_messages
from llama_ds.schedules.instructions import BACKWARDS, Instruction, Op, Placement
from llama_ds.schedules.joint_weights import ending_by_chunk, joint_share, together
from llama_ds.schedules.pass_times import EQUAL_PASSES, PassTimes, numbers_obstacle
from llama_ds.schedules.v_orders import most_held
from llama_ds.schedules.zero_bubble_v import V_SCHEDULES, ZeroBubbleV

Order = Callable[[int, int, int, int, int], list[Instruction]]
InFlight = Callable[[int, int, int, int, int], int]

_KNOWN: dict[str, tuple[Order, InFlight]] = {
    "1f1b": (one_f_one_b.order, one_f_one_b.in_flight),
    "interleaved": (interleaved.order, interleaved.in_flight),
    "zb_h1": (zero_bubble_h1.order, zero_bubble_h1.in_flight),
    "dualpipe_v": (dualpipe_v.order, dualpipe_v.in_flight),
}
NAMES = (*_KNOWN, *V_SCHEDULES)
IN_A_V = ("dualpipe_v", *V_SCHEDULES)  # with two stages on each rank
_WITH_WARMUP = ("1f1b", "zb_h1", *V_SCHEDULES)
DEFERRING = ("zb_h1", *IN_A_V)  # with weight gradients that are computed later than those of inputs


def defers(name: str, joint: int) -> bool:
    """Return whether weight gradients are computed later than those of inputs, `joint` micro-batches' at a time."""
    return name in DEFERRING or joint > 1


def obstacle(
    name: str,
    ranks: int,
    micro_batches: int,
    chunks: int,
    extra_warmup: int = 0,
    pass_times: Sequence[int] | None = None,
) -> str | None:
    """Return why the schedule does not work with these numbers, and which would work; None if it does."""
    if name == "interleaved" and chunks < 2:
        return f"virtual_stages = {chunks} is one stage on each rank; use 2 or more, or schedule 1f1b"
    if name == "interleaved" and micro_batches % ranks:
        near = sorted({max(ranks, micro_batches // ranks * ranks), -(-micro_batches // ranks) * ranks})
        return f"{micro_batches} micro-batches are not a multiple of pp = {ranks}; use {' or '.join(map(str, near))}"
    if name in IN_A_V and chunks != 2:
        return f"virtual_stages = {chunks}: a V has two stages on each rank; use 2"
    if name == "dualpipe_v" and micro_batches < 2 * ranks:
        return f"{micro_batches} micro-batches are fewer than 2 * pp = {2 * ranks}; use {2 * ranks} or more"
    if extra_warmup and name in ("interleaved", "dualpipe_v"):
        return f"extra_warmup = {extra_warmup} is for schedule {listed(_WITH_WARMUP)}; use 0"
    if name in ("1f1b", "zb_h1") and chunks != 1:
        return f"virtual_stages = {chunks} is for schedule interleaved, {listed(IN_A_V)}; use 1"
    if pass_times is None:
        return None
    if name not in V_SCHEDULES:
        return f"pass_times orders the passes of schedule {listed(V_SCHEDULES)}; leave it out"
    reason = numbers_obstacle(pass_times, ranks * chunks)
    return f"pass_times: {reason}" if reason else None


class Held(NamedTuple):
    """Numbers of micro-batches of a chunk that are between two of their computations at one time."""

    to_backward: int  # between forward and backward, with all activations held
    to_weights: int  # between input and weight backward, with the inputs of the weight gradients held


@dataclass(frozen=True)
class Schedule:
    """All ranks' instructions of one optimizer step."""

    name: str
    ranks: int
    micro_batches: int
    chunks: int = 1
    extra_warmup: int = 0  # additional warm-up forwards of a rank for each following rank; of every rank in a V
    pass_times: tuple[int, ...] | None = None  # times that order a V; None: equal
    joint: int = 1  # micro-batches whose deferred weight gradients of a chunk are computed together
    placement: Placement = field(init=False)

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that the schedule does not support."""
        reason = obstacle(self.name, self.ranks, self.micro_batches, self.chunks, self.extra_warmup, self.pass_times)
        if reason:
            raise ValueError(f"schedule {self.name}: {reason}")
        object.__setattr__(self, "placement", placement(self.name, self.ranks, self.chunks))

    def computations(self, rank: int) -> list[Instruction]:
        """Return the computations of `rank` in order."""
        if self.name in V_SCHEDULES:
            return list(self._in_a_v.orders[rank])
        steps = _KNOWN[self.name][0](rank, self.ranks, self.micro_batches, self.chunks, self.extra_warmup)
        return ending_by_chunk(together(steps, self.joint))

    def instructions(self, rank: int) -> list[Instruction]:
        """Return the instructions of `rank` in order, messages included."""
        if self.name in V_SCHEDULES:
            return list(self._in_a_v.instructions(rank))
        return with_messages(self.computations(rank), rank, self.placement, self.receives)

    def in_flight(self, rank: int) -> int:
        """Return the maximum number of forwards of a chunk whose activations `rank` holds, as the schedule states."""
        if self.name in V_SCHEDULES:
            return self._in_a_v.in_flight(rank)
        if self.joint > 1:
            return most_held(self.computations(rank))
        return _KNOWN[self.name][1](rank, self.ranks, self.micro_batches, self.chunks, self.extra_warmup)

    @property
    def receives(self) -> int:
        """Maximum number of receives of one kind and direction that a rank has posted."""
        return self._in_a_v.receives if self.name in V_SCHEDULES else 1 + self.extra_warmup

    @property
    def _in_a_v(self) -> ZeroBubbleV:
        times = PassTimes.of(self.pass_times or EQUAL_PASSES, self.placement.stages)
        return ZeroBubbleV(self.name, self.ranks, self.micro_batches, self.extra_warmup, times, self.joint)

    @cached_property
    def held(self) -> list[list[list[Held]]]:
        """held[rank][chunk]: the maximal combinations of micro-batches that the rank holds of that chunk."""
        return _held(self)


def placement(name: str, ranks: int, chunks: int) -> Placement:
    """Return the placement of the schedule's stages on the ranks."""
    return Placement(ranks, chunks, "v" if name in IN_A_V else "loop")


@lru_cache(maxsize=1000)
def split_share(name: str, ranks: int, micro_batches: int, chunks: int, extra_warmup: int) -> float:
    """Return the share of a schedule's backwards whose weight gradients are computed separately.

    In a zero-bubble V it is 1. Otherwise their number is a linear function of the micro-batches once the pipeline is
    full, so long steps are extrapolated.
    """
    if name in V_SCHEDULES:
        return 1.0

    def count(number: int) -> int:
        plan = Schedule(name, ranks, number, chunks, extra_warmup)
        return sum(step.op is Op.WEIGHT_BACKWARD for rank in range(ranks) for step in plan.computations(rank))

    short, longer = 3 * ranks, 4 * ranks
    if micro_batches <= longer + ranks:
        found = float(count(micro_batches))
    else:
        rest = micro_batches % ranks
        last = count(longer + rest)
        found = last + (last - count(short + rest)) * (micro_batches - longer - rest) / ranks
    return found / (micro_batches * ranks * chunks)


@lru_cache(maxsize=1000)
def joint_shares(schedule: Schedule) -> list[list[float]]:
    """Return by rank and chunk the share of micro-batches whose weight gradients are computed `joint` at a time."""
    return [
        [joint_share(steps, chunk, schedule.joint) for chunk in range(schedule.chunks)]
        for steps in map(schedule.computations, range(schedule.ranks))
    ]


def last_use(computations: list[Instruction]) -> list[Instruction]:
    """Return the computations that read an activation for the last time: those of the weight gradients."""
    split = {step[1:] for step in computations if step.op is Op.WEIGHT_BACKWARD}
    return [
        step
        for step in computations
        if step.op is Op.WEIGHT_BACKWARD or (step.op in BACKWARDS and step[1:] not in split)
    ]


@lru_cache(maxsize=1000)  # a search asks for the same schedule in many layouts
def _held(schedule: Schedule) -> list[list[list[Held]]]:
    computed = [schedule.computations(rank) for rank in range(schedule.ranks)]
    return [[_maximal(steps, chunk) for chunk in range(schedule.chunks)] for steps in computed]


def _maximal(computations: list[Instruction], chunk: int) -> list[Held]:
    """Return the held counts that no other moment exceeds in both numbers."""
    to_backward = to_weights = 0
    seen = set()
    for op, own, _ in computations:
        if own != chunk:
            continue
        if op is Op.FORWARD:
            to_backward += 1
        elif op is Op.WEIGHT_BACKWARD:
            to_weights -= 1
        else:
            to_backward -= 1
            to_weights += op is Op.INPUT_BACKWARD
        seen.add((to_backward, to_weights))
    found: list[Held] = []
    for held in sorted(seen, reverse=True):
        if not found or held[1] > found[-1].to_weights:
            found.append(Held(*held))
    return found[::-1]
