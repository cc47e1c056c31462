"""One rank whose engines, DeepSpeed's own, train on the fake CUDA device: `fake_engines.py REQUESTS`.

REQUESTS is JSON: a list of what check-plan asks of its ranks, with one layout each. The fake device lets it build the
engine and take its steps as on a GPU. A line for each request says what the steps have called.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from llama_ds.benchmarks.machine import layouts
from llama_ds.model import graphed_layers
from llama_ds.parallel import world
from llama_ds.parallel.dry_run.fake_world import asking
from tests.fake_cuda import DEVICE, FakeCuda, fake_cuda
from tests.fake_groups import fake_ranks


@contextmanager
def deepspeed_on_fake_cuda() -> Iterator[None]:
    """Let DeepSpeed take the fake device, and give it what it reads from a device or from autograd's own engine."""
    set_accelerator(CUDA_Accelerator())
    with ExitStack() as stack:
        for target, name, value in (
            (layouts, "WARM_UP", 0),
            (torch.cuda.nvtx, "range_push", lambda message: 0),
            (torch.cuda.nvtx, "range_pop", lambda: 0),
            # Comparisons with rank 0: the collective is issued, and the result is this rank's own value.
            (zero_utils, "get_lst_from_rank0", asking(zero_utils.get_lst_from_rank0)),
            (zero_utils, "assert_lst_len_same_as_other_ranks", lambda x: zero_utils.get_lst_from_rank0([len(x)])),
            # The number of weights that a backward reaches is known to autograd's engine only: all of them.
            (stage_1_and_2, "count_used_parameters_in_backward", len),
            (stage3, "count_used_parameters_in_backward", len),
            # Nor is any value wrong that a graph computes first.
            (graphed_layers, "_same", lambda expected, found: True),
            # No value is known, and so none is infinite: ZeRO-2 and 3 would skip the update.
            (DeepSpeedZeroOptimizer, "has_overflow", lambda self, partition_gradients=True: False),
            (DeepSpeedZeroOptimizer_Stage3, "has_overflow", lambda self, partition_gradients=True: False),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def called(cuda: FakeCuda, request: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    """Return the operators that the steps of a layout called, and the collectives and messages."""
    begin = len(cuda.log)
    cuda.operators.clear()
    found = layouts.measure(request, world.RankInfo(rank, size, 0), DEVICE)["layouts"][0]
    assert len(found["seconds"]) == request["steps"] and "allocated" in found["memory"]
    graphs = {"a graph" for line in cuda.log[begin:] if line.startswith("graph of")}
    groups = {line.partition(" on group")[0] for line in cuda.log[begin:] if " on group" in line}
    return {"rank": rank, "called": sorted(cuda.operators | groups | graphs)}


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["LOCAL_RANK"] = "0"  # every rank has the one device
    with fake_cuda() as cuda, deepspeed_on_fake_cuda():
        for request in json.loads(sys.argv[1]):
            with mock.patch.dict(os.environ, request.get("environment", {})), fake_ranks(cuda, size, rank):
                print(json.dumps(called(cuda, request, rank, size)), flush=True)
        # DeepSpeed's own streams wait before they use memory anew, which is not seen when it is released.
        cuda.races.clear()


if __name__ == "__main__":
    main()
