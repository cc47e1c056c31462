"""CUDA graphs: work on the device that is recorded once and then launched by one call of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Replay = Callable[[], None]


class Graphs(Protocol):
    """Makes graphs that share memory for temporaries, and so are replayed one after the other, on one stream."""

    computes: bool  # False: tensors have no values, as in a dry run

    def capture(self, function: Callable[[], T]) -> tuple[T, Replay]:
        """Record the device's work of `function` without doing it; return its result and a call that does the work.

        A replay reads and writes the memory of the capture. Tensors within the result keep theirs while they are
        referenced; what else `function` allocates may hold anything after a replay.

        Raises:
            RuntimeError: `function` does what a graph cannot, such as waiting for the device.
        """


class CudaGraphs:
    """Graphs of the current CUDA device, with one memory pool that nothing else uses."""

    computes = True

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


def tensors_of(result: Any, without: type[Any] = NoneType) -> Iterator[Tensor]:
    """Yield the tensors in the result of a graph, in lists, tuples and dataclasses, but not those in `without`."""
    if isinstance(result, without):
        return
    if isinstance(result, Tensor):
        yield result
    elif is_dataclass(result) and not isinstance(result, type):
        for part in fields(result):
            yield from tensors_of(getattr(result, part.name), without)
    elif isinstance(result, (list, tuple)):
        for item in result:
            yield from tensors_of(item, without)
