"""The supervisor's ear: one connection for each rank, read in turns: thousands of ranks cost next to nothing."""

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

HANDSHAKE_S = 10.0  # that a stranger may take
MAX_STRANGERS = 4096  # connections that have not shown the token yet


@dataclass
class Member:
    """A rank as the supervisor knows it."""

    rank: int
    host: str  # as in the hostfile
    about: dict[str, Any]
    beat: Beat = field(default_factory=lambda: Beat(0, Phase.STARTING, False, ""))
    connected: bool = True
    left: bool = False  # said goodbye
    failed: bool = False  # told that it has, itself or because of another
    stacks: str | None = None
    gone_at: float | None = None  # when its connection ended
    told_silent_at: float = 0.0  # when its host was last looked at for want of beats


class _Line:
    """A connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.nonce = new_nonce()
        self.buffer = bytearray()
        self.since = time.monotonic()
        self.rank: int | None = None


class Server:
    """Listens to the ranks of one attempt at a time; who does not know its token is not heard."""

    def __init__(self, address: str, port: int = 0) -> None:
        """Listen on `address` only.

        Raises:
            UserError: it is not an address of this machine, or the port is taken.
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
        self._poll = select.epoll()
        self._poll.register(self._listening, select.EPOLLIN)
        self._lines: dict[int, _Line] = {}
        self._strangers = 0
        self._token = b""
        self._world = 0
        self.members: dict[int, Member] = {}
        self.last_beat = np.zeros(0)  # by rank; monotonic seconds, 0 before the first
        self.news: list[tuple[Member, dict[str, Any]]] = []  # what ranks told, in the order in which it came
        self.ends: list[Member] = []  # whose connection ended without a goodbye, in order

    def expect(self, token: bytes, world: int) -> None:
        """Begin an attempt: forget the ranks of the one before, and what they knew."""
        for number in list(self._lines):
            self._drop(number, ended=False)
        self._token, self._world = token, world
        self.members, self.news, self.ends = {}, [], []
        self.last_beat = np.zeros(world)

    def dismiss(self) -> None:
        """Hear nobody any more: ranks that are left somewhere find that nobody waits for them, and end themselves."""
        self.expect(b"", 0)

    def hear(self) -> None:
        """Take in all that has come. Does not wait."""
        for number, _ in self._poll.poll(0):
            if number == self._listening.fileno():
                self._accept()
            elif number in self._lines:
                self._read(number)
        if self._strangers:
            late = time.monotonic() - HANDSHAKE_S
            for number in [n for n, line in self._lines.items() if line.rank is None and line.since < late]:
                self._drop(number)

    def ask(self, what: str, ranks: list[int] | None = None) -> None:
        """Ask ranks, or all, for their "stacks", to "save", or to save and "end"."""
        data = frame(Kind.ASK, as_json({"do": what}))
        for number, line in list(self._lines.items()):
            if line.rank is not None and (ranks is None or line.rank in ranks):
                try:
                    line.connection.send(data)  # a few bytes: a rank that takes them no more hangs
                except OSError:
                    self._drop(number)

    def close(self) -> None:
        """Listen no more."""
        for number in list(self._lines):
            self._drop(number, ended=False)
        self._poll.close()
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            if self._strangers >= MAX_STRANGERS:
                connection.close()
                continue
            connection.setblocking(False)
            line = _Line(connection)
            self._lines[connection.fileno()] = line
            self._strangers += 1
            self._poll.register(connection, select.EPOLLIN)
            self._say(line, frame(Kind.NONCE, line.nonce))

    def _read(self, number: int) -> None:
        line = self._lines[number]
        try:
            chunk = line.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        line.buffer += chunk
        try:
            for kind, payload in frames(line.buffer):
                if line.rank is None:
                    self._greet(line, kind, payload)
                else:
                    self._take(self.members[line.rank], kind, payload)
            if line.rank is None and len(line.buffer) > 4096:
                raise ProtocolError("a stranger that talks too much")
        except ProtocolError:
            chunk = b""
        if not chunk:
            self._drop(number)

    def _greet(self, line: _Line, kind: Kind, payload: bytes) -> None:
        if kind is not Kind.HELLO or not self._token:
            raise ProtocolError(f"{kind.name} before HELLO")
        nonce, about = read_hello(self._token, line.nonce, payload)
        rank, host = about.get("rank"), about.get("host")
        if not isinstance(rank, int) or not 0 <= rank < self._world or not isinstance(host, str):
            raise ProtocolError(f"rank {rank}")
        for number in [n for n, other in self._lines.items() if other.rank == rank]:
            self._drop(number, ended=False)  # it has come back on another connection
        line.rank = rank
        self._strangers -= 1
        known = self.members.setdefault(rank, Member(rank, host, about))
        known.about, known.connected, known.gone_at = about, True, None
        self.last_beat[rank] = time.monotonic()
        self._say(line, frame(Kind.WELCOME, welcome(self._token, line.nonce, nonce)))

    def _take(self, member: Member, kind: Kind, payload: bytes) -> None:
        if kind is Kind.BEAT:
            member.beat = unpack_beat(payload)
            self.last_beat[member.rank] = time.monotonic()
        elif kind is Kind.TELL:
            values = from_json(payload)
            member.failed = member.failed or values.get("what") == "failure"
            self.news.append((member, values))
        elif kind is Kind.STACKS:
            member.stacks = payload.decode(errors="replace")
        elif kind is Kind.GOODBYE:
            member.left = True
        else:
            raise ProtocolError(f"{kind.name} from a rank")

    def _say(self, line: _Line, data: bytes) -> None:
        with suppress(OSError):
            line.connection.send(data)

    def _drop(self, number: int, ended: bool = True) -> None:
        line = self._lines.pop(number)
        with suppress(OSError):
            self._poll.unregister(number)
        line.connection.close()
        if line.rank is None:
            self._strangers -= 1
            return
        member = self.members.get(line.rank)
        if ended and member and member.connected:
            member.connected, member.gone_at = False, time.monotonic()
            if not member.left:
                self.ends.append(member)
