"""Has DeepSpeed's collectives recorded (pp = 1, where they are inside its forward, backward and step)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm

from llama_ds.parallel.trace import Trace

SMALL = 1024  # numbers: an all-reduce of no more is of norms, losses or overflow flags, a larger one of gradients
_WAYS = {"reduction": ("reduce", "wait reduction"), "weights": ("gather", "wait weights")}
_AGREEMENT = ("agree", "wait agreement")
_COLLECTIVES = {  # of DeepSpeed's backend
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
    """Record the collectives that DeepSpeed issues within this context, if `trace` records; else change nothing."""
    if not trace.recording:
        yield
        return
    backend = comm.comm.cdb
    names = [name for name in _COLLECTIVES if hasattr(backend, name)]
    for name in names:  # of this object: the class's own methods come back when these are gone
        setattr(backend, name, _recorded(getattr(backend, name), _WAYS[_COLLECTIVES[name]], trace))
    try:
        yield
    finally:
        for name in names:
            delattr(backend, name)


def _recorded(run: Callable[..., Any], ways: tuple[str, str], trace: Trace) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        size, numbers = _size([*args, *kwargs.values()])
        under_way, waiting = _AGREEMENT if numbers <= SMALL else ways
        begin = trace.now()
        work = run(*args, **kwargs)
        if hasattr(work, "wait"):
            return _Watched(work, begin, under_way, waiting, size, trace)
        trace.add(under_way, begin, size=size)
        trace.add(waiting, begin)
        return work

    return wrapped


class _Watched:
    """The handle of a collective under way, which notes when it is waited for."""

    def __init__(self, work: Any, begin: Any, under_way: str, waiting: str, size: int, trace: Trace) -> None:
        self._work, self._begin, self._trace, self._size = work, begin, trace, size
        self._under_way, self._waiting = under_way, waiting

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        begin = self._trace.now()
        result = self._work.wait(*args, **kwargs)
        self._trace.add(self._under_way, self._begin, size=self._size)
        self._trace.add(self._waiting, begin)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _size(values: list[Any]) -> tuple[int, int]:
    """Return bytes and numbers of the largest tensor, or list of tensors, among a collective's arguments."""
    lists = [value if isinstance(value, list | tuple) else [value] for value in values]
    tensors = [[t for t in each if isinstance(t, torch.Tensor)] for each in lists]
    return max(((sum(t.nbytes for t in each), sum(t.numel() for t in each)) for each in tensors), default=(0, 0))
