"""1F1B: after a warm-up every forward is followed by a backward (Narayanan et al., arXiv 2104.04473, section 2.2).

With m micro-batches and f, b, w the times of a stage's forward, input backward and weight backward, the bubble is
(p - 1) (f + b + w), in addition to m (f + b + w) of computation.

If a message takes about as long as a computation, a round trip between neighbours stalls the steady state, because too
few micro-batches are in flight. The warm-up then runs `extra` additional forwards for each following rank (Zhuang et
al., arXiv 2211.05322, call `extra` = 1 eager 1F1B): more activations are held, and messages overlap with a computation.
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
    """Return the maximum number of forwards whose activations `rank` holds."""
    return min((ranks - rank - 1) * (1 + extra) + 1, micro_batches)
