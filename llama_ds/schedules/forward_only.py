"""Evaluation: only forwards, chunk by chunk for each group of as many micro-batches as there are ranks."""

from __future__ import annotations

from llama_ds.schedules.communication import with_messages
from llama_ds.schedules.instructions import Instruction, Op, Placement


def instructions(rank: int, micro_batches: int, placement: Placement) -> list[Instruction]:
    """Return the instructions of `rank` to evaluate `micro_batches` micro-batches."""
    todo = []
    for start in range(0, micro_batches, placement.ranks):
        group = range(start, min(start + placement.ranks, micro_batches))
        todo += [Instruction(Op.FORWARD, chunk, i) for chunk in range(placement.chunks) for i in group]
    return with_messages(todo, rank, placement)
