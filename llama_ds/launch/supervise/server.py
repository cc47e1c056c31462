"""The supervisor's server: one connection per rank, polled by a single thread, so that it scales to thousands."""

from __future__ import annotations

import select
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_ds.errors import UserError
from llama_ds.job.wire import (
    Beat,
    Kind,
    Phase,
    ProtocolError,
    as_json,
    frame,
    frames,
    from_json,
    new_nonce,
    read_hello,
    unpack_beat,
    welcome,
)

HANDSHAKE_S = 10.0  # timeout for an unauthenticated connection
MAX_UNAUTHENTICATED = 4096  # limit on unauthenticated connections


@dataclass
class Member:
    """The supervisor's view of a rank."""

    rank: int
    host: str  # its name in the hostfile
    about: dict[str, Any]  # the description in its HELLO: rank, host, pid
    beat: Beat = field(default_factory=lambda: Beat(0, Phase.STARTING, False, ""))
    connected: bool = True
    left: bool = False  # whether it has sent GOODBYE
    failed: bool = False  # whether it has reported a failure, its own or an echo of another rank's
    waits: bool = False  # whether it then waits to be asked to leave the attempt, because another rank has failed
    stacks: str | None = None
    disconnected_at: float | None = None  # time at which its connection ended
    checked_at: float = 0.0  # time of the last check of its host because of missing heartbeats


