"""Inserts the messages into a rank's list of computations: receives are posted early, sends follow computations."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
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
    receivers: dict[tuple[str, int, int], deque[int]] = defaultdict(deque)  # positions by channel
    for n, step in enumerate(computations):
        message = awaited(step, rank, placement)
        if message:
            receivers[message.channel].append(n)
    todo = [
        _post(computations[queue.popleft()]) for queue in receivers.values() for _ in range(min(buffers, len(queue)))
    ]
    for step in computations:
        message = awaited(step, rank, placement)
        if message and receivers[message.channel]:
            todo.append(_post(computations[receivers[message.channel].popleft()]))
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
