"""Weight gradients of several micro-batches as one product, where a schedule computes them one after the other.

The gradients of a chunk's matrices for consecutive micro-batches are one product over the tokens of all of them, so
that they are added to their buffers once. An order places such weight backwards next to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llama_ds.schedules.instructions import BACKWARDS, COMPUTES, Instruction, Op


def joint_counts(steps: Iterable[Instruction], joint: int, first_apart: bool = False) -> dict[Instruction, int]:
    """Return how many micro-batches each weight backward of a rank computes: 0 if a later one does it.

    Those of a chunk that no other computation separates are computed `joint` at a time, with the last of them; those of
    the step's first micro-batch alone if `first_apart`.
    """
    counts: dict[Instruction, int] = {}
    group: list[Instruction] = []
    for step in steps:
        if step.op not in COMPUTES:
            continue
        if step.op is not Op.WEIGHT_BACKWARD:
            group = []
            continue
        follows = bool(group) and group[-1][1:] == (step.chunk, step.micro_batch - 1)
        if not follows or len(group) == joint or (first_apart and step.micro_batch == 1):
            group = []
        group.append(step)
        counts |= dict.fromkeys(group, 0)
        counts[step] = len(group)
    return counts


def joint_share(steps: Iterable[Instruction], chunk: int, joint: int) -> float:
    """Return the share of a chunk's micro-batches whose weight gradients a rank computes `joint` at a time."""
    counts = [n for step, n in joint_counts(steps, joint).items() if step.chunk == chunk]
    return sum(n for n in counts if n == joint) / max(1, sum(counts))


def together(steps: Sequence[Instruction], joint: int) -> list[Instruction]:
    """Return an order whose weight backwards wait for those of the micro-batches with which they are computed.

    Every backward is split for it.
    """
    if joint == 1:
        return list(steps)
    ordered: list[Instruction] = []
    waiting: dict[int, list[Instruction]] = {}
    for step in steps:
        if step.op in BACKWARDS:
            ordered.append(step._replace(op=Op.INPUT_BACKWARD))
        elif step.op is Op.FORWARD:
            ordered.append(step)
        if step.op not in (Op.BACKWARD, Op.WEIGHT_BACKWARD):
            continue
        step = step._replace(op=Op.WEIGHT_BACKWARD)
        waiting.setdefault(step.chunk, []).append(step)
        if (step.micro_batch + 1) % joint == 0:
            ordered += waiting.pop(step.chunk)
    return ordered + [step for rest in waiting.values() for step in rest]
