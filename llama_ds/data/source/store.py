"""Access to the files of a data source: a local folder, or a remote store with a cache on a local disk.

A file that arrives slowly, truncated or corrupted is requested again within the limits of a `RetryPolicy`. If that
fails, the file is a `BadFile`, and the reader decides how to continue without it.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
import urllib.parse
import urllib.request
from contextlib import closing
from typing import Protocol

from llama_ds.data.source.cache import Busy, Cache, Part, digest_of, key_of
from llama_ds.data.source.remote import Chunks, CorruptDownload, Fault, Missing, RetryPolicy, Transport, open_transport
from llama_ds.errors import UserError
from llama_ds.log import logger

DEFAULT_POLICY = RetryPolicy()
MIN_TRY_S = 1.0  # minimum time left for another try; a shorter try would say nothing about the file
LATE_S = 5.0  # a try whose first bytes take longer is logged
MISSING_TRIES = 3  # tries for a missing file, because object stores may list a new file late


class BadFile(Exception):
    """A file that is missing or damaged: the `reason`, and the byte `offset` of the damage if known."""

    def __init__(self, location: str, reason: str, offset: int | None = None) -> None:
        super().__init__(location, reason, offset)  # all three arguments, so that it can be pickled
        self.location, self.reason, self.offset = location, reason, offset

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


class Store(Protocol):
    """The files of one source. Thread-safe, and usable after a fork."""

    location: str  # folder or URL, for messages

    def read(self, name: str) -> bytes:
        """Return the content of a small file. Raises BadFile."""

    def fetch(self, name: str, size: int, sha256: str) -> str:
        """Return the path of a local file with exactly this content. Raises BadFile.

        Open the file at once, because a later fetch may evict it from a small cache. If it is missing, fetch it again.
        """


def open_store(location: str, cache: Cache | None = None, policy: RetryPolicy | None = None) -> Store:
    """Return the store of a folder, a URL or a `pipe:` command, without connecting.

    Raises:
        UserError: the protocol is unknown, its package is not installed, or a remote source has no cache.
    """
    if location.startswith("file://"):
        return LocalStore(urllib.request.url2pathname(urllib.parse.urlsplit(location).path))
    if not re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*(://|::)", location):
        return LocalStore(os.path.expanduser(location))
    transport = open_transport(location)
    if cache is None:
        raise UserError(
            f"{transport.location}: a remote source needs a cache; set data.cache_dir to a folder on a local disk and "
            "data.cache_gib to the GiB it may take there"
        )
    return RemoteStore(location, transport, cache, policy or DEFAULT_POLICY)


class LocalStore:
    """A local folder. A shard is checksummed before its first use, which also loads it into the page cache."""

    def __init__(self, folder: str) -> None:
        self.location = folder

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises BadFile."""
        path = os.path.join(self.location, name)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise BadFile(path, error.strerror or str(error)) from None

    def fetch(self, name: str, size: int, sha256: str) -> str:
        """Return the path of the file after checking its size and checksum. Raises BadFile."""
        path = os.path.join(self.location, name)
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
    """Files of a transport: small files are read into memory, shards into the cache."""

    def __init__(self, url: str, transport: Transport, cache: Cache, policy: RetryPolicy) -> None:
        self.location, self.url = transport.location, url.rstrip("/")
        self.transport, self.cache, self.policy = transport, cache, policy

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises BadFile."""
        tries = Tries(self.transport.where(name), self.policy)
        while True:
            try:
                with closing(self._chunks(name, 0, tries.until)) as chunks:
                    return b"".join(chunk for _, chunk in chunks)
            except Fault as fault:
                tries.wait(fault)

    def fetch(self, name: str, size: int, sha256: str) -> str:
        """Return the path of the cached file, after downloading and checking it if necessary.

        Raises:
            BadFile: no intact copy arrived within the deadline.
            UserError: the cache is too small, or its disk is full or broken.
        """
        key = key_of(self.url, name)
        if self.cache.hit(key, size, sha256):
            return self.cache.path_of(key)
        tries = Tries(self.transport.where(name), self.policy)
        try:
            with self.cache.lock(key, tries.until):
                if not self.cache.check(key, size, sha256):
                    with self.cache.part(key, size, tries.until) as part:
                        self._download(name, part, sha256, tries)
                        part.keep(sha256)
        except Busy as busy:
            raise BadFile(tries.where, f"waited {self.policy.deadline_s:g} s: {busy}") from None
        return self.cache.path_of(key)

    def _chunks(self, name: str, start: int, until: float) -> Chunks:
        """Yield the chunks of one try, and log that its first bytes are late, because a try may wait for minutes."""
        stall_s = max(0.0, min(self.policy.stall_s, until - time.monotonic()))
        late = (self.transport.where(name), LATE_S, stall_s)
        timer = threading.Timer(LATE_S, logger.warning, ("%s: no byte in %g s; this try ends after %.0f s", *late))
        timer.daemon = True
        timer.start()
        try:
            for chunk in self.transport.chunks(name, start, self.policy.stall_s, until):
                timer.cancel()
                yield chunk
        finally:
            timer.cancel()

    def _download(self, name: str, part: Part, sha256: str, tries: Tries) -> None:
        """Fill `part`, resuming where a failed try stopped."""
        while True:
            try:
                self._pull(name, part, tries.until)
                digest = part.digest.hexdigest()
                if digest == sha256:
                    return
                raise CorruptDownload(_wrong_digest(digest, sha256), digest)
            except Fault as fault:
                if isinstance(fault, CorruptDownload):
                    part.restart()
                tries.wait(fault)

    def _pull(self, name: str, part: Part, until: float) -> None:
        """Download the missing bytes of `part` in one try."""
        if 0 < part.size == part.have:  # the last try failed after the last byte; the checksum decides
            return
        with closing(self._chunks(name, part.have, until)) as chunks:
            for offset, chunk in chunks:
                if offset != part.have:  # the server cannot resume
                    part.restart()
                part.write(chunk[: part.size - part.have])
                if offset + len(chunk) > part.size:
                    raise CorruptDownload(
                        f"more than the {part.size} bytes of the shard", f"long {part.digest.hexdigest()}", part.size
                    )
        if part.have < part.size:
            signature = f"{part.have} {part.digest.hexdigest()}"
            raise CorruptDownload(_wrong_size(part.have, part.size), signature, part.have)


class Tries:
    """The tries for one file under a retry policy."""

    def __init__(self, where: str, policy: RetryPolicy) -> None:
        self.where, self.policy = where, policy
        self.start = time.monotonic()
        self.until = self.start + policy.deadline_s
        self.min_try_s = min(MIN_TRY_S, policy.deadline_s / 4)
        self.failed = self.missing = 0
        self.signature: str | None = None  # signature of the last corrupt download

    def wait(self, fault: Fault) -> None:
        """Sleep before the next try.

        Raises:
            BadFile: another try would fail in the same way, or the deadline would pass before it.
        """
        self.failed += 1
        self.missing += isinstance(fault, Missing)
        if isinstance(fault, CorruptDownload):
            if fault.signature == self.signature:
                raise BadFile(self.where, f"{fault.reason}, twice the same: the source is damaged", fault.offset)
            self.signature = fault.signature
        pause = min(self.policy.max_wait_s, self.policy.first_wait_s * 2.0 ** min(self.failed - 1, 60))
        pause *= random.uniform(0.5, 1.0)  # jitter, so that hosts that failed together do not retry together
        now = time.monotonic()
        if self.missing >= MISSING_TRIES or now + pause + self.min_try_s >= self.until:
            reason = f"{fault.reason} (gave up after {now - self.start:.1f} s, tries: {self.failed})"
            raise BadFile(self.where, reason, fault.offset)
        logger.warning("%s: try %d failed: %s; next in %.1f s", self.where, self.failed, fault.reason, pause)
        time.sleep(pause)


def _wrong_size(found: int, size: int) -> str:
    return f"{found} bytes, not the {size} of the shard"


def _wrong_digest(found: str, sha256: str) -> str:
    return f"sha256 {found[:12]}, not {sha256[:12]}"
