"""Measures the offset of this rank's monotonic clock from rank 0's.

One rank per clock requests rank 0's time and shares the offset with the other ranks of that clock. Processes share a
clock if they have the same kernel and time namespace. The reply is stamped between request and receipt, so the error is
at most half the round trip; the fastest of many round trips counts (Cristian 1989).
"""

from __future__ import annotations

import os
import socket
import struct
import time
from contextlib import suppress
from typing import NamedTuple

from llama_ds.log import logger
from llama_ds.parallel import world

REQUESTS = 64
TIMEOUT_S = 20.0
BACKLOG = 4096  # pending connections, one per host
_TIME = struct.Struct("<q")


class Offset(NamedTuple):
    """Offset to add to this rank's clock at time `at` to get rank 0's clock; all in microseconds."""

    at: float
    offset: float
    error: float  # upper bound


def compare(rank: int) -> Offset | None:
    """Compare clocks with rank 0; return None if its host was unreachable. Collective."""
    listener = _listener() if rank == 0 else None
    try:
        gathered = world.gather((_identity(), listener.getsockname()[1] if listener else 0))
        identities = [identity for identity, _ in gathered]
        askers = sorted(set(map(identities.index, identities)) - {0})  # first rank of every other clock
        found: Offset | None = None
        if identities[rank] == identities[0]:
            found = Offset(time.monotonic_ns() / 1e3, 0.0, 0.0)
        if listener and askers:
            _answer(listener, len(askers))
        elif rank in askers:
            found = _ask(gathered[0][1])
    finally:
        if listener:
            listener.close()
    if not askers:
        return found
    offsets = world.gather(found)
    found = offsets[identities.index(identities[rank])]
    if rank == 0 and (lost := [asker for asker in askers if offsets[asker] is None]):
        logger.warning("clocks: rank %d and others could not reach rank 0; their times are not aligned", lost[0])
    return found


def _identity() -> str:
    """Return a string that two processes share exactly if they share a monotonic clock."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/time')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _listener() -> socket.socket | None:
    with suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
        return socket.create_server(("", 0), backlog=BACKLOG)
    return None


def _answer(listener: socket.socket, askers: int) -> None:
    """Serve one asker at a time: concurrent requests would slow each other down."""
    listener.settimeout(TIMEOUT_S)
    with suppress(OSError):
        for _ in range(askers):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(TIMEOUT_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while connection.recv(1):
                    connection.sendall(_TIME.pack(time.monotonic_ns()))


def _ask(port: int) -> Offset | None:
    try:
        with socket.create_connection((os.environ["MASTER_ADDR"], port), TIMEOUT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return min((_request(connection) for _ in range(REQUESTS)), key=lambda offset: offset.error)
    except (OSError, struct.error):
        return None


def _request(connection: socket.socket) -> Offset:
    sent = time.monotonic_ns()
    connection.sendall(b"?")
    answer = _TIME.unpack(connection.recv(_TIME.size, socket.MSG_WAITALL))[0]
    received = time.monotonic_ns()
    middle = (sent + received) / 2
    return Offset(middle / 1e3, (answer - middle) / 1e3, (received - sent) / 2e3)
