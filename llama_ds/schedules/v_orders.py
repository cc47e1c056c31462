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
from itertools import count
from typing import NamedTuple

from llama_ds.schedules.instructions import Instruction, Op, Placement
from llama_ds.schedules.joint_weights import ending_by_chunk, together
from llama_ds.schedules.pass_times import PassTimes
from llama_ds.schedules.simulate import simulate_orders

Orders = tuple[tuple[Instruction, ...], ...]  # computations of each rank

# A rank's computations of one micro-batch, by number: operation and chunk.
_KINDS = tuple((op, chunk) for op in (Op.FORWARD, Op.INPUT_BACKWARD, Op.WEIGHT_BACKWARD) for chunk in (0, 1))
_F0, _F1, _B0, _B1, _W0, _W1 = range(len(_KINDS))
_MAX_SIMULATED = 300_000  # computations of all tried rules; they take about a second
_PERIODS = 4  # how often the passes of a full pipeline repeat in the step for which a rule is chosen


class _Rule(NamedTuple):
    priority: tuple[int, ...]  # kinds of passes, the first is preferred
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


@lru_cache(maxsize=50)
def best_orders(ranks: int, micro_batches: int, limit: int, times: PassTimes, joint: int = 1) -> Orders:
    """Return all ranks' computations in order.

    Args:
        ranks: pipeline ranks.
        micro_batches: of the step.
        limit: 2 or more; how many forwards of a chunk a rank holds until their weight gradients are computed.
        times: those of the 2 * ranks stages and of a message between ranks.
        joint: how many micro-batches' weight gradients of a chunk are computed one after the other, if deferred.
    """
    sizes = limit, times, joint
    chosen = _best_rule(ranks, shortened(ranks, micro_batches, joint), *sizes)
    return tuple(tuple(ending_by_chunk(order)) for order in _orders(ranks, micro_batches, *sizes, chosen))


def shortened(ranks: int, micro_batches: int, joint: int) -> int:
    """Return the micro-batches of the step for which a rule is chosen: a longer one repeats its middle."""
    period = math.lcm(ranks, joint)
    enough = _PERIODS * period
    return micro_batches if micro_batches <= enough + period else enough + micro_batches % period


