"""The protocol between ranks and the supervisor: frames over TCP, after a mutual authentication by the job's token.

A frame is a kind (1 byte), a length (4 bytes, big-endian) and a payload: JSON, UTF-8 text or the fields of a beat.
Nothing is ever unpickled or evaluated. The handshake: the server sends a nonce; the rank answers with its own nonce,
its description and HMAC-SHA256(token, nonces + description); the server proves its knowledge of the token likewise.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

HEADER = struct.Struct("!BI")
MAX_FRAME = 1 << 20
NONCE_BYTES = 16
TOKEN_BYTES = 32
_BEAT = struct.Struct("!IBB")  # completed steps, phase, waits; a text of what the rank is doing follows
DOING_BYTES = 120


class Kind(IntEnum):
    """The kind of a frame. The first three belong to the handshake."""

    NONCE = 1  # server: its nonce
    HELLO = 2  # rank: nonce, MAC, JSON
    WELCOME = 3  # server: MAC
    BEAT = 4  # rank: its progress
    TELL = 5  # rank: a report, JSON
    STACKS = 6  # rank: stack traces of its threads, text
    GOODBYE = 7  # rank: clean exit
    ASK = 8  # server: JSON {"do": "stacks" | "save" | "end" | "leave" | "join", ...}


_KINDS = frozenset(Kind)


class Phase(IntEnum):
    """The phase of a run in which a rank is."""

    STARTING = 0
    LOADING = 1
    TRAINING = 2
    EVALUATING = 3
    SAVING = 4
    ENDING = 5
    # These two alternate from block to block of benchmarks, because a change of phase is progress.
    TASKS = 6
    MORE_TASKS = 7


_PHASES = tuple(Phase)


class Beat(NamedTuple):
    """The progress of a rank."""

    step: int  # completed steps
    phase: Phase
    waits: bool  # whether it waits for other ranks, as far as it knows
    doing: str  # description, as in "forward of micro-batch 3"


class ProtocolError(Exception):
    """The peer violates the protocol, or does not know the token."""


def frame(kind: Kind, payload: bytes = b"") -> bytes:
    """Return a frame's bytes."""
    if len(payload) > MAX_FRAME:
        payload = payload[:MAX_FRAME]
    return HEADER.pack(kind, len(payload)) + payload


def frames(buffer: bytearray) -> Iterator[tuple[Kind, bytes]]:
    """Remove complete frames from the front of `buffer` and yield them.

    Raises:
        ProtocolError: a frame has an unknown kind or is too long.
    """
    while len(buffer) >= HEADER.size:
        number, length = HEADER.unpack_from(buffer)
        if length > MAX_FRAME or number not in _KINDS:
            raise ProtocolError(f"a frame of kind {number} and {length} bytes")
        end = HEADER.size + length
        if len(buffer) < end:
            return
        payload = bytes(buffer[HEADER.size : end])
        del buffer[:end]
        yield Kind(number), payload


def as_json(value: Any) -> bytes:
    """Encode a value as JSON."""
    return json.dumps(value).encode()


def from_json(payload: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        ProtocolError: the payload is not a JSON object.
    """
    try:
        value = json.loads(payload)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ProtocolError("a frame without a JSON object")
    return value


def pack_beat(beat: Beat) -> bytes:
    """Encode a beat."""
    return _BEAT.pack(beat.step, beat.phase, beat.waits) + beat.doing.encode()[:DOING_BYTES]


def unpack_beat(payload: bytes) -> Beat:
    """Decode a beat.

    Raises:
        ProtocolError: the payload is malformed.
    """
    if not _BEAT.size <= len(payload) <= _BEAT.size + DOING_BYTES:
        raise ProtocolError(f"a beat of {len(payload)} bytes")
    step, phase, waits = _BEAT.unpack_from(payload)
    if phase >= len(_PHASES):
        raise ProtocolError(f"phase {phase}")
    return Beat(step, _PHASES[phase], waits > 0, payload[_BEAT.size :].decode(errors="replace"))


def new_nonce() -> bytes:
    """Return a random nonce."""
    return secrets.token_bytes(NONCE_BYTES)


def hello(token: bytes, server_nonce: bytes, own_nonce: bytes, about: dict[str, Any]) -> bytes:
    """Return the payload of a rank's HELLO."""
    text = as_json(about)
    return own_nonce + _mac(token, b"rank", server_nonce, own_nonce, text) + text


def read_hello(token: bytes, server_nonce: bytes, payload: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return the nonce and the description in a HELLO.

    Raises:
        ProtocolError: the sender does not know the token.
    """
    nonce, mac = payload[:NONCE_BYTES], payload[NONCE_BYTES : NONCE_BYTES + 32]
    text = payload[NONCE_BYTES + 32 :]
    if not hmac.compare_digest(mac, _mac(token, b"rank", server_nonce, nonce, text)):
        raise ProtocolError("a hello without the job's token")
    return nonce, from_json(text)


def welcome(token: bytes, server_nonce: bytes, rank_nonce: bytes) -> bytes:
    """Return the payload of the server's WELCOME."""
    return _mac(token, b"server", server_nonce, rank_nonce)


def is_welcome(token: bytes, server_nonce: bytes, rank_nonce: bytes, payload: bytes) -> bool:
    """Return whether the sender of a WELCOME knows the token."""
    return hmac.compare_digest(payload, welcome(token, server_nonce, rank_nonce))


def _mac(token: bytes, *parts: bytes) -> bytes:
    digest = hmac.new(token, digestmod=hashlib.sha256)
    for part in parts:
        digest.update(struct.pack("!I", len(part)) + part)
    return digest.digest()
