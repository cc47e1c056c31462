"""A remote file as a seekable file object, which retries failed reads from the byte where they stopped."""

from __future__ import annotations

import io
import math
import urllib.parse
from collections.abc import Generator
from contextlib import closing
from typing import Any

from llama_ds.data.source.remote import CorruptDownload, Fault, FileStatus, RetryPolicy, list_files, open_transport
from llama_ds.data.source.store import DEFAULT_POLICY, BadFile, Tries
from llama_ds.errors import UserError

BUFFER = 1 << 20  # bytes of a buffered reader


def find_remote(url: str, policy: RetryPolicy = DEFAULT_POLICY) -> list[FileStatus]:
    """Return the files at a URL, below it if it is a folder, or that match it if it is a glob, sorted by URL.

    Raises:
        UserError: the URL cannot be used or listed, or names no file.
    """
    tries = Tries(url, policy)
    while True:
        try:
            return list_files(url)
        except Fault as fault:
            try:
                tries.wait(fault)
            except BadFile as error:
                raise UserError(f"{error}; check the URL and the access to it") from None


def open_remote(status: FileStatus, policy: RetryPolicy = DEFAULT_POLICY) -> io.BufferedReader:
    """Open a remote file for reading; nothing is requested before the first read."""
    return io.BufferedReader(_RemoteFile(status, policy), BUFFER)


class _RemoteFile(io.RawIOBase):
    """Reads a remote file in order; a seek to another position makes a new request.

    Raises:
        UserError: from `read`, if the file cannot be read within the policy, or no longer has its size.
    """

    def __init__(self, status: FileStatus, policy: RetryPolicy) -> None:
        folder, _, name = status.url.rpartition("/")
        self._status, self._policy = status, policy
        self._transport = open_transport(folder)
        self._name = urllib.parse.unquote(name) if folder.startswith("http") else name
        self._at = 0  # position of the next byte to return
        self._chunks: Generator[tuple[int, bytes], None, None] | None = None
        self._rest = memoryview(b"")  # bytes from `_at` on that have arrived
        self._tries: Tries | None = None  # failed tries since the last byte

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._status.size}[whence]
        if start + offset != self._at:
            self._end_request()
            self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        while not self._rest and self._at < self._status.size:
            try:
                self._receive()
                self._tries = None
            except Fault as fault:
                self._end_request()
                self._retry(fault)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest, self._at = self._rest[size:], self._at + size
        return size

    def close(self) -> None:
        self._end_request()
        super().close()

    def _receive(self) -> None:
        """Wait for the next bytes. Raises Fault."""
        if self._chunks is None:
            self._chunks = self._transport.chunks(self._name, self._at, self._policy.stall_s, math.inf)
        for offset, chunk in self._chunks:
            if offset + len(chunk) > self._status.size:
                raise CorruptDownload(f"more than its {self._status.size} bytes", "long", self._status.size)
            if offset + len(chunk) > self._at:  # a server that cannot resume begins with the first byte
                self._rest = memoryview(chunk)[max(0, self._at - offset) :]
                return
        raise CorruptDownload(f"{self._at} bytes, not {self._status.size}", f"short {self._at}", self._at)

    def _retry(self, fault: Fault) -> None:
        self._tries = self._tries or Tries(self._status.url, self._policy)
        try:
            self._tries.wait(fault)
        except BadFile as error:
            raise UserError(f"{error}; check the access to the file, and build again to resume") from None

    def _end_request(self) -> None:
        if self._chunks is not None:
            with closing(self._chunks):
                self._chunks = None
        self._rest = memoryview(b"")
