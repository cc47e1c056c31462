"""Weight gradients of several micro-batches at once, where a schedule computes them one after the other.

The gradients of a chunk's matrices for consecutive micro-batches can be one product over the tokens of all of them, so
that they are added to their buffers once. An order places such weight backwards next to each other.

The weight backwards that end a chunk's step are computed layer by layer: all micro-batches of the last layer, then of
the one before. The first layers' reductions then begin early, and the others' follow one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby

from llama_ds.schedules.instructions import BACKWARDS, COMPUTES, Instruction, Op

_ADDS = (Op.BACKWARD, Op.WEIGHT_BACKWARD)
Groups = dict[Instruction, tuple[int, ...]]


def weight_groups(steps: Iterable[Instruction], joint: int, first_apart: bool = False) -> Groups:
    """Return how many micro-batches each weight backward of a rank computes, by product: () if a later one does it.

    Those of a chunk that no other computation separates are products of `joint` micro-batches, each computed with the
    last of them; that of the step's first micro-batch is alone if `first_apart`. If they end the chunk's step, all of
    them are computed with the last, to be taken layer by layer.
    """
    computations = [step for step in steps if step.op in COMPUTES]
    last = {step.chunk: step for step in computations if step.op in _ADDS}
    groups: Groups = {}
    for (op, chunk), found in groupby(computations, lambda step: (step.op, step.chunk)):
        if op is not Op.WEIGHT_BACKWARD:
            continue
        run = list(found)
        counts = _counts(len(run), joint, first_apart and run[0].micro_batch == 0)
        groups |= dict.fromkeys(run, ())
        if run[-1] == last[chunk]:
            groups[run[-1]] = counts
        else:
            groups |= {run[end - 1]: (n,) for end, n in zip(accumulate(counts), counts, strict=True)}
    return groups


def _counts(number: int, joint: int, first_apart: bool) -> tuple[int, ...]:
    whole, rest = divmod(number - first_apart, joint)
    return (1,) * first_apart + (joint,) * whole + (rest,) * (rest > 0)


def shares_of(layers: int, groups: Sequence[int]) -> list[list[tuple[int, int, bool]]]:
    """Return an equal share of the work on `groups` of micro-batches for each of these, layer by layer.

    Each piece of work is a layer, a number of micro-batches, and whether it is the layer's last.
    """
    work = [(layer, n, i == len(groups)) for layer in range(layers) for i, n in enumerate(groups, 1)]
    number = sum(groups)
    return [work[len(work) * i // number : len(work) * (i + 1) // number] for i in range(number)]


def joint_share(steps: Iterable[Instruction], chunk: int, joint: int) -> float:
    """Return the share of a chunk's micro-batches whose weight gradients a rank computes `joint` at a time."""
    groups = weight_groups(steps, joint)
    counts = [n for step, found in groups.items() if step.chunk == chunk for n in found]
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


def ending_by_chunk(steps: Sequence[Instruction]) -> list[Instruction]:
    """Return an order in which the weight backwards that end a rank's step stand chunk by chunk.

    The chunk whose last one came first goes first, so that no layer's gradient is complete later than before.
    """
    end = len(steps)
    while end and steps[end - 1].op is Op.WEIGHT_BACKWARD:
        end -= 1
    last = {step.chunk: n for n, step in enumerate(steps[end:])}
    return [*steps[:end], *sorted(steps[end:], key=lambda step: last[step.chunk])]
