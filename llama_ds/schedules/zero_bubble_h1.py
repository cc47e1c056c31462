"""Zero-bubble H1: 1F1B with the weights' gradients put off into its waits (Qi et al., arXiv 2401.10241, section 3).

Rank r computes the weights' gradients of a micro-batch r micro-batches late, so gradients of inputs travel without
waiting for them, and what was put off fills the end. A rank waits (p - 1) (f + b - w) where 1F1B waits
(p - 1) (f + b + w). No rank holds more micro-batches than 1F1B's first. `extra` is 1F1B's.
"""

from __future__ import annotations

from llama_ds.schedules import one_f_one_b
from llama_ds.schedules.instructions import Instruction, Op


def order(rank: int, ranks: int, micro_batches: int, chunks: int, extra: int) -> list[Instruction]:
    """Return the computations of `rank` in order; chunks is 1."""
    plain = one_f_one_b.order(rank, ranks, micro_batches, chunks, extra)
    if rank == 0:  # it sends no gradients: nobody waits
        return plain
    todo: list[Instruction] = []
    for step in plain:
        if step.op is Op.FORWARD:
            todo.append(step)
            continue
        todo.append(step._replace(op=Op.INPUT_BACKWARD))
        if step.micro_batch >= rank:
            todo.append(Instruction(Op.WEIGHT_BACKWARD, 0, step.micro_batch - rank))
    late = range(max(micro_batches - rank, 0), micro_batches)
    return todo + [Instruction(Op.WEIGHT_BACKWARD, 0, i) for i in late]


def in_flight(rank: int, ranks: int, micro_batches: int, chunks: int, extra: int) -> int:
    """Return the most forwards whose activations `rank` holds at a time, until their weights' gradients are done."""
    return min((ranks - rank - 1) * (1 + extra) + 1 + rank, micro_batches)
