"""Verifies a schedule: each computation occurs once and in order, messages match, no deadlock, memory as stated."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from llama_ds.schedules.communication import awaited, message_of
from llama_ds.schedules.instructions import BACKWARDS, COMPUTES, POSTS, SENDS, Instruction, Op, Placement
from llama_ds.schedules.schedule import Schedule, last_use

Lists = Sequence[Sequence[Instruction]]  # one list per rank


class ScheduleError(Exception):
    """The schedule would not compute the step, or would deadlock."""


def verify(schedule: Schedule) -> None:
    """Raise ScheduleError if the schedule is wrong; each check passes over all instructions once."""
    lists = [schedule.instructions(rank) for rank in range(schedule.ranks)]
    placement = schedule.placement
    for rank, steps in enumerate(lists):
        check_computations(rank, steps, schedule.micro_batches, schedule.chunks)
        check_memory(rank, steps, schedule.in_flight(rank))
    check_messages(lists, placement)
    for capacity in (0, 1, None):
        check_progress(lists, placement, capacity)


def check_computations(rank: int, steps: Sequence[Instruction], micro_batches: int, chunks: int) -> None:
    """Check that every chunk runs each micro-batch's forward, backward and weight gradients once and in order."""
    for chunk in range(chunks):
        mine = [step for step in steps if step.chunk == chunk and step.op in COMPUTES]
        found = {
            "forwards": [s.micro_batch for s in mine if s.op is Op.FORWARD],
            "backwards": [s.micro_batch for s in mine if s.op in BACKWARDS],
            "weights' gradients": [s.micro_batch for s in last_use(mine)],
        }
        for what, order in found.items():
            if sorted(order) != list(range(micro_batches)):
                wrong = [i for i, n in Counter(order).items() if n > 1 or i >= micro_batches]
                missing = sorted(set(range(micro_batches)) - set(order))
                raise ScheduleError(f"rank {rank} chunk {chunk}: {what} repeated {wrong}, missing {missing}")
            if order != sorted(order):
                raise ScheduleError(f"rank {rank} chunk {chunk}: {what} out of order: {order}")
        rank_of = {Op.FORWARD: 0, Op.BACKWARD: 1, Op.INPUT_BACKWARD: 1, Op.WEIGHT_BACKWARD: 2}
        stage_of = [0] * micro_batches
        for step in mine:
            if rank_of[step.op] != stage_of[step.micro_batch]:
                raise ScheduleError(f"rank {rank}: {step} before what it builds on")
            stage_of[step.micro_batch] += 1


def check_messages(lists: Lists, placement: Placement) -> None:
    """Check that each channel's sends and receives match in order, and stand after and before their computations."""
    sent, posted = defaultdict(list), defaultdict(list)
    for rank, steps in enumerate(lists):
        ready: set[tuple] = set()
        computed: set[Instruction] = set()
        for step in steps:
            if step.op in POSTS:
                message = message_of(step, rank, placement)
                posted[message.channel].append(message)
                ready.add(message)
            elif step.op in SENDS:
                sent[message_of(step, rank, placement).channel].append(message_of(step, rank, placement))
                forward = step.op is Op.SEND_ACTIVATION
                if not any(step._replace(op=op) in computed for op in ((Op.FORWARD,) if forward else BACKWARDS)):
                    raise ScheduleError(f"rank {rank}: {step} before it is computed")
            else:
                wanted = awaited(step, rank, placement)
                if wanted and wanted not in ready:
                    raise ScheduleError(f"rank {rank}: {step} waits for a message whose receive is not posted")
                computed.add(step)
    if sent != posted:
        channel = next(c for c in {**sent, **posted} if sent[c] != posted[c])
        raise ScheduleError(f"channel {channel}: sends and receives differ")


def check_progress(lists: Lists, placement: Placement, capacity: int | None) -> None:
    """Check that no rank deadlocks if a send returns once its receive is posted or `capacity` messages are buffered.

    None: sends return at once. 0: every send waits for its receive.
    """
    at = [0] * len(lists)
    sent: Counter = Counter()
    posted: Counter = Counter()
    arrived: set[tuple] = set()
    computed: set[tuple[int, int, bool]] = set()  # (stage, micro-batch, forward)
    waiting = deque(range(len(lists)))
    queued = set(waiting)
    started: list[bool] = [False] * len(lists)  # whether a rank has issued the send at its position

    def wake(rank: int) -> None:
        if rank not in queued:
            queued.add(rank)
            waiting.append(rank)

    def advance(rank: int, step: Instruction) -> bool:
        if step.op in POSTS:
            message = message_of(step, rank, placement)
            posted[message.channel] += 1
            wake(message.source)
            return True
        if step.op in SENDS:
            message = message_of(step, rank, placement)
            if not started[rank]:
                sent[message.channel] += 1
                arrived.add(message)
                started[rank] = True
                wake(message.target)
            if capacity is not None and sent[message.channel] > posted[message.channel] + capacity:
                return False
            started[rank] = False
            return True
        wanted = awaited(step, rank, placement)
        if wanted and wanted not in arrived:
            return False
        stage, forward = placement.stage(rank, step.chunk), step.op is Op.FORWARD
        if step.op is not Op.WEIGHT_BACKWARD:
            before = stage - 1 if forward else stage + 1
            if (
                wanted is None
                and 0 <= before < placement.stages
                and (before, step.micro_batch, forward) not in computed
            ):
                return False  # computed later by this rank itself
            computed.add((stage, step.micro_batch, forward))
        return True

    while waiting:
        rank = waiting.popleft()
        queued.discard(rank)
        while at[rank] < len(lists[rank]) and advance(rank, lists[rank][at[rank]]):
            at[rank] += 1
    stuck = {rank: lists[rank][n] for rank, n in enumerate(at) if n < len(lists[rank])}
    if stuck:
        raise ScheduleError(f"no rank can proceed with send buffers of {capacity}: {stuck}")


def check_memory(rank: int, steps: Sequence[Instruction], stated: int) -> None:
    """Check that the maximum number of forwards whose activations the rank holds is the stated number."""
    computations = [step for step in steps if step.op in COMPUTES]
    ends = set(last_use(computations))
    now = maximum = 0
    for step in computations:
        now += (step.op is Op.FORWARD) - (step in ends)
        maximum = max(maximum, now)
    if maximum != stated:
        raise ScheduleError(f"rank {rank} holds {maximum} micro-batches' activations, not {stated}")
