"""The schedules by name: what each demands of a layout, and its instructions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from llama_ds.schedules import dualpipe_v, interleaved, one_f_one_b, zero_bubble_h1
from llama_ds.schedules.communication import with_messages
from llama_ds.schedules.instructions import BACKWARDS, Instruction, Op, Placement

Order = Callable[[int, int, int, int, int], list[Instruction]]
InFlight = Callable[[int, int, int, int, int], int]

_KNOWN: dict[str, tuple[Order, InFlight]] = {
    "1f1b": (one_f_one_b.order, one_f_one_b.in_flight),
    "interleaved": (interleaved.order, interleaved.in_flight),
    "zb_h1": (zero_bubble_h1.order, zero_bubble_h1.in_flight),
    "dualpipe_v": (dualpipe_v.order, dualpipe_v.in_flight),
}
NAMES = tuple(_KNOWN)


def obstacle(name: str, ranks: int, micro_batches: int, chunks: int, extra_warmup: int = 0) -> str | None:
    """Return why the schedule cannot be had with these numbers, and what would do; None when it can."""
    if name == "interleaved" and chunks < 2:
        return f"virtual_stages = {chunks} is one stage on each rank; use 2 or more, or schedule 1f1b"
    if name == "interleaved" and micro_batches % ranks:
        near = sorted({max(ranks, micro_batches // ranks * ranks), -(-micro_batches // ranks) * ranks})
        return f"{micro_batches} micro-batches are no multiple of pp = {ranks}; use {' or '.join(map(str, near))}"
    if name == "dualpipe_v" and chunks != 2:
        return f"virtual_stages = {chunks}: a V has two stages on each rank; use 2"
    if name == "dualpipe_v" and micro_batches < 2 * ranks:
        return f"{micro_batches} micro-batches are fewer than 2 * pp = {2 * ranks}; use {2 * ranks} or more"
    if extra_warmup and name not in ("1f1b", "zb_h1"):
        return f"extra_warmup = {extra_warmup} is for schedule 1f1b or zb_h1; use 0"
    if name in ("1f1b", "zb_h1") and chunks != 1:
        return f"virtual_stages = {chunks} is for schedule interleaved or dualpipe_v; use 1"
    return None


class Held(NamedTuple):
    """How many micro-batches of a chunk are between two of their computations at one time."""

    to_backward: int  # between forward and backward: their activations are held
    to_weights: int  # between input backward and weight backward: what the weights' gradients are made of is held


@dataclass(frozen=True)
class Schedule:
    """All ranks' instructions of one optimizer step."""

    name: str
    ranks: int
    micro_batches: int
    chunks: int = 1
    extra_warmup: int = 0  # forwards beyond the usual that a rank starts with, for each rank behind it
    place: Placement = field(init=False)

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that the schedule cannot be had with."""
        reason = obstacle(self.name, self.ranks, self.micro_batches, self.chunks, self.extra_warmup)
        if reason:
            raise ValueError(f"schedule {self.name}: {reason}")
        object.__setattr__(self, "place", placement(self.name, self.ranks, self.chunks))

    def computations(self, rank: int) -> list[Instruction]:
        """Return what `rank` computes, in order."""
        return _KNOWN[self.name][0](rank, self.ranks, self.micro_batches, self.chunks, self.extra_warmup)

    def instructions(self, rank: int) -> list[Instruction]:
        """Return what `rank` does, messages included, in order."""
        return with_messages(self.computations(rank), rank, self.place, 1 + self.extra_warmup)

    def in_flight(self, rank: int) -> int:
        """Return the most forwards of one chunk whose activations `rank` holds at a time, as the schedule states it."""
        return _KNOWN[self.name][1](rank, self.ranks, self.micro_batches, self.chunks, self.extra_warmup)

    @cached_property
    def held(self) -> list[list[list[Held]]]:
        """held[rank][chunk]: what the rank holds of that chunk at the times when it is most."""
        return [[_most(self.computations(r), c) for c in range(self.chunks)] for r in range(self.ranks)]


def placement(name: str, ranks: int, chunks: int) -> Placement:
    """Return where the schedule puts the stages."""
    return Placement(ranks, chunks, "v" if name == "dualpipe_v" else "loop")


def last_use(computations: list[Instruction]) -> list[Instruction]:
    """Return the computations after which an activation is not needed any more: the weights' gradients."""
    split = {step[1:] for step in computations if step.op is Op.WEIGHT_BACKWARD}
    return [
        step
        for step in computations
        if step.op is Op.WEIGHT_BACKWARD or (step.op in BACKWARDS and step[1:] not in split)
    ]


def _most(computations: list[Instruction], chunk: int) -> list[Held]:
    """Return what is held at the times at which no other time has as much of both."""
    forwards = inputs = weights = 0
    seen = set()
    for step in computations:
        if step.chunk == chunk:
            forwards += step.op is Op.FORWARD
            inputs += step.op in BACKWARDS
            weights += step.op in (Op.BACKWARD, Op.WEIGHT_BACKWARD)
            seen.add(Held(forwards - inputs, inputs - weights))
    return sorted(a for a in seen if not any(a != b and a[0] <= b[0] and a[1] <= b[1] for b in seen))
