"""Files in a host's memory (tmpfs) that outlive the ranks: the newest state of each rank, and copies of other hosts'.

MEMORY/llama_ds_UID_HASH/        one run of one user; HASH is that of the run's folder
    node1/                       one host: its name, because containers may share their memory
        rank_00003.a  .b  .c     three states of a rank, written in turn

A file is a header of `HEADER_BYTES` with a JSON object, then the payload. The header is cleared before the payload
changes and written after it, with the payload's checksum. No file is synced: it is lost with the host.

Why three: while a rank writes step k + 1, another one's copy of step k may still be on its way. If that one's host is
lost, every rank needs step k - 1.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

HEADER_BYTES = 1 << 18
HASH_BYTES = 1 << 20  # small enough that a chunk is still in the CPU cache
_LENGTH = struct.Struct("!I")
STATES = "abc"  # suffixes of a rank's files
_NAME = re.compile(rf"rank_(\d{{5,}})\.[{STATES}]")


class MemorySlot:
    """One file: a rank's state of one step, or none while it is being written."""

    def __init__(self, path: Path, nbytes: int | None = None) -> None:
        """Map a file; with `nbytes`, the size of its payload, create it or change its size.

        Raises:
            OSError: there is no such file, or the memory is full.
        """
        self.path = path
        file = os.open(path, os.O_RDWR | (os.O_CREAT if nbytes is not None else 0), 0o600)
        try:
            if nbytes is not None and os.fstat(file).st_size != HEADER_BYTES + nbytes:
                os.ftruncate(file, 0)
                os.posix_fallocate(file, 0, HEADER_BYTES + nbytes)  # a full tmpfs would end a later write by SIGBUS
            self._map = mmap.mmap(file, 0)
        finally:
            os.close(file)

    @property
    def payload(self) -> memoryview:
        """The payload, writable."""
        return memoryview(self._map)[HEADER_BYTES:]

    @property
    def header(self) -> dict[str, Any] | None:
        """The header; None while the payload is not whole."""
        (length,) = _LENGTH.unpack_from(self._map)
        if not 0 < length <= HEADER_BYTES - _LENGTH.size:
            return None
        with suppress(ValueError):
            found = json.loads(self._map[_LENGTH.size : _LENGTH.size + length])
            return found if isinstance(found, dict) else None
        return None

    @property
    def step(self) -> int:
        """The step of the state, -1 without one."""
        header = self.header
        return -1 if header is None else int(header["step"])

    def clear(self) -> None:
        """Declare that the payload is going to change."""
        self._map[: _LENGTH.size] = _LENGTH.pack(0)

    def complete(self, header: dict[str, Any]) -> None:
        """Declare that the payload is whole: write the header, which has its step and checksum.

        Raises:
            ValueError: the header is too large.
        """
        text = json.dumps(header).encode()
        if len(text) > HEADER_BYTES - _LENGTH.size:
            raise ValueError(f"{self.path}: a header of {len(text)} bytes; at most {HEADER_BYTES - _LENGTH.size} fit")
        self._map[_LENGTH.size : _LENGTH.size + len(text)] = text
        self._map[: _LENGTH.size] = _LENGTH.pack(len(text))

    def checksum(self) -> str:
        """Return the 128-bit XXH3 of the payload."""
        digest, payload = xxhash.xxh3_128(), self.payload
        for begin in range(0, len(payload), HASH_BYTES):
            digest.update(payload[begin : begin + HASH_BYTES])
        return digest.hexdigest()

    @property
    def is_intact(self) -> bool:
        """Whether the payload is whole and has the checksum of the header."""
        header = self.header
        return header is not None and header.get("checksum") == self.checksum()


def run_folder(memory: str, run_dir: str) -> Path:
    """Return the folder of a run within the file system `memory`."""
    digest = hashlib.sha256(os.path.realpath(run_dir).encode()).hexdigest()[:16]
    return Path(memory, f"llama_ds_{os.getuid()}_{digest}")


def open_slots(folder: Path, rank: int, nbytes: int) -> list[MemorySlot]:
    """Create or open the files of a rank, with payloads of `nbytes`. Raises OSError."""
    return [MemorySlot(folder / f"rank_{rank:05d}.{suffix}", nbytes) for suffix in STATES]


def oldest(slots: Iterable[MemorySlot]) -> MemorySlot:
    """Return the file that is to be overwritten next."""
    return min(slots, key=lambda slot: slot.step)


def whole_slots(folder: Path) -> Iterator[tuple[int, MemorySlot]]:
    """Yield the files of a host that hold a state, with the rank that it is of, in order."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:
        if match := _NAME.fullmatch(name):
            with suppress(OSError, ValueError):  # empty or being created
                slot = MemorySlot(folder / name)
                if slot.header is not None:
                    yield int(match[1]), slot


def reserved_bytes(folder: Path) -> int:
    """Return the bytes of all files of ranks, also of those without a state: their memory is taken."""
    return sum((folder / name).stat().st_size for name in os.listdir(folder) if _NAME.fullmatch(name))


def remove_others(folder: Path, ranks: set[int]) -> None:
    """Delete the files of ranks that are not in `ranks`."""
    for name in os.listdir(folder):
        match = _NAME.fullmatch(name)
        if match and int(match[1]) not in ranks:
            with suppress(OSError):
                os.unlink(folder / name)


def remove(folder: Path) -> None:
    """Delete a host's folder, and the run's if it is the last."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()
