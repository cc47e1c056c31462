"""Inserts the messages into a rank's list of computations: receives are posted early, sends follow computations."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llama_ds.schedules.instructions import BACKWARDS, Instruction, Op, Placement


class Message(NamedTuple):
    """An activation or a gradient sent between two ranks. The messages of one channel arrive in order."""

    kind: str  # activation | grad
    source: int  # sending rank
    target: int  # receiving rank
    into: int  # receiving stage
    micro_batch: int

    @property
    def channel(self) -> tuple[str, int, int]:
        """Key of the channel, which keeps messages in order."""
        return self.kind, self.source, self.target


def awaited(step: Instruction, rank: int, placement: Placement) -> Message | None:
    """Return the message that a computation waits for, None if its input is on this rank."""
    stage = placement.stage(rank, step.chunk)
    if step.op is Op.FORWARD and stage > 0:
        return _message("activation", stage - 1, stage, step.micro_batch, placement)
    if step.op in BACKWARDS and stage < placement.stages - 1:
        return _message("grad", stage + 1, stage, step.micro_batch, placement)
    return None


def produced(step: Instruction, rank: int, placement: Placement) -> Message | None:
    """Return the message that a computation produces, None if its output stays on this rank."""
    stage = placement.stage(rank, step.chunk)
    if step.op is Op.FORWARD and stage < placement.stages - 1:
        return _message("activation", stage, stage + 1, step.micro_batch, placement)
    if step.op in BACKWARDS and stage > 0:
        return _message("grad", stage, stage - 1, step.micro_batch, placement)
    return None


def message_of(step: Instruction, rank: int, placement: Placement) -> Message:
    """Return the message of a post or a send."""
    forward = step.op in (Op.POST_ACTIVATION, Op.SEND_ACTIVATION)
    compute = step._replace(op=Op.FORWARD if forward else Op.BACKWARD)
    posts = step.op in (Op.POST_ACTIVATION, Op.POST_GRAD)
    found = awaited(compute, rank, placement) if posts else produced(compute, rank, placement)
    assert found is not None
    return found


def with_messages(
    computations: Sequence[Instruction], rank: int, placement: Placement, buffers: int = 1
) -> list[Instruction]:
    """Return the computations with posts and sends inserted.

    While a computation runs, the next `buffers` receives of every channel are posted: no message waits for its
    receiver to become ready, and ranks that all send at once do not deadlock.
    """
    posts: dict[int, list[int]] = defaultdict(list)
    for receivers in _receivers(computations, rank, placement).values():
        for n, at in enumerate(receivers):
            posts[receivers[n - buffers] if n >= buffers else 0].append(at)
    return _inserted(computations, rank, placement, posts)


def with_timed_messages(
    computations: Sequence[Instruction],
    rank: int,
    placement: Placement,
    ends: Sequence[float],
    sent: Mapping[Message, float],
) -> list[Instruction]:
    """Return the computations with posts and sends inserted, each post before its message is sent.

    A simulation in which every send waits for its post then takes no longer, and therefore cannot deadlock. Posts are
    also one computation ahead.

    Args:
        ends: simulated end of each computation.
        sent: simulated time at which each message of the schedule is sent.
    """
    posts: dict[int, list[int]] = defaultdict(list)
    for receivers in _receivers(computations, rank, placement).values():
        for at in receivers:
            message = awaited(computations[at], rank, placement)
            assert message is not None
            posts[max(0, min(at - 1, bisect_left(ends, sent[message])))].append(at)
    return _inserted(computations, rank, placement, posts)


def _receivers(
    computations: Sequence[Instruction], rank: int, placement: Placement
) -> dict[tuple[str, int, int], list[int]]:
    """Return the positions of the computations that await a message, by channel."""
    found: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for n, step in enumerate(computations):
        message = awaited(step, rank, placement)
        if message:
            found[message.channel].append(n)
    return found


def _inserted(
    computations: Sequence[Instruction], rank: int, placement: Placement, posts: Mapping[int, Sequence[int]]
) -> list[Instruction]:
    """Return the computations with sends, and with the posts of some computations before others, by position."""
    todo = []
    for n, step in enumerate(computations):
        todo += [_post(computations[at]) for at in posts.get(n, ())]
        todo.append(step)
        if produced(step, rank, placement):
            op = Op.SEND_ACTIVATION if step.op is Op.FORWARD else Op.SEND_GRAD
            todo.append(step._replace(op=op))
    return todo


def _post(step: Instruction) -> Instruction:
    return step._replace(op=Op.POST_ACTIVATION if step.op is Op.FORWARD else Op.POST_GRAD)


def _message(kind: str, source: int, into: int, micro_batch: int, placement: Placement) -> Message | None:
    sender, receiver = placement.home(source)[0], placement.home(into)[0]
    return None if sender == receiver else Message(kind, sender, receiver, into, micro_batch)
