"""Records DeepSpeed's collectives for pp = 1, where DeepSpeed issues them in its forward, backward and step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm

from llama_ds.parallel.trace import Trace

MAX_AGREEMENT_ELEMENTS = 1024  # smaller all-reduces carry norms, losses or overflow flags; larger ones gradients
_EVENTS = {"reduction": ("reduce", "wait reduction"), "weights": ("gather", "wait weights")}
_AGREEMENT = ("agree", "wait agreement")
_COLLECTIVES = {  # purpose of each collective of DeepSpeed's backend
    "all_reduce": "reduction",
    "all_reduce_coalesced": "reduction",
    "reduce": "reduction",
    "reduce_scatter": "reduction",
    "reduce_scatter_tensor": "reduction",
    "all_to_all_single": "reduction",
    "all_gather": "weights",
    "all_gather_into_tensor": "weights",
    "all_gather_coalesced": "weights",
    "broadcast": "weights",
}


@contextmanager
def collectives_recorded(trace: Trace) -> Iterator[None]:
    """Record the collectives that DeepSpeed issues within this context if `trace` is recording."""
    if not trace.recording:
        yield
        return
    backend = comm.comm.cdb
    names = [name for name in _COLLECTIVES if hasattr(backend, name)]
    for name in names:  # instance attributes: deleting them restores the class's methods
        setattr(backend, name, _recorded(getattr(backend, name), _EVENTS[_COLLECTIVES[name]], trace))
    try:
        yield
    finally:
        for name in names:
            delattr(backend, name)


def _recorded(run: Callable[..., Any], events: tuple[str, str], trace: Trace) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        size, elements = _size([*args, *kwargs.values()])
        in_flight, waiting = _AGREEMENT if elements <= MAX_AGREEMENT_ELEMENTS else events
        begin = trace.now()
        work = run(*args, **kwargs)
        if hasattr(work, "wait"):
            return _Watched(work, begin, in_flight, waiting, size, trace)
        trace.add(in_flight, begin, size=size)
        trace.add(waiting, begin)
        return work

    return wrapped


class _Watched:
    """Handle of a collective in flight that records when it is waited for."""

    def __init__(self, work: Any, begin: Any, in_flight: str, waiting: str, size: int, trace: Trace) -> None:
        self._work, self._begin, self._trace, self._size = work, begin, trace, size
        self._in_flight, self._waiting = in_flight, waiting

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        begin = self._trace.now()
        result = self._work.wait(*args, **kwargs)
        self._trace.add(self._in_flight, self._begin, size=self._size)
        self._trace.add(self._waiting, begin)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _size(values: list[Any]) -> tuple[int, int]:
    """Return bytes and elements of the largest tensor, or list of tensors, among a collective's arguments."""
    lists = [value if isinstance(value, list | tuple) else [value] for value in values]
    tensors = [[t for t in each if isinstance(t, torch.Tensor)] for each in lists]
    return max(((sum(t.nbytes for t in each), sum(t.numel() for t in each)) for each in tensors), default=(0, 0))
