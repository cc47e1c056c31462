"""Interleaved 1F1B: several small stages on each rank (Narayanan et al., arXiv 2104.04473, section 2.2).

With c chunks the bubble is (p - 1) (f + b + w) / c, where f, b, w are the times of all of a rank's chunks. The price
is c times as many messages and a longer warm-up.
"""

from __future__ import annotations

from llama_ds.schedules.instructions import Instruction, Op


def order(rank: int, ranks: int, micro_batches: int, chunks: int, extra: int) -> list[Instruction]:
    """Return the computations of `rank` in order: groups of p micro-batches pass chunk by chunk."""
    total = micro_batches * chunks
    ahead = in_flight(rank, ranks, micro_batches, chunks, extra) - 1
    if ahead + 1 == total:  # all forwards first
        ahead = total

    def forward(k: int) -> Instruction:
        return Instruction(Op.FORWARD, k // ranks % chunks, _micro_batch(k, ranks, chunks))

    def backward(k: int) -> Instruction:
        return Instruction(Op.BACKWARD, chunks - 1 - k // ranks % chunks, _micro_batch(k, ranks, chunks))

    todo = [forward(k) for k in range(ahead)]
    for k in range(total - ahead):
        todo += [forward(ahead + k), backward(k)]
    return todo + [backward(k) for k in range(total - ahead, total)]


def in_flight(rank: int, ranks: int, micro_batches: int, chunks: int, extra: int) -> int:
    """Return the maximum number of forwards of a chunk whose activations `rank` holds."""
    return min(2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1, micro_batches * chunks)


def _micro_batch(k: int, ranks: int, chunks: int) -> int:
    """Return the micro-batch of a rank's k-th forward, which is also that of its k-th backward."""
    return k // (ranks * chunks) * ranks + k % ranks
