"""DualPipeV: two stages on each rank, out through one and back through the other (DeepSeek-AI, DualPipe, 2025).

Rank r holds stages r and 2 p - 1 - r, so rank 0 holds both ends of the model, and the last rank passes activations to
itself. The order of forwards and backwards is that of DeepSpeed's DualPipeVSchedule, which never splits a backward;
here the weight gradients are deferred as in DualPipe itself.
"""

from __future__ import annotations

from collections import deque

from llama_ds.schedules.instructions import Instruction, Op


def order(rank: int, ranks: int, micro_batches: int, chunks: int, extra: int) -> list[Instruction]:
    """Return the computations of `rank` in order; chunks is 2 and micro_batches at least 2 * ranks."""
    todo: list[Instruction] = []
    done = {(op, chunk): 0 for op in ("F", "B") for chunk in (0, 1)}
    deferred: deque[Instruction] = deque()

    def forward(chunk: int) -> None:
        todo.append(Instruction(Op.FORWARD, chunk, done["F", chunk]))
        done["F", chunk] += 1

    def backward(chunk: int, split: bool = False) -> None:
        micro_batch = done["B", chunk]
        todo.append(Instruction(Op.INPUT_BACKWARD if split else Op.BACKWARD, chunk, micro_batch))
        done["B", chunk] += 1
        if split:
            deferred.append(Instruction(Op.WEIGHT_BACKWARD, chunk, micro_batch))

    behind, ahead = rank + 1, ranks - rank - 1
    for _ in range(2 * ahead):  # warm-up of chunk 0
        forward(0)
    for _ in range(behind):  # warm-up of both chunks
        forward(0)
        forward(1)
    for _ in range(ahead):
        backward(1, split=True)
        todo.append(deferred.popleft())
        forward(1)
    for _ in range(micro_batches - 2 * ranks + behind):  # steady state
        forward(0)
        backward(1)
        forward(1)
        backward(0)
    for _ in range(ahead):
        backward(1)
        forward(1)
        backward(0)
    for i in range(2 * behind):  # cool-down, deferring the weight gradients of the second half
        backward(1 - i % 2, split=i >= behind)
    for _ in range(ahead):
        todo.append(deferred.popleft())
        backward(0, split=True)
    return todo + list(deferred)


def in_flight(rank: int, ranks: int, micro_batches: int, chunks: int, extra: int) -> int:
    """Return the maximum number of forwards of a chunk whose activations `rank` holds."""
    return 2 * ranks + 1
