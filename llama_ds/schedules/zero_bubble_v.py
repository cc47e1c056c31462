"""Zero-bubble V: two stages on each rank in a V, every backward split (Qi et al., arXiv 2405.15362).

Rank r of p holds stages r and 2 p - 1 - r, so rank 0 holds both ends of the model. All ranks hold about the same
activations, which sets how many micro-batches they can have under way and so the bubble:

    zb_v     those of the first rank of 1F1B: with equal passes, ranks wait only for their first micro-batch
    v_half   about half of that
    v_min    about a third

The order depends on the times of the passes (`v_orders.py`). Without stated times all are equal and messages are free.
Each of `extra` more micro-batches that every rank may hold lets messages overlap with computations. `joint` weight
gradients of each chunk wait for each other, for which every rank holds joint - 1 more micro-batches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from llama_ds.schedules.communication import awaited, message_of, produced, with_timed_messages
from llama_ds.schedules.instructions import COMPUTES, POSTS, Instruction, Placement
from llama_ds.schedules.pass_times import PassTimes
from llama_ds.schedules.simulate import simulate_orders
from llama_ds.schedules.v_orders import Orders, best_orders, compact_orders, most_held

V_SCHEDULES = ("zb_v", "v_half", "v_min")


@dataclass(frozen=True)
class ZeroBubbleV:
    """The sizes that determine the order of one of these schedules."""

    name: str
    ranks: int
    micro_batches: int
    extra: int
    times: PassTimes
    joint: int = 1  # micro-batches whose weight gradients of a chunk are computed together

    @property
    def limit(self) -> int:
        """How many forwards of a chunk a rank may hold until their weight gradients are computed."""
        limits = {"zb_v": 2 * self.ranks, "v_half": self.ranks + 2, "v_min": _compact_limit(self.ranks)}
        return limits[self.name] + 2 * (self.extra + self.joint - 1)

    @property
    def orders(self) -> Orders:
        """The computations of all ranks in order."""
        return best_orders(self.ranks, self.micro_batches, self.limit, self.times, self.joint)

    def in_flight(self, rank: int) -> int:
        """Return the maximum number of forwards whose weight gradients `rank` still has to compute."""
        return most_held(self.orders[rank])

    def instructions(self, rank: int) -> list[Instruction]:
        """Return the instructions of `rank`, with messages."""
        return _instructions(self)[rank]

    @property
    def receives(self) -> int:
        """Maximum number of receives of one kind and direction that a rank has posted."""
        return _receives(self)


@lru_cache(maxsize=100)
def _compact_limit(ranks: int) -> int:
    """Return what V-Min's repeated order holds once the pipeline is full."""
    return max(map(most_held, compact_orders(ranks, 4 * ranks)))


@lru_cache(maxsize=20)
def _instructions(plan: ZeroBubbleV) -> list[list[Instruction]]:
    orders, placement = plan.orders, Placement(plan.ranks, 2, "v")
    timeline = simulate_orders(orders, placement, plan.times.stages, latency=plan.times.message).ranks
    sent = {
        message: end
        for rank, steps in enumerate(timeline)
        for step, _, end in steps
        if (message := produced(step, rank, placement))
    }
    return [
        with_timed_messages(order, rank, placement, [end for *_, end in timeline[rank]], sent)
        for rank, order in enumerate(orders)
    ]


@lru_cache(maxsize=500)
def _receives(plan: ZeroBubbleV) -> int:
    most, placement = 1, Placement(plan.ranks, 2, "v")
    for rank, steps in enumerate(_instructions(plan)):
        posted: Counter[tuple[str, int, int]] = Counter()
        for step in steps:
            if step.op in POSTS:
                channel = message_of(step, rank, placement).channel
                posted[channel] += 1
                most = max(most, posted[channel])
            elif step.op in COMPUTES and (message := awaited(step, rank, placement)):
                posted[message.channel] -= 1
    return most
