"""Reads of results from a CUDA device while it computes what has been issued since.

A read waits for the stream that it is issued on. On the stream of the computation that is all of the next step, so
results are read on a stream of their own, which waits for the results alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def issued(device: torch.device) -> Any:
    """Return an event after all that the current stream has been given; None on a CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextmanager
def reading(device: torch.device, after: Any = None) -> Iterator[None]:
    """Let what is read within this context, and collectives that it waits for, wait for the event `after` alone.

    The tensors must live until they have been read.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    if after is not None:
        stream.wait_event(after)
    with torch.cuda.stream(stream):
        yield
