"""Orders the computations of a V by the times of its passes, within a limit of memory.

Two stages on each rank, out through one and back through the other: rank r of p holds stages r and 2 p - 1 - r. Every
backward is split. The whole pipeline is simulated, and a rank that becomes free starts the computation of highest
priority: a forward or an input backward whose input is there, or else the oldest deferred weight gradient. The best
order for given times is an NP-hard problem. Several rules are tried, and the best result wins (the heuristic of
Qi et al., arXiv 2401.10241, section 3.1, also simulates the pipeline pass by pass).

Times are integers and ties have an order, so that every rank of a job computes the same orders.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple
from functools import lru_cache
from typing import NamedTuple

from llama_ds.schedules.instructions import Instruction, Op, Placement
from llama_ds.schedules.joint_weights import together
from llama_ds.schedules.pass_times import PassTimes
from llama_ds.schedules.simulate import simulate_orders

Orders = tuple[tuple[Instruction, ...], ...]  # computations of each rank
Pass = tuple[Op, int]  # kind and chunk

_F0, _F1 = (Op.FORWARD, 0), (Op.FORWARD, 1)
_B0, _B1 = (Op.INPUT_BACKWARD, 0), (Op.INPUT_BACKWARD, 1)
_MAX_SIMULATED = 300_000  # computations of all tried rules; a second has about 150,000


class _Rule(NamedTuple):
    priority: tuple[Pass, ...]  # the first is preferred
    patience: int  # quarters of a pass's time that a rank idles for a pass of higher priority
    spare: int  # quarters of a weight gradient's time that must be free before the next pass can start


# The rules that together came within 0.2 percent of the best of 64, over 40 random pipelines; the first alone within 2.
_RULES = (
    _Rule((_F1, _F0, _B1, _B0), 1, 0),
    _Rule((_F1, _F0, _B1, _B0), 0, 0),
    _Rule((_F1, _B0, _F0, _B1), 4, 0),
    _Rule((_F1, _B1, _B0, _F0), 2, 0),
    _Rule((_F1, _B0, _B1, _F0), 1, 0),
    _Rule((_B0, _B1, _F1, _F0), 1, 2),
    _Rule((_F1, _F0, _B0, _B1), 1, 0),
    _Rule((_F1, _B1, _B0, _F0), 1, 0),
    _Rule((_F1, _B1, _B0, _F0), 0, 0),
    _Rule((_B1, _B0, _F1, _F0), 2, 0),
    _Rule((_F1, _B0, _B1, _F0), 0, 2),
    _Rule((_B1, _F1, _F0, _B0), 0, 0),
)
_EQUAL_PASSES = tuple(
    _Rule(priority, 0, 0)
    for priority in ((_F1, _F0, _B0, _B1), (_F1, _F0, _B1, _B0), (_B1, _F1, _F0, _B0), (_B0, _B1, _F1, _F0))
)


@lru_cache(maxsize=500)
def best_orders(ranks: int, micro_batches: int, limit: int, times: PassTimes, joint: int = 1) -> Orders:
    """Return all ranks' computations in order.

    Args:
        ranks: pipeline ranks.
        micro_batches: of the step.
        limit: 2 or more; how many forwards of a chunk a rank holds until their weight gradients are computed.
        times: those of the 2 * ranks stages and of a message between ranks.
        joint: how many micro-batches' weight gradients of a chunk are computed one after the other, if deferred.
    """
    bound = _lower_bound(ranks, micro_batches, times)
    best: Orders = ()
    shortest = math.inf
    rules = _EQUAL_PASSES if times.equal else _RULES
    for rule in rules[: max(1, _MAX_SIMULATED // (6 * ranks * micro_batches))]:
        simulation = _Simulation(ranks, micro_batches, limit, times, rule, joint)
        time = simulation.run()
        if time < shortest:
            best, shortest = tuple(map(tuple, simulation.orders)), time
        if shortest <= bound:
            return best
    compact = tuple(tuple(together(order, joint)) for order in compact_orders(ranks, micro_batches))
    if max(map(most_held, compact)) <= limit:
        timeline = simulate_orders(compact, Placement(ranks, 2, "v"), times.stages, latency=times.message)
        longest = max(steps[-1][2] - steps[0][1] for steps in timeline.ranks)
        return compact if timeline.length + longest < shortest else best
    return best


def _lower_bound(ranks: int, micro_batches: int, times: PassTimes) -> float:
    """Return a bound of what `_Simulation.run` returns.

    A rank starts after one forward of every stage before it, and then computes without a gap.
    """
    length = longest = start = 0.0
    for rank in range(ranks):
        work = micro_batches * sum(sum(astuple(times.stages[stage])) for stage in (rank, 2 * ranks - 1 - rank))
        length, longest = max(length, start + work), max(longest, work)
        start += times.stages[rank].forward + times.message
    return length + longest


class _Rank:
    """What a rank has computed so far."""

    def __init__(self, index: int, ranks: int, limit: int, times: PassTimes) -> None:
        self.index = index
        self.stages = (index, 2 * ranks - 1 - index)
        self.times = {
            (op, chunk): times.stages[stage].of(op)
            for chunk, stage in enumerate(self.stages)
            for op in (Op.FORWARD, Op.INPUT_BACKWARD, Op.WEIGHT_BACKWARD)
        }
        self.clock = 0.0
        self.begin = math.inf
        self.next: dict[Pass, int] = {_F0: 0, _F1: 0, _B0: 0, _B1: 0}  # next micro-batch
        self.deferred: deque[tuple[int, int]] = deque()  # chunk and micro-batch
        self.held = 0  # forwards whose weight gradients are not computed
        self._limit = limit
        # Shares of the limit by the time that a micro-batch of each chunk is in flight: a chunk's forward to backward
        # takes longer the earlier its stage is.
        first = -(-limit * (2 * ranks - index) // (2 * ranks))
        second = -(-limit * index // (2 * ranks)) + 1
        self._shares = {_F0: (first, _B0), _F1: (second, _B1)}

    def next_weights(self, joint: int) -> list[tuple[int, int]]:
        """Return the deferred weight gradients to compute: `joint` of a chunk if there are so many, else the oldest."""
        for chunk in (self.deferred[0][0], 1 - self.deferred[0][0]):
            group = [pair for pair in self.deferred if pair[0] == chunk][:joint]
            if len(group) == joint:
                return group
        return [self.deferred[0]]

    def has_room(self, forward: Pass) -> bool:
        """Return whether memory allows the forward; chunk 0 leaves room for chunk 1 of micro-batches under way."""
        share, backward = self._shares[forward]
        reserved = forward == _F0 and self.next[_F1] < self.next[_F0]
        return self.held + reserved < self._limit and self.next[forward] - self.next[backward] < share


class _Simulation:
    """One simulated step under one rule."""

    def __init__(self, ranks: int, micro_batches: int, limit: int, times: PassTimes, rule: _Rule, joint: int) -> None:
        self.orders: list[list[Instruction]] = [[] for _ in range(ranks)]
        self._ranks = [_Rank(rank, ranks, limit, times) for rank in range(ranks)]
        self._micro_batches, self._message, self._rule = micro_batches, times.message, rule
        self._joint = joint
        self._last = 2 * ranks - 1
        self._arrivals = {(Op.FORWARD, 0, i): 0.0 for i in range(micro_batches)}  # inputs by op, stage and micro-batch
        self._wakes = [(0.0, rank) for rank in range(ranks)]

    def run(self) -> float:
        """Simulate; return the length of the step plus the longest time that a rank is busy with it.

        The former counts where ranks end a step together, the latter where they begin the next one on their own.
        """
        while self._wakes:
            now, index = heapq.heappop(self._wakes)
            rank = self._ranks[index]
            if now >= rank.clock:
                self._advance(rank, now)
        assert all(len(order) == 6 * self._micro_batches for order in self.orders)
        return max(rank.clock for rank in self._ranks) + max(rank.clock - rank.begin for rank in self._ranks)

    def _advance(self, rank: _Rank, now: float) -> None:
        """Start the next computation of a rank that is free, or let it sleep until an input arrives."""
        chosen: tuple[float, Pass] | None = None  # start and pass
        earliest = math.inf  # start of any pass
        for kind in self._rule.priority:
            arrival = self._arrival(rank, kind)
            if arrival is None:
                continue
            earliest = min(earliest, max(now, arrival))
            if chosen is None and 4 * (arrival - now) <= self._rule.patience * rank.times[kind]:
                chosen = max(now, arrival), kind
        gap = (chosen[0] if chosen else earliest) - now
        if rank.deferred and gap > 0:
            weights = rank.next_weights(self._joint)
            if 4 * gap >= (4 if chosen else self._rule.spare) * rank.times[Op.WEIGHT_BACKWARD, weights[0][0]]:
                for chunk, micro_batch in weights:
                    rank.deferred.remove((chunk, micro_batch))
                    self._start(rank, max(now, rank.clock), Op.WEIGHT_BACKWARD, chunk, micro_batch)
                return
        if chosen:
            start, (op, chunk) = chosen
            self._start(rank, start, op, chunk, rank.next[op, chunk])
        elif earliest < math.inf:
            heapq.heappush(self._wakes, (earliest, rank.index))

    def _arrival(self, rank: _Rank, kind: Pass) -> float | None:
        """Return when the input of the rank's next pass of this kind arrives, None if unknown or without memory."""
        op, chunk = kind
        if op is Op.FORWARD and not rank.has_room(kind):
            return None
        return self._arrivals.get((op, rank.stages[chunk], rank.next[kind]))

    def _start(self, rank: _Rank, start: float, op: Op, chunk: int, micro_batch: int) -> None:
        end = start + rank.times[op, chunk]
        self.orders[rank.index].append(Instruction(op, chunk, micro_batch))
        if op is Op.WEIGHT_BACKWARD:
            rank.held -= 1
        else:
            rank.next[op, chunk] += 1
            if op is Op.FORWARD:
                rank.held += 1
            else:
                rank.deferred.append((chunk, micro_batch))
            self._pass_on(rank, op, rank.stages[chunk], micro_batch, end)
        rank.clock, rank.begin = end, min(rank.begin, start)
        heapq.heappush(self._wakes, (end, rank.index))

    def _pass_on(self, rank: _Rank, op: Op, stage: int, micro_batch: int, end: float) -> None:
        """Note when the computation that takes this one's output receives it."""
        if op is Op.FORWARD and stage == self._last:
            self._arrivals[Op.INPUT_BACKWARD, stage, micro_batch] = end
            return
        to = stage + (1 if op is Op.FORWARD else -1)
        if to < 0:
            return
        home = self._ranks[min(to, self._last - to)]
        arrival = end if home is rank else end + self._message
        self._arrivals[op, to, micro_batch] = arrival
        heapq.heappush(self._wakes, (max(arrival, home.clock), home.index))
        heapq.heappush(self._wakes, (max(end, home.clock), home.index))


