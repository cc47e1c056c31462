"""CUDA graphs: work on the device that is recorded once and then launched by one call of the host."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
Replay = Callable[[], None]


class Graphs(Protocol):
    """Makes graphs that share memory for temporaries, and so are replayed one after the other, on one stream."""

    def capture(self, function: Callable[[], T]) -> tuple[T, Replay]:
        """Record the device's work of `function` without doing it; return its result and a call that does the work.

        A replay reads and writes the memory of the capture. Tensors within the result keep theirs while they are
        referenced; what else `function` allocates may hold anything after a replay.

        Raises:
            RuntimeError: `function` does what a graph cannot, such as waiting for the device.
        """


class CudaGraphs:
    """Graphs of the current CUDA device, with one memory pool that nothing else uses."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # the default stream cannot be captured

    def capture(self, function: Callable[[], T]) -> tuple[T, Replay]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            # Other threads may go on meanwhile: that which reads data pins memory, NCCL's watchdog queries events.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = function()
            except BaseException:
                with suppress(RuntimeError):  # the capture is invalid by now
                    graph.capture_end()
                raise
            graph.capture_end()
        return result, graph.replay
