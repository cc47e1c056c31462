"""Where the files of a data source come from: a folder, or a place that is fetched from into a cache on a local disk.

A file that arrives slowly, truncated or corrupted is requested again for as long as `RetryPolicy` says. A file that is
still not intact after that is a `BadFile`; the reader decides what to do without it.
"""

from __future__ import annotations

import os
import random
import re
import time
import urllib.parse
import urllib.request
from contextlib import closing
from typing import Protocol

from llama_ds.data.source.cache import Busy, Cache, Part, digest_of, key_of
from llama_ds.data.source.remote import Fault, Missing, RetryPolicy, Transport, Unsound, open_transport
from llama_ds.errors import UserError
from llama_ds.log import logger

PATIENCE = RetryPolicy()
LEAST_TRY_S = 1.0  # left for a try to begin: one that the deadline cuts short says nothing about the file
MISSING_TRIES = 3  # of a file that is not there: object stores may show a new one late


class BadFile(Exception):
    """A file that cannot be had sound: `reason` in words, `offset` of the damage in bytes where known."""

    def __init__(self, place: str, reason: str, offset: int | None = None) -> None:
        super().__init__(place, reason, offset)  # all three, so that it can be sent between processes
        self.place, self.reason, self.offset = place, reason, offset

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class Store(Protocol):
    """The files below one place. For many threads; may be used after a fork."""

    place: str  # folder or URL, for messages

    def read(self, name: str) -> bytes:
        """Return a small file whole. Raises BadFile."""

    def fetch(self, name: str, size: int, sha256: str) -> str:
        """Return the path of a local file of exactly that content. Raises BadFile.

        Open it at once: in a small cache a later fetch may evict it. If it is gone, fetch it again.
        """


