"""How far this rank's monotonic clock is from rank 0's, by asking rank 0 for the time.

One rank of each clock asks; the others that share it are told. Two processes share one where kernel and time namespace
are the same. An answer was given between question and receipt, so the offset is known to half of that time; of many
questions the fastest is believed (Cristian 1989).
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

QUESTIONS = 64
TIMEOUT_S = 20.0
BACKLOG = 4096  # hosts
_TIME = struct.Struct("<q")


class Offset(NamedTuple):
    """What to add to this rank's clock at the moment `at` to have rank 0's; all in microseconds."""

    at: float
    offset: float
    error: float  # the greatest that is possible


def compare(rank: int) -> Offset | None:
    """Compare clocks with rank 0; None where its host could not be reached. Collective."""
    listener = _listener() if rank == 0 else None
    try:
        seen = world.gather((_identity(), listener.getsockname()[1] if listener else 0))
        identities = [identity for identity, _ in seen]
        askers = sorted(set(map(identities.index, identities)) - {0})  # the first rank of every other clock
        found: Offset | None = None
        if identities[rank] == identities[0]:
            found = Offset(time.monotonic_ns() / 1e3, 0.0, 0.0)
        if listener and askers:
            _answer(listener, len(askers))
        elif rank in askers:
            found = _ask(seen[0][1])
    finally:
        if listener:
            listener.close()
    if not askers:
        return found
    everyone = world.gather(found)
    found = everyone[identities.index(identities[rank])]
    if rank == 0 and (lost := [asker for asker in askers if everyone[asker] is None]):
        logger.warning("clocks: rank %d and others could not reach rank 0; their times are not aligned", lost[0])
    return found


def _identity() -> str:
    """Return what is the same for processes with one monotonic clock, and for no others."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/time')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _listener() -> socket.socket | None:
    with suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
        return socket.create_server(("", 0), backlog=BACKLOG)
    return None


def _answer(listener: socket.socket, askers: int) -> None:
    """Tell the time to one asker after the other: two at once would slow each other down."""
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
            return min((_question(connection) for _ in range(QUESTIONS)), key=lambda offset: offset.error)
    except (OSError, struct.error):
        return None


def _question(connection: socket.socket) -> Offset:
    asked = time.monotonic_ns()
    connection.sendall(b"?")
    told = _TIME.unpack(connection.recv(_TIME.size, socket.MSG_WAITALL))[0]
    heard = time.monotonic_ns()
    middle = (asked + heard) / 2
    return Offset(middle / 1e3, (told - middle) / 1e3, (heard - asked) / 2e3)