def compact_orders(ranks: int, micro_batches: int) -> Orders:
    """Return the orders of V-Min (Qi et al., arXiv 2405.15362, section 3.2): a third of 1F1B's activations.

    Every rank repeats the same six computations, in units of equal times, every six units. Neighbouring stages compute
    a micro-batch one unit apart, so that it is in flight as briefly as possible. The offsets are the smallest with
    which no two computations of a rank coincide.
    """
    forward_1 = 2 * ranks - 1
    backward_1 = forward_1 + 1 + 2 * ((forward_1 + 1) % 6 == 0)
    backward_0 = backward_1 + 2 * ranks - 1
    while (backward_0 - forward_1) % 6 == 0:
        backward_0 += 2
    orders = []
    for rank in range(ranks):
        starts = {_F0: rank, _F1: forward_1 - rank, _B1: backward_1 + rank, _B0: backward_0 - rank}
        taken = {start % 6 for start in starts.values()}
        for after in (_B1, _B0):
            start = next(t for t in range(starts[after] + 1, starts[after] + 7) if t % 6 not in taken)
            starts[Op.WEIGHT_BACKWARD, after[1]] = start
            taken.add(start % 6)
        timed = [(start + 6 * i, Instruction(*kind, i)) for kind, start in starts.items() for i in range(micro_batches)]
        orders.append(tuple(step for _, step in sorted(timed, key=lambda pair: pair[0])))
    return tuple(orders)


def most_held(order: Sequence[Instruction]) -> int:
    """Return the maximum number of forwards whose weight gradients a rank still has to compute."""
    held = most = 0
    for step in order:
        held += (step.op is Op.FORWARD) - (step.op in (Op.BACKWARD, Op.WEIGHT_BACKWARD))
        most = max(most, held)
    return most
