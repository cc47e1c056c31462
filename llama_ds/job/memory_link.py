"""Transfers of states between the memories of hosts (`memory_slots`): a server on every rank, and its client.

Both ends prove that they know the job's token by the handshake of `wire`. The HELLO carries the request:

    {"do": "put", "rank": 3, "header": {...}}   the payload follows; the answer is a TELL once it is stored
    {"do": "get", "rank": 3, "step": 100}       the answer is a TELL with the header, then the payload
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any

from llama_ds.job.memory_slots import MemorySlot, oldest
from llama_ds.job.wire import (
    HEADER,
    MAX_FRAME,
    Kind,
    ProtocolError,
    as_json,
    frame,
    from_json,
    hello,
    is_welcome,
    new_nonce,
    read_hello,
    welcome,
)

CHUNK_BYTES = 4 << 20
CONNECT_S = 10.0
TIMEOUT_S = 60.0  # without any progress of a transfer

Address = tuple[str, int]


class MemoryServer:
    """Serves the states in this rank's memory, and stores the copies that it keeps for others."""

    def __init__(self, host: str, token: bytes) -> None:
        """Listen on an address of this host, on any free port."""
        self._token = token
        self._kept: dict[int, list[MemorySlot]] = {}
        self._offered: dict[tuple[int, int], MemorySlot] = {}
        self._listening = socket.create_server((host, 0), backlog=64)
        self.address: Address = self._listening.getsockname()[:2]
        threading.Thread(target=self._serve, name="memory server", daemon=True).start()

    def offer(self, found: Mapping[tuple[int, int], MemorySlot]) -> None:
        """Offer states, by rank and step, to ranks that ask for them."""
        self._offered = dict(found)

    def keep(self, slots: Mapping[int, list[MemorySlot]]) -> None:
        """Store copies of the ranks in `slots` from now on."""
        self._kept = dict(slots)

    def close(self) -> None:
        """Stop listening; transfers under way end by themselves."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), name="memory transfer", daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with closing(connection), suppress(OSError, ProtocolError, LookupError, TypeError, ValueError):
            connection.settimeout(TIMEOUT_S)
            nonce = new_nonce()
            connection.sendall(frame(Kind.NONCE, nonce))
            theirs, request = read_hello(self._token, nonce, _receive(connection, Kind.HELLO))
            connection.sendall(frame(Kind.WELCOME, welcome(self._token, nonce, theirs)))
            if request["do"] == "put":
                self._store(connection, int(request["rank"]), request["header"])
            else:
                slot = self._offered[int(request["rank"]), int(request["step"])]
                connection.sendall(frame(Kind.TELL, as_json({"header": slot.header})))
                _send_all(connection, slot.payload)

    def _store(self, connection: socket.socket, rank: int, header: dict[str, Any]) -> None:
        slot = oldest(self._kept[rank])
        slot.clear()
        _receive_into(connection, slot.payload)
        if slot.checksum() != header["checksum"]:
            connection.sendall(frame(Kind.TELL, as_json({"problem": "its bytes arrived with another checksum"})))
            return
        slot.complete(header)
        connection.sendall(frame(Kind.TELL, as_json({})))


def put(address: Address, token: bytes, rank: int, slot: MemorySlot, mib_per_s: float = 0.0) -> None:
    """Send the state in `slot` to the host that keeps a copy, at most so many MiB/s (0: no limit).

    Raises:
        OSError: the transfer failed.
    """
    with closing(_connect(address, token, {"do": "put", "rank": rank, "header": slot.header})) as connection:
        _send_all(connection, slot.payload, mib_per_s)
        answer = _told(connection)
        if "problem" in answer:
            raise OSError(answer["problem"])


def get(address: Address, token: bytes, rank: int, step: int, slot: MemorySlot) -> None:
    """Receive the state of a rank into `slot`, which has its size.

    Raises:
        OSError: the transfer failed, or the bytes do not have their checksum.
    """
    slot.clear()
    with closing(_connect(address, token, {"do": "get", "rank": rank, "step": step})) as connection:
        header = _told(connection).get("header")
        if not isinstance(header, dict):
            raise OSError("no state was sent")
        _receive_into(connection, slot.payload)
    if slot.checksum() != header.get("checksum"):
        raise OSError("its bytes arrived with another checksum")
    slot.complete(header)


def _send_all(connection: socket.socket, payload: memoryview, mib_per_s: float = 0.0) -> None:
    """Send bytes in chunks, each of which may take `TIMEOUT_S`."""
    begin = time.monotonic()
    for at in range(0, len(payload), CHUNK_BYTES):
        connection.sendall(payload[at : at + CHUNK_BYTES])
        if mib_per_s:
            time.sleep(max(0.0, begin + (at + CHUNK_BYTES) / 2**20 / mib_per_s - time.monotonic()))


def _connect(address: Address, token: bytes, request: dict[str, Any]) -> socket.socket:
    connection = socket.create_connection(address, CONNECT_S)
    connection.settimeout(TIMEOUT_S)
    try:
        theirs, own = _receive(connection, Kind.NONCE), new_nonce()
        connection.sendall(frame(Kind.HELLO, hello(token, theirs, own, request)))
        if not is_welcome(token, theirs, own, _receive(connection, Kind.WELCOME)):
            raise ProtocolError("the server does not know the job's token")
    except ProtocolError as error:
        connection.close()
        raise OSError(str(error)) from None
    except OSError:
        connection.close()
        raise
    return connection


def _told(connection: socket.socket) -> dict[str, Any]:
    try:
        return from_json(_receive(connection, Kind.TELL))
    except ProtocolError as error:
        raise OSError(str(error)) from None


def _receive(connection: socket.socket, wanted: Kind) -> bytes:
    """Return the payload of the next frame. Reads no further, because raw bytes may follow."""
    head = bytearray(HEADER.size)
    _receive_into(connection, memoryview(head))
    kind, length = HEADER.unpack(head)
    if kind != wanted or length > MAX_FRAME:
        raise ProtocolError(f"a frame of kind {kind} and {length} bytes instead of {wanted.name}")
    payload = bytearray(length)
    _receive_into(connection, memoryview(payload))
    return bytes(payload)


def _receive_into(connection: socket.socket, target: memoryview) -> None:
    at = 0
    while at < len(target):
        count = connection.recv_into(target[at : at + CHUNK_BYTES])
        if not count:
            raise ConnectionError("the connection ended early")
        at += count