def open_store(place: str, cache: Cache | None = None, patience: RetryPolicy = PATIENCE) -> Store:
    """Return the store of a folder, a URL or a `pipe:` command, without connecting.

    Raises:
        UserError: the kind of place is unknown, lacks its package, or needs a cache and there is none.
    """
    if place.startswith("file://"):
        return LocalStore(urllib.request.url2pathname(urllib.parse.urlsplit(place).path))
    if not re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*(://|::)", place):
        return LocalStore(place)
    transport = open_transport(place)
    if cache is None:
        raise UserError(
            f"{transport.place}: a remote source needs a cache; set data.cache_dir to a folder on a local disk and "
            "data.cache_gib to the GiB it may take there"
        )
    return RemoteStore(place, transport, cache, patience)


class LocalStore:
    """A folder. A shard is read once from end to end before its first use, which also brings it into memory."""

    def __init__(self, folder: str) -> None:
        self.place = folder

    def read(self, name: str) -> bytes:
        """Return a file whole. Raises BadFile."""
        path = os.path.join(self.place, name)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise BadFile(path, error.strerror or str(error)) from None

    def fetch(self, name: str, size: int, sha256: str) -> str:
        """Return the path of the file itself, once its size and checksum are right. Raises BadFile."""
        path = os.path.join(self.place, name)
        try:
            found = os.path.getsize(path)
            if found != size:
                raise BadFile(path, _wrong_size(found, size), min(found, size))
            _, digest = digest_of(path)
        except OSError as error:
            raise BadFile(path, error.strerror or str(error)) from None
        if digest != sha256:
            raise BadFile(path, _wrong_digest(digest, sha256))
        return path


class RemoteStore:
    """Files by a transport: small ones into memory, shards into the cache."""

    def __init__(self, place: str, transport: Transport, cache: Cache, patience: RetryPolicy) -> None:
        self.place, self.key_place = transport.place, place.rstrip("/")
        self.transport, self.cache, self.patience = transport, cache, patience

    def read(self, name: str) -> bytes:
        """Return a file whole. Raises BadFile."""
        tries = Tries(self.transport.where(name), self.patience)
        while True:
            try:
                with closing(self.transport.chunks(name, 0, self.patience.stall_s, tries.until)) as chunks:
                    return b"".join(chunk for _, chunk in chunks)
            except Fault as fault:
                tries.wait(fault)

    def fetch(self, name: str, size: int, sha256: str) -> str:
        """Return the path of the cached file, downloaded and checked unless it is there.

        Raises:
            BadFile: it cannot be had sound within the deadline.
            UserError: the cache is too small, or its disk full or broken.
        """
        key = key_of(self.key_place, name)
        if self.cache.hit(key, size, sha256):
            return self.cache.path_of(key)
        tries = Tries(self.transport.where(name), self.patience)
        try:
            with self.cache.lock(key, tries.until):
                if not self.cache.check(key, size, sha256):
                    with self.cache.part(key, size, tries.until) as part:
                        self._download(name, part, sha256, tries)
                        part.keep(sha256)
        except Busy as busy:
            raise BadFile(tries.place, f"waited {self.patience.deadline_s:g} s: {busy}") from None
        return self.cache.path_of(key)

    def _download(self, name: str, part: Part, sha256: str, tries: Tries) -> None:
        """Fill `part`, going on where a try ended early."""
        while True:
            try:
                self._pull(name, part, tries.until)
                digest = part.digest.hexdigest()
                if digest == sha256:
                    return
                raise Unsound(_wrong_digest(digest, sha256), digest)
            except Fault as fault:
                if isinstance(fault, Unsound):
                    part.restart()
                tries.wait(fault)

    def _pull(self, name: str, part: Part, until: float) -> None:
        """Write to `part` what one try brings, which must be all that it lacks."""
        if 0 < part.size == part.have:  # the try before failed after the last byte: its checksum tells
            return
        with closing(self.transport.chunks(name, part.have, self.patience.stall_s, until)) as chunks:
            for offset, chunk in chunks:
                if offset != part.have:  # the server cannot resume
                    part.restart()
                part.write(chunk[: part.size - part.have])
                if offset + len(chunk) > part.size:
                    raise Unsound(
                        f"more than the {part.size} bytes of the shard", f"long {part.digest.hexdigest()}", part.size
                    )
        if part.have < part.size:
            sign = f"{part.have} {part.digest.hexdigest()}"
            raise Unsound(_wrong_size(part.have, part.size), sign, part.have)


class Tries:
    """The tries at one file: how often, how long, and when it is enough."""

    def __init__(self, place: str, patience: RetryPolicy) -> None:
        self.place, self.patience = place, patience
        self.start = time.monotonic()
        self.until = self.start + patience.deadline_s
        self.least_s = min(LEAST_TRY_S, patience.deadline_s / 4)
        self.failed = self.missing = 0
        self.sign: str | None = None  # of the last answer that was whole but not the file

    def wait(self, fault: Fault) -> None:
        """Sleep before the next try.

        Raises:
            BadFile: no next try, because it would bring the same or the deadline would pass before it.
        """
        self.failed += 1
        self.missing += isinstance(fault, Missing)
        if isinstance(fault, Unsound):
            if fault.sign == self.sign:
                raise BadFile(self.place, f"{fault.reason}, twice the same: damaged where it is stored", fault.offset)
            self.sign = fault.sign
        pause = min(self.patience.longest_wait_s, self.patience.first_wait_s * 2.0 ** min(self.failed - 1, 60))
        pause *= random.uniform(0.5, 1.0)  # many hosts fail at once: they must not come back at once
        now = time.monotonic()
        if self.missing >= MISSING_TRIES or now + pause + self.least_s >= self.until:
            reason = f"{fault.reason} (gave up after {now - self.start:.1f} s, tries: {self.failed})"
            raise BadFile(self.place, reason, fault.offset)
        logger.warning("%s: try %d failed: %s; next in %.1f s", self.place, self.failed, fault.reason, pause)
        time.sleep(pause)


def _wrong_size(found: int, size: int) -> str:
    return f"{found} bytes, not the {size} of the shard"


def _wrong_digest(found: str, sha256: str) -> str:
    return f"sha256 {found[:12]}, not {sha256[:12]}"