class _Connection:
    """A connection with its handshake and receive buffer."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.nonce = new_nonce()
        self.buffer = bytearray()
        self.since = time.monotonic()
        self.rank: int | None = None  # None until authenticated


class Server:
    """Serves the ranks of one attempt at a time; connections without the attempt's token are closed."""

    def __init__(self, address: str, port: int = 0) -> None:
        """Listen on `address` only.

        Raises:
            UserError: this machine does not have the address, or the port is in use.
        """
        try:
            self._listening = socket.create_server((address, port), backlog=4096)
        except OSError as error:
            raise UserError(
                f"--listen {address}:{port}: cannot listen there ({error.strerror}); give an address of this machine "
                "that the hosts reach, and a free port or none"
            ) from None
        self._listening.setblocking(False)
        self.address: tuple[str, int] = self._listening.getsockname()[:2]
        self._epoll = select.epoll()
        self._epoll.register(self._listening, select.EPOLLIN)
        self._connections: dict[int, _Connection] = {}  # by file descriptor
        self._unauthenticated = 0
        self._token = b""
        self._world = 0
        self._ending = False
        self.members: dict[int, Member] = {}
        self.last_beat = np.zeros(0)  # by rank; monotonic seconds, 0 before the first heartbeat
        self.reports: list[tuple[Member, dict[str, Any]]] = []  # in order of arrival
        self.disconnected: list[Member] = []  # ranks whose connection ended without a goodbye, in order

    def expect(self, token: bytes, world: int) -> None:
        """Begin an attempt: discard the ranks of the previous one, and accept only connections with its token."""
        for fd in list(self._connections):
            self._drop(fd, ended=False)
        self._token, self._world, self._ending = token, world, False
        self.members, self.reports, self.disconnected = {}, [], []
        self.last_beat = np.zeros(world)

    def dismiss(self) -> None:
        """Reject all ranks: surviving ranks cannot reconnect, and terminate themselves."""
        self.expect(b"", 0)

    def poll(self) -> None:
        """Process all pending data without blocking."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._listening.fileno():
                self._accept()
            elif fd in self._connections:
                self._read(fd)
        if self._unauthenticated:
            late = time.monotonic() - HANDSHAKE_S
            for fd in [n for n, one in self._connections.items() if one.rank is None and one.since < late]:
                self._drop(fd)

    def ask(self, what: str, ranks: list[int] | None = None) -> None:
        """Ask ranks (None: all) for their "stacks", to "save", or to save and "end".

        Ranks that connect later are asked to end, too: a connection may break at any moment.
        """
        self._ending = self._ending or what == "end"
        data = frame(Kind.ASK, as_json({"do": what}))
        for fd, one in list(self._connections.items()):
            if one.rank is not None and (ranks is None or one.rank in ranks):
                try:
                    one.connection.send(data)  # a few bytes: only a hanging rank's buffer has no space for them
                except OSError:
                    self._drop(fd)

    def detach(self, rank: int) -> socket.socket | None:
        """Return a rank's connection, of which this server knows no more; None if it is lost."""
        fd = next((fd for fd, one in self._connections.items() if one.rank == rank), None)
        if fd is None:
            return None
        self._epoll.unregister(fd)
        return self._connections.pop(fd).connection

    def close(self) -> None:
        """Close all connections and stop listening."""
        for fd in list(self._connections):
            self._drop(fd, ended=False)
        self._epoll.close()
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            if self._unauthenticated >= MAX_UNAUTHENTICATED:
                connection.close()
                continue
            connection.setblocking(False)
            new = _Connection(connection)
            self._connections[connection.fileno()] = new
            self._unauthenticated += 1
            self._epoll.register(connection, select.EPOLLIN)
            self._send(new, frame(Kind.NONCE, new.nonce))

    def _read(self, fd: int) -> None:
        one = self._connections[fd]
        try:
            chunk = one.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        one.buffer += chunk
        try:
            for kind, payload in frames(one.buffer):
                if one.rank is None:
                    self._authenticate(one, kind, payload)
                else:
                    self._handle(self.members[one.rank], kind, payload)
            if one.rank is None and len(one.buffer) > 4096:
                raise ProtocolError("too much data before the handshake")
        except ProtocolError:
            chunk = b""
        if not chunk:
            self._drop(fd)

    def _authenticate(self, one: _Connection, kind: Kind, payload: bytes) -> None:
        if kind is not Kind.HELLO or not self._token:
            raise ProtocolError(f"{kind.name} before HELLO")
        nonce, about = read_hello(self._token, one.nonce, payload)
        rank, host = about.get("rank"), about.get("host")
        if not isinstance(rank, int) or not 0 <= rank < self._world or not isinstance(host, str):
            raise ProtocolError(f"rank {rank}")
        for fd in [n for n, other in self._connections.items() if other.rank == rank]:
            self._drop(fd, ended=False)  # the rank has reconnected
        one.rank = rank
        self._unauthenticated -= 1
        known = self.members.setdefault(rank, Member(rank, host, about))
        known.about, known.connected, known.disconnected_at = about, True, None
        self.last_beat[rank] = time.monotonic()
        self._send(one, frame(Kind.WELCOME, welcome(self._token, one.nonce, nonce)))
        if self._ending:
            self._send(one, frame(Kind.ASK, as_json({"do": "end"})))

    def _handle(self, member: Member, kind: Kind, payload: bytes) -> None:
        if kind is Kind.BEAT:
            member.beat = unpack_beat(payload)
            self.last_beat[member.rank] = time.monotonic()
        elif kind is Kind.TELL:
            values = from_json(payload)
            if values.get("what") == "failure":
                member.failed, member.waits = True, values.get("waits") is True
            self.reports.append((member, values))
        elif kind is Kind.STACKS:
            member.stacks = payload.decode(errors="replace")
        elif kind is Kind.GOODBYE:
            member.left = True
        else:
            raise ProtocolError(f"{kind.name} from a rank")

    def _send(self, one: _Connection, data: bytes) -> None:
        with suppress(OSError):
            one.connection.send(data)

    def _drop(self, fd: int, ended: bool = True) -> None:
        one = self._connections.pop(fd)
        with suppress(OSError):
            self._epoll.unregister(fd)
        one.connection.close()
        if one.rank is None:
            self._unauthenticated -= 1
            return
        member = self.members.get(one.rank)
        if ended and member and member.connected:
            member.connected, member.disconnected_at = False, time.monotonic()
            if not member.left:
                self.disconnected.append(member)
