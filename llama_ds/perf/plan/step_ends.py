"""Exposed time of the communication at a step's ends: gradients behind the last backward, weights before the next one.

A rank reduces a layer's gradients as soon as its last micro-batch has added to them, and gathers its weights before the
layer's first forward, in the order of the layers. Deferred weight gradients at the end of a chunk's step are computed
layer by layer (`schedules/joint_weights.py`). Of a rank with several chunks of the model, the others compute meanwhile.
Waits for other ranks within the pipeline, in which messages travel too, are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_ds.schedules.instructions import Instruction, Op
from llama_ds.schedules.joint_weights import weight_groups
from llama_ds.schedules.simulate import StageCost

_ADDS = (Op.BACKWARD, Op.WEIGHT_BACKWARD)


@dataclass(frozen=True)
class ChunkEnds:
    """When a chunk's first forward and its last weight gradients take place, in seconds of the rank's own passes."""

    layers: int
    before: float  # passes before the first forward
    forward: float
    last: float  # the last pass that adds gradients, or those that do together, layer by layer
    after: float  # passes after it


def chunk_ends(
    steps: Sequence[Instruction], costs: Sequence[StageCost], layers: Sequence[int], joint: int
) -> list[ChunkEnds]:
    """Return the ends of each chunk in a rank's computations; `costs` and `layers` are by chunk.

    `joint` is the schedule's number of micro-batches whose weight gradients are computed together.
    """
    found, groups = [], weight_groups(steps, joint)
    for chunk, (cost, count) in enumerate(zip(costs, layers, strict=True)):
        first = next(n for n, step in enumerate(steps) if step.op is Op.FORWARD and step.chunk == chunk)
        ends = (n for n, step in enumerate(steps) if step.op in _ADDS and step.chunk == chunk)
        last = max(ends)
        before, after = (sum(costs[s.chunk].of(s.op) for s in part) for part in (steps[:first], steps[last + 1 :]))
        passes = sum(groups.get(steps[last], (1,)))
        found.append(ChunkEnds(max(1, count), before, cost.forward, passes * cost.of(steps[last].op), after))
    return found


def exposed_reduction(chunks: Sequence[ChunkEnds], seconds: float, share: float) -> float:
    """Return for how much longer a step takes whose gradients travel for `seconds`, layer by layer.

    `share` is the computing time that a second of hidden communication costs.
    """
    layer = seconds / sum(chunk.layers for chunk in chunks)
    free = float("-inf")  # when the link is free, from the end of the rank's passes
    for chunk in sorted(chunks, key=lambda chunk: -chunk.after):
        for number in range(1, chunk.layers + 1):
            ready = -chunk.after - chunk.last * (1 - number / chunk.layers)
            free = max(free, ready) + layer
    exposed = max(0.0, free)
    return exposed + share * (seconds - exposed)


def exposed_gather(chunks: Sequence[ChunkEnds], seconds: float, share: float) -> float:
    """Return for how much longer a step takes whose weights travel for `seconds`, layer by layer."""
    layer = seconds / sum(chunk.layers for chunk in chunks)
    arrived = late = 0.0
    for chunk in chunks:
        for number in range(chunk.layers):
            arrived += layer
            late = max(late, arrived - chunk.before - chunk.forward * number / chunk.layers)
    return late + share * max(0.0, seconds - late)
