"""1F1B: after a warm-up every forward is followed by a backward (Narayanan et al., arXiv 2104.04473, section 2.2).

With f, b, w the times of a stage's forward, input backward and weight backward and m micro-batches, a rank waits
(p - 1) (f + b + w) of a step of m (f + b + w) + that.

On links where a message takes about as long as a computation, one round trip between neighbours holds up a steady
state with so few micro-batches under way. `extra` more forwards for each rank behind are started with then (Zhuang et
al., arXiv 2211.05322, call `extra` = 1 eager 1F1B): more activations are held, and messages have the time of a
computation to travel.
"""

from __future__ import annotations

from llama_ds.schedules.instructions import Instruction, Op


def order(rank: int, ranks: int, micro_batches: int, chunks: int, extra: int) -> list[Instruction]:
    """Return the computations of `rank` in order; chunks is 1."""
    ahead = min((ranks - rank - 1) * (1 + extra), micro_batches)
    todo = [Instruction(Op.FORWARD, 0, i) for i in range(ahead)]
    for i in range(micro_batches - ahead):
        todo += [Instruction(Op.FORWARD, 0, ahead + i), Instruction(Op.BACKWARD, 0, i)]
    return todo + [Instruction(Op.BACKWARD, 0, i) for i in range(micro_batches - ahead, micro_batches)]


def in_flight(rank: int, ranks: int, micro_batches: int, chunks: int, extra: int) -> int:
    """Return the most forwards whose activations `rank` holds at a time."""
    return min((ranks - rank - 1) * (1 + extra) + 1, micro_batches)
