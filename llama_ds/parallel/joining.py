"""How ranks meet: a store at rank 0, which says every 30 s who is waited for instead of hanging in silence."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from llama_ds.errors import NotJoined, listed
from llama_ds.log import logger

SAY_S = 30.0
MAX_NAMED = 8  # ranks named in a line


def open_store(rank: int, world: int, local_rank: int, timeout: timedelta, hosts: Sequence[str] = ()) -> dist.Store:
    """Return the store at MASTER_ADDR and MASTER_PORT, on rank 0 once all ranks have connected.

    `hosts` are the hosts of all ranks, as far as they are known.

    Raises:
        NotJoined: rank 0 cannot listen there, or ranks do not come within `timeout`.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent serves the store, and keeps it when it starts its ranks again.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    here = f"rank {rank} on {socket.gethostname()}"
    try:
        # One rank of a host is enough to say that it waits.
        with saying(lambda s: f"{here}: no answer from rank 0 at {address}:{port} for {s:.0f} s", local_rank == 0):
            tcp = dist.TCPStore(address, port, world, serves, timeout, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        problem = str(error).partition("\n")[0]
        raise NotJoined(
            f"{here}: cannot {'listen' if serves else 'reach rank 0'} at MASTER_ADDR:MASTER_PORT = {address}:{port} "
            f"({problem}); give another port, or an address of rank 0's host that all hosts reach"
        ) from None
    store = dist.PrefixStore(f"llama_ds/start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
    store.set(_key(rank), socket.gethostname())
    if store.add("joined", 1) == world:
        store.set("all", "")
    if rank == 0:
        _wait_for_all(store, world, timeout, hosts, f"{address}:{port}")
    return store


@contextmanager
def saying(line: Callable[[float], str], speaks: bool = True) -> Iterator[None]:
    """Print `line` of the seconds so far to stderr every SAY_S, from this or, as a logger would not, any rank."""
    ended = threading.Event()
    began = time.monotonic()

    def say() -> None:
        while not ended.wait(SAY_S):
            print(line(time.monotonic() - began), file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, name="waiting", daemon=True)
    if speaks:
        thread.start()
    try:
        yield
    finally:
        ended.set()


def _wait_for_all(store: dist.Store, world: int, timeout: timedelta, hosts: Sequence[str], place: str) -> None:
    began = said = time.monotonic()
    pause = 0.005
    while not store.check(["all"]):
        now = time.monotonic()
        if now - said > SAY_S:
            said = now
            logger.warning("waiting for %s at %s, for %.0f s", _absent(store, world, hosts), place, now - began)
        if now - began > timeout.total_seconds():
            raise NotJoined(
                f"{_absent(store, world, hosts)} did not connect to rank 0 at {place} within {timeout}; see their "
                "logs, and whether their hosts reach that address"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.25)


def _absent(store: dist.Store, world: int, hosts: Sequence[str]) -> str:
    absent = [rank for rank in range(world) if not store.check([_key(rank)])]
    names = list(dict.fromkeys(hosts[rank] for rank in absent)) if len(hosts) == world else []
    where = f" on {', '.join(names[:MAX_NAMED])}" if names else ""
    more = f" and {len(absent) - MAX_NAMED} others" if len(absent) > MAX_NAMED else ""
    ranks = ", ".join(map(str, absent[:MAX_NAMED])) if more else listed(absent or ["none"]).replace(" or ", " and ")
    return f"{len(absent)} of {world} ranks ({ranks}{more}{where})"


def _key(rank: int) -> str:
    return f"host/{rank}"
