"""Four ranks that wait for one another for ever, leave their world when they are asked to, and join another one.

Each prints a JSON object: what its error was taken for, what was left of the world, its process before and after, and
the sum of an all-reduce in the next world, in which the ranks have other numbers.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from llama_ds.job.departure import Departure, tcp_sockets
from llama_ds.parallel import world
from llama_ds.parallel.leaving import is_consequence

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


def wait_for_ever(rank: int) -> None:
    """Wait in a collective, for a message, in a barrier or at the store."""
    pair, other = dist.new_group([0, 3]), dist.new_group([2, 3])
    dist.barrier()
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
    rank_info = world.find_rank_info()
    rank, pid = rank_info.rank, os.getpid()
    departure = Departure(Connection(), patience_s=60.0)
    world.join(rank_info)
    threading.Timer(BLOCKED_S, departure.ask).start()
    follows = None
    try:
        wait_for_ever(rank)
    except RuntimeError as error:
        follows = is_consequence(error, rank)
    waited = departure.wait_until_asked()
    before = len(tcp_sockets(None))
    dist.destroy_process_group()
    left = departure.remains()
    departure.end()
    os.environ.update(RANK=str(3 - rank), MASTER_PORT=str(PORT))
    world.join(world.find_rank_info())
    total = torch.tensor([float(1 << rank)])
    dist.all_reduce(total)
    time.sleep(2 * BLOCKED_S)  # nothing shuts the new connections down
    dist.barrier()
    about = {"follows": follows, "asked": waited, "before": before, "left": left, "same": pid == os.getpid()}
    print(json.dumps({"rank": rank, "now": dist.get_rank(), "sum": float(total), **about}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
