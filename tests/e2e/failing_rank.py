"""train.py on a rank whose decoder layers fail: failing_rank.py METHOD CALL RANK ERROR ARGUMENTS OF train.py..."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama_ds import train
from llama_ds.model import manual_backward

ERRORS = {
    "broken": RuntimeError("broken"),
    "out_of_memory": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 KiB. GPU 0 has a total capacity of 79.15 GiB of which 9.00 KiB is "
        "free. Of the allocated memory 70.10 GiB is allocated by PyTorch, and 8.00 KiB is reserved by PyTorch but "
        "unallocated."
    ),
}


def break_layers(method: str, call: int, error: str) -> None:
    """Have the `call`-th call of a function of the layer with the hand-written backward raise."""
    owner: Any = manual_backward.ManualBackwardLayer if method == "run_deferred_wgrad" else manual_backward
    whole, calls = getattr(owner, method), iter(range(10**9))

    def broken(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise ERRORS[error]
        return whole(*args, **kwargs)

    setattr(owner, method, broken)


if __name__ == "__main__":
    method, call, rank, error, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        break_layers(method, int(call), error)
    sys.argv[1:] = arguments
    sys.exit(train.main())
