"""Zero-bubble H1: 1F1B with weight gradients deferred into its bubble (Qi et al., arXiv 2401.10241, section 3).

Rank r defers weight gradients by r micro-batches, so that input gradients are sent without waiting for them, and the
deferred work fills the end of the step. The bubble is (p - 1) (f + b - w); that of 1F1B is (p - 1) (f + b + w). `extra`
has the meaning that it has in 1F1B, and each rank then defers weight gradients 1 + extra times as long (for `extra` = 1
about as ZB-H2, section 3.2), to compute them while it waits for messages. No rank holds more micro-batches than the
first rank of 1F1B with the same `extra`.
"""

from __future__ import annotations

from llama_ds.schedules import one_f_one_b
from llama_ds.schedules.instructions import Instruction, Op


def order(rank: int, ranks: int, micro_batches: int, chunks: int, extra: int) -> list[Instruction]:
    """Return the computations of `rank` in order; chunks is 1."""
    plain = one_f_one_b.order(rank, ranks, micro_batches, chunks, extra)
    if rank == 0:  # it sends no gradients, so no rank waits for it
        return plain
    todo: list[Instruction] = []
    delay = rank * (1 + extra)
    for step in plain:
        if step.op is Op.FORWARD:
            todo.append(step)
            continue
        todo.append(step._replace(op=Op.INPUT_BACKWARD))
        if step.micro_batch >= delay:
            todo.append(Instruction(Op.WEIGHT_BACKWARD, 0, step.micro_batch - delay))
    deferred = range(max(micro_batches - delay, 0), micro_batches)
    return todo + [Instruction(Op.WEIGHT_BACKWARD, 0, i) for i in deferred]


def in_flight(rank: int, ranks: int, micro_batches: int, chunks: int, extra: int) -> int:
    """Return the maximum number of forwards whose weight gradients `rank` still has to compute."""
    return min((ranks - 1) * (1 + extra) + 1, micro_batches)
