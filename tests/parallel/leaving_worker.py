"""Four ranks of a pipeline wait for one another for ever, leave when they are asked to, and join another world.

Half of them have begun to gather weights, which the others never do. Each prints a JSON object: what its error was
taken for, whether nothing was left of the world, its process before and after, and the sum of an all-reduce in the next
world, in which the ranks have other numbers.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama_ds.config.deepspeed_json import deepspeed_config
from llama_ds.job.departure import Departure, tcp_sockets
from llama_ds.parallel import world
from llama_ds.parallel.leaving import Left, is_consequence, leave, leaving, state_of_process
from llama_ds.training.engines.build import build_engine
from tests.parallel.layout_cases import Case

BLOCKED_S = 0.5  # until a rank is asked, by when it waits
PORT = int(sys.argv[1])  # where the next world meets


class Connection:
    """A connection to a supervisor that hears nothing."""

    def tell(self, **values: Any) -> None:
        """Drop a report."""

    def inode(self) -> int | None:
        """Return None: it has no socket."""

    def end(self) -> None:
        """Do nothing."""


def wait_for_ever(rank: int, engine: Any) -> None:
    """Wait in a collective, for a message, in a barrier or at the store."""
    pair, other = dist.new_group([0, 3]), dist.new_group([2, 3])
    dist.barrier()
    if engine.dp_rank == 0:
        for bucket in engine.deepspeed.optimizer._buckets:
            bucket.start_gather()
    if rank == 0:
        dist.all_reduce(torch.ones(4), group=pair)
    elif rank == 1:
        dist.recv(torch.ones(4), src=3)
    elif rank == 2:
        dist.barrier(group=other)
    else:
        dist.distributed_c10d._get_default_store().wait(["never"])


def main() -> None:
    """Leave one world and join the next."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    rank_info = world.find_rank_info()
    rank, pid = rank_info.rank, os.getpid()
    departure, undo = Departure(Connection(), patience_s=60.0), state_of_process()
    world.join(rank_info)
    case = Case(pp=2, dp=2)
    engine = build_engine(
        case.run, case.layout, deepspeed_config(case.run, case.layout, bf16_native=True), torch.device("cpu")
    )
    threading.Timer(BLOCKED_S, departure.ask).start()
    follows, before, dropped = None, 0, None
    try:
        with leaving(departure, engine, lambda: None):
            before = len(tcp_sockets(None))
            try:
                wait_for_ever(rank, engine)
            except RuntimeError as error:
                follows = is_consequence(error, rank)
                raise
    except Left as left:
        dropped = left.dropped
    gone = dropped is not None and leave(departure, dropped, undo)
    os.environ.update(RANK=str(3 - rank), MASTER_PORT=str(PORT))
    world.join(world.find_rank_info())
    total = torch.tensor([float(1 << rank)])
    dist.all_reduce(total)
    objects = world.gather({"rank": 3 - rank, "text": "x" * 200 * rank})  # some are too long for one collective
    time.sleep(2 * BLOCKED_S)  # nothing shuts the new connections down
    dist.barrier()
    about = {"follows": follows, "before": before, "gone": gone, "objects": objects, "same": pid == os.getpid()}
    print(json.dumps({"rank": rank, "now": dist.get_rank(), "sum": float(total), **about}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