@lru_cache(maxsize=500)
def _best_rule(ranks: int, micro_batches: int, limit: int, times: PassTimes, joint: int) -> _Rule | None:
    """Return the rule with the best result; None if that of `compact_orders` is better."""
    bound = _lower_bound(ranks, micro_batches, times)
    rules = _EQUAL_PASSES if times.equal else _RULES
    best, shortest = rules[0], math.inf
    for rule in rules[: max(1, _MAX_SIMULATED // (6 * ranks * micro_batches))]:
        time = _Simulation(ranks, micro_batches, limit, times, rule, joint).run(shortest)
        if time < shortest:
            best, shortest = rule, time
        if shortest <= bound:
            return best
    compact = _orders(ranks, micro_batches, limit, times, joint, None)
    if max(map(most_held, compact)) <= limit:
        timeline = simulate_orders(compact, Placement(ranks, 2, "v"), times.stages, latency=times.message)
        longest = max(steps[-1][2] - steps[0][1] for steps in timeline.ranks)
        return None if timeline.length + longest < shortest else best
    return best


def _orders(ranks: int, micro_batches: int, limit: int, times: PassTimes, joint: int, rule: _Rule | None) -> Orders:
    """Return the orders by a rule; None: those of `compact_orders`."""
    if rule is None:
        return tuple(tuple(together(order, joint)) for order in compact_orders(ranks, micro_batches))
    simulation = _Simulation(ranks, micro_batches, limit, times, rule, joint)
    simulation.run(math.inf)
    return simulation.orders


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

    __slots__ = (
        *("arrivals", "begin", "clock", "deferred", "held", "index", "limit", "next", "order", "shares", "targets"),
        *("times", "work"),
    )

    def __init__(self, index: int, ranks: int, micro_batches: int, limit: int, times: PassTimes) -> None:
        self.index = index
        costs = [times.stages[index], times.stages[2 * ranks - 1 - index]]
        self.times = [costs[chunk].of(op) for op, chunk in _KINDS]
        self.order: list[int] = []  # kinds of passes
        self.clock = 0.0
        self.begin = math.inf
        self.work = micro_batches * sum(self.times)  # time of the computations still to come
        self.next = [0] * 4  # next micro-batch of each forward and input backward
        self.arrivals: list[list[float]] = [[], [], [], []]  # when inputs arrive, by micro-batch
        self.targets: list[tuple[_Rank, int, float] | None] = [
            None
        ] * 4  # the rank that takes the output, its pass, and the delay
        self.deferred: tuple[deque[int], deque[int]] = (deque(), deque())  # by chunk: when each was deferred, by count
        self.held = 0  # forwards whose weight gradients are not computed
        self.limit = limit
        # Shares of the limit by the time that a micro-batch of each chunk is in flight: a chunk's forward to backward
        # takes longer the earlier its stage is.
        self.shares = -(-limit * (2 * ranks - index) // (2 * ranks)), -(-limit * index // (2 * ranks)) + 1

    def next_weights(self, joint: int) -> tuple[int, int]:
        """Return chunk and number of the weight gradients to compute: `joint` if there are so many, else the oldest."""
        first, second = self.deferred
        oldest = 0 if first and (not second or first[0] < second[0]) else 1
        for chunk in (oldest, 1 - oldest):
            if len(self.deferred[chunk]) >= joint:
                return chunk, joint
        return oldest, 1

    def has_room(self, forward: int) -> bool:
        """Return whether memory allows the forward; chunk 0 leaves room for chunk 1 of micro-batches under way."""
        done = self.next
        reserved = forward == _F0 and done[_F1] < done[_F0]
        return self.held + reserved < self.limit and done[forward] - done[forward + 2] < self.shares[forward]


class _Simulation:
    """One simulated step under one rule."""

    def __init__(self, ranks: int, micro_batches: int, limit: int, times: PassTimes, rule: _Rule, joint: int) -> None:
        self._ranks = [_Rank(rank, ranks, micro_batches, limit, times) for rank in range(ranks)]
        for rank, before, after in zip(self._ranks, [None, *self._ranks[:-1]], [*self._ranks[1:], None], strict=True):
            rank.targets = [
                (after, _F0, times.message) if after else (rank, _F1, 0),
                (before, _F1, times.message) if before else (rank, _B1, 0),
                (before, _B0, times.message) if before else None,
                (after, _B1, times.message) if after else (rank, _B0, 0),
            ]
        self._ranks[0].arrivals[_F0] = [0.0] * micro_batches
        self._rule, self._joint, self._deferred = rule, joint, 0
        self._wakes = [(0.0, rank) for rank in range(ranks)]
        self._bound = 0.0  # lower bound of what `run` returns

    def run(self, shortest: float) -> float:
        """Simulate; return the length of the step plus the longest time that a rank is busy with it.

        The former counts where ranks end a step together, the latter where they begin the next one on their own. The
        simulation ends as soon as `shortest` cannot be reached, and then returns infinity.
        """
        ranks, wakes, pop = self._ranks, self._wakes, heapq.heappop
        while wakes:
            now, index = pop(wakes)
            rank = ranks[index]
            if now >= rank.clock:
                self._advance(rank, now)
                if self._bound >= shortest:
                    return math.inf
        assert not any(rank.work for rank in ranks)
        return max(rank.clock for rank in ranks) + max(rank.clock - rank.begin for rank in ranks)

    @property
    def orders(self) -> Orders:
        """The computations of all ranks in order."""
        orders = []
        for rank in self._ranks:
            numbers = [count() for _ in _KINDS]
            orders.append(tuple(Instruction(*_KINDS[kind], next(numbers[kind])) for kind in rank.order))
        return tuple(orders)

    def _advance(self, rank: _Rank, now: float) -> None:
        """Start the next computation of a rank that is free, or let it sleep until an input arrives."""
        chosen: int | None = None
        start = earliest = math.inf  # when the chosen pass and any pass could begin
        for kind in self._rule.priority:
            arrivals, number = rank.arrivals[kind], rank.next[kind]
            if number >= len(arrivals) or (kind < _B0 and not rank.has_room(kind)):
                continue
            arrival = arrivals[number]
            if arrival <= now:
                earliest = now
                if chosen is None:
                    chosen, start = kind, now
                break
            earliest = min(earliest, arrival)
            if chosen is None and 4 * (arrival - now) <= self._rule.patience * rank.times[kind]:
                chosen, start = kind, arrival
        gap = (earliest if chosen is None else start) - now
        if gap > 0 and (rank.deferred[0] or rank.deferred[1]):
            chunk, number = rank.next_weights(self._joint)
            time = rank.times[_W0 + chunk]
            if 4 * gap >= (self._rule.spare if chosen is None else 4) * time:
                self._compute_weights(rank, now, chunk, number)
                return
        if chosen is not None:
            self._start(rank, start, chosen)
        elif earliest < math.inf:
            heapq.heappush(self._wakes, (earliest, rank.index))

    def _compute_weights(self, rank: _Rank, now: float, chunk: int, number: int) -> None:
        """Compute the oldest `number` weight gradients of a chunk one after the other."""
        time = number * rank.times[_W0 + chunk]
        rank.order += [_W0 + chunk] * number
        for _ in range(number):
            rank.deferred[chunk].popleft()
        rank.held -= number
        self._occupy(rank, now, time)

    def _start(self, rank: _Rank, start: float, kind: int) -> None:
        """Start a forward or an input backward, and note when the computation that takes its output receives it."""
        end = start + rank.times[kind]
        rank.order.append(kind)
        rank.next[kind] += 1
        if kind < _B0:
            rank.held += 1
        else:
            self._deferred += 1
            rank.deferred[kind - _B0].append(self._deferred)
        target = rank.targets[kind]
        if target:
            home, needed_for, delay = target
            home.arrivals[needed_for].append(end + delay)
            if home is not rank:
                for time in (end, end + delay) if delay else (end,):
                    if time > home.clock:  # else it looks for work when its computation ends
                        heapq.heappush(self._wakes, (time, home.index))
        self._occupy(rank, start, rank.times[kind])

    def _occupy(self, rank: _Rank, start: float, time: float) -> None:
        if start > rank.clock or not rank.clock:
            rank.begin = min(rank.begin, start)
            self._bound = max(self._bound, 2 * (start + rank.work) - rank.begin)
        rank.work -= time
        rank.clock = start + time
        heapq.heappush(self._wakes, (rank.clock, rank.index))


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
        for after, weights in ((_B1, _W1), (_B0, _W0)):
            starts[weights] = next(t for t in range(starts[after] + 1, starts[after] + 7) if t % 6 not in taken)
            taken.add(starts[weights] % 6)
        timed = [
            (start + 6 * i, Instruction(*_KINDS[kind], i))
            for kind, start in starts.items()
            for i in range(micro_batches)
        ]
        orders.append(tuple(step for _, step in sorted(timed, key=lambda pair: pair[0])))
    return tuple(orders)


def most_held(order: Sequence[Instruction]) -> int:
    """Return the maximum number of forwards whose weight gradients a rank still has to compute."""
    held = most = 0
    for step in order:
        held += (step.op is Op.FORWARD) - (step.op in (Op.BACKWARD, Op.WEIGHT_BACKWARD))
        most = max(most, held)
    return most
