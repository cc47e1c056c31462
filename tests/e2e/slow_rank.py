"""train.py on a rank that is slow, or on `all`: slow_rank.py WHERE SECONDS RANK ARGUMENTS OF train.py..."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama_ds import train
from llama_ds.model.manual_backward import ManualBackwardLayer
from llama_ds.parallel import point_to_point
from llama_ds.training.feed import Feed

PLACES: dict[str, tuple[Any, str]] = {
    "forward": (ManualBackwardLayer, "forward"),
    "data": (Feed, "__next__"),
    "messages": (point_to_point.PipelineComm, "post"),
}


def slow_down(where: str, seconds: float) -> None:
    """Delay every call of a function; for a receive, delay the wait for its message."""
    owner, name = PLACES[where]
    whole = getattr(owner, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        if where == "messages":
            handles, buffers = whole(*args, **kwargs)
            return [_Late(handle, seconds) for handle in handles], buffers
        time.sleep(seconds)
        return whole(*args, **kwargs)

    setattr(owner, name, slow)


class _Late:
    """A receive with a delayed completion."""

    def __init__(self, handle: Any, seconds: float) -> None:
        self._handle, self._seconds = handle, seconds

    def wait(self) -> None:
        self._handle.wait()
        time.sleep(self._seconds)


if __name__ == "__main__":
    where, seconds, rank, *arguments = sys.argv[1:]
    if rank in ("all", os.environ.get("RANK")):
        slow_down(where, float(seconds))
    sys.argv[1:] = arguments
    sys.exit(train.main())
