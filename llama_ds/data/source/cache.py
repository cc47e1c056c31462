"""A bounded cache of shards on a local disk, shared by all processes of a host.

    <16 hex digits of the source>-<name>    an entry; its mtime is the time of its last use
    .part-<key>-<random>                    a download in progress, created with its full size; flocked by its writer
    .lock-<key>                             flocked while an entry is checked, fetched or evicted
    .lock                                   flocked briefly while space is made and files are added or removed

Entries and parts together never exceed the limit. An entry appears by a rename, after all its bytes were checked and
synced to disk. An evicted entry stays readable for processes that have it open or mapped.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import re
import secrets
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from llama_ds.errors import UserError
from llama_ds.log import logger

READ_CHUNK = 1 << 20  # bytes per read
POLL_S = 0.02  # polling interval for a lock that another process holds
FULL = (errno.ENOSPC, errno.EDQUOT)


class Busy(Exception):
    """Other processes or threads held a lock, or the space, until the deadline."""


def key_of(source: str, name: str) -> str:
    """Return the file name of an entry, unique per URL or command of a source and name of a file."""
    return f"{hashlib.sha256(source.encode()).hexdigest()[:16]}-{urllib.parse.quote(name, safe='')}"


def digest_of(path: str) -> tuple[int, str]:
    """Return the size in bytes and the sha256 of a file in one sequential read. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while chunk := file.read(READ_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


class Cache:
    """A cache of at most `limit_bytes` in one folder, safe for concurrent use by threads and processes."""

    def __init__(self, folder: str, limit_bytes: int) -> None:
        """Create the folder, or reuse an existing one with its entries. Raises UserError: it cannot be written."""
        self.folder, self.limit_bytes = os.path.abspath(os.path.expanduser(folder)), limit_bytes
        self.checked: dict[str, tuple[int, int, str]] = {}  # key: inode, size and sha256 checked by this process
        try:
            os.makedirs(self.folder, exist_ok=True)
            with self._locked(os.path.join(self.folder, ".lock"), math.inf):
                pass
        except OSError as error:
            raise self._broken(error) from None

    def path_of(self, key: str) -> str:
        """Return the path of an entry, which need not exist."""
        return os.path.join(self.folder, key)

    def hit(self, key: str, size: int, sha256: str) -> bool:
        """Whether this process has checked an existing entry before; updates its time of last use."""
        path = self.path_of(key)
        try:
            if self.checked.get(key) != (os.stat(path).st_ino, size, sha256):
                return False
            _touch(path)
        except OSError:  # evicted, or damaged, which `check` finds out
            return False
        return True

    @contextmanager
    def lock(self, key: str, until: float) -> Iterator[None]:
        """Lock an entry against fetches and eviction by others, waiting until `until` (time.monotonic, seconds).

        Raises:
            Busy: another thread or process held the lock until `until`.
            UserError: the folder cannot be used, here or in the body.
        """
        lock_path = os.path.join(self.folder, f".lock-{key}")
        try:
            with self._locked(lock_path, until):
                try:
                    yield
                finally:
                    if not os.path.exists(self.path_of(key)):  # nothing was fetched: remove the lock file
                        with suppress(FileNotFoundError):
                            os.unlink(lock_path)
        except OSError as error:
            raise self._broken(error) from None

    def check(self, key: str, size: int, sha256: str) -> bool:
        """Whether the locked entry exists and is intact; a damaged entry is removed."""
        if self.hit(key, size, sha256):
            return True
        path = self.path_of(key)
        if not os.path.exists(path):
            return False
        try:
            found = digest_of(path)
        except OSError as error:  # for example a bad block
            found = (-1, f"{error.strerror}")
        if found == (size, sha256):
            self.accept(key, size, sha256)
            return True
        logger.warning("%s: the cached shard is damaged or from an earlier build; fetching it again", path)
        os.unlink(path)
        return False

    def accept(self, key: str, size: int, sha256: str) -> None:
        """Record the locked entry as checked by this process, and update its time of last use."""
        self.checked[key] = (os.stat(self.path_of(key)).st_ino, size, sha256)
        _touch(self.path_of(key))

    @contextmanager
    def part(self, key: str, size: int, until: float) -> Iterator[Part]:
        """Make space for the locked entry and yield a file to write it to, removed at the end unless the body kept it.

        Raises:
            Busy: downloads of other threads and processes filled the cache until `until`.
            UserError: the file is larger than the whole cache.
        """
        if size > self.limit_bytes:
            raise UserError(
                f"data.cache_gib: {self.limit_bytes} bytes ({self.limit_bytes / 2**30:.3g} GiB) cannot hold one shard "
                f"of {size} bytes; set data.cache_gib to several times {size / 2**30:.3g}"
            )
        part = self._new_part(key, size, until)
        try:
            yield part
        finally:
            with suppress(FileNotFoundError):  # kept
                os.unlink(part.path)
            os.close(part.descriptor)

    def evict_one(self) -> bool:
        """Remove the least recently used entry that is not locked; return False if there is none."""
        with self._lock_folder(math.inf):
            return any(self._evict(entry) for entry in self._entries())

    def _new_part(self, key: str, size: int, until: float) -> Part:
        while True:
            with self._lock_folder(until):
                if self._make_space(size):
                    return Part(self, key, size)
            if time.monotonic() >= until:
                raise Busy(f"downloads in progress fill the cache of {self.limit_bytes} bytes; raise data.cache_gib")
            time.sleep(POLL_S)

    def _make_space(self, size: int) -> bool:
        """Evict until `size` more bytes fit the limit; return False if locked entries and parts prevent that."""
        parts = [entry for entry in self._files(".part-") if not _remove_if_dead(entry.path)]
        entries = self._entries()
        excess = size - self.limit_bytes + sum(entry.stat().st_size for entry in entries + parts)
        for entry in entries:
            if excess <= 0:
                break
            if self._evict(entry):
                excess -= entry.stat().st_size
        return excess <= 0

    def _evict(self, entry: os.DirEntry[str]) -> bool:
        """Remove an entry and its lock file, unless it is locked."""
        lock_path = os.path.join(self.folder, f".lock-{entry.name}")
        lock = _try_lock(lock_path)
        if lock is None:
            return False
        for path in (entry.path, lock_path):  # a process that waits for the lock notices, and creates a new file
            with suppress(FileNotFoundError):
                os.unlink(path)
        _unlock(lock)
        return True

    def _entries(self) -> list[os.DirEntry[str]]:
        """Return the entries, least recently used first, without any other files in the folder."""
        return sorted(self._files("[0-9a-f]{16}-"), key=lambda entry: entry.stat().st_mtime_ns)

    def _files(self, pattern: str) -> list[os.DirEntry[str]]:
        found = []
        with os.scandir(self.folder) as files:
            for entry in files:
                with suppress(FileNotFoundError):
                    if re.match(pattern, entry.name) and entry.stat():  # the entry caches its stat
                        found.append(entry)
        return found

    @contextmanager
    def _lock_folder(self, until: float) -> Iterator[None]:
        """Hold the lock of the folder, needed to make space and to add or remove files."""
        with self._locked(os.path.join(self.folder, ".lock"), until):
            yield

    @contextmanager
    def _locked(self, path: str, until: float) -> Iterator[None]:
        while (lock := _try_lock(path)) is None:
            if time.monotonic() >= until:
                raise Busy("another process or thread held the lock")
            time.sleep(POLL_S)
        try:
            yield
        finally:
            _unlock(lock)

    def _broken(self, error: OSError) -> UserError:
        return UserError(
            f"data.cache_dir: the cache {self.folder} cannot be used ({error.strerror or error}); "
            "name a folder on a local disk that this user can write"
        )


class Part:
    """A download into the cache, which counts with its full size from the start."""

    def __init__(self, cache: Cache, key: str, size: int) -> None:
        """Create the file and lock it. The caller holds the folder lock, so nobody sees the file unlocked."""
        self.cache, self.key, self.size = cache, key, size
        self.path = os.path.join(cache.folder, f".part-{key}-{secrets.token_hex(8)}")
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        os.ftruncate(self.descriptor, size)
        self.restart()

    def restart(self) -> None:
        """Discard the bytes written so far."""
        self.have, self.digest = 0, hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        """Append bytes, evicting other entries while the disk is full. Raises UserError: no entry is left to evict."""
        self.digest.update(chunk)
        left = memoryview(chunk)
        while left:
            try:
                written = os.pwrite(self.descriptor, left, self.have)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                if not self.cache.evict_one():
                    raise self._disk_full(error) from None
                continue
            self.have, left = self.have + written, left[written:]

    def keep(self, sha256: str) -> None:
        """Turn the complete file, which the caller has checked, into the entry. Raises UserError: the disk is full."""
        try:
            os.fsync(self.descriptor)
        except OSError as error:  # a network file system reports a full disk only here
            raise self._disk_full(error) if error.errno in FULL else error from None
        with self.cache._lock_folder(math.inf):
            os.replace(self.path, self.cache.path_of(self.key))
        self.cache.accept(self.key, self.size, sha256)

    def _disk_full(self, error: OSError) -> UserError:
        free = shutil.disk_usage(self.cache.folder).free
        return UserError(
            f"data.cache_dir: no space for a shard in {self.cache.folder} ({error.strerror}; {self.size} bytes needed, "
            f"{free} free, no other cached shard left to evict); free some, lower data.cache_gib, or name a folder "
            "on a larger disk in data.cache_dir"
        )


def _try_lock(path: str) -> int | None:
    """Lock a file and return its descriptor, or None if another process holds it or has just removed it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(lock).st_ino:
                return lock
    except BlockingIOError:
        pass
    except OSError:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _unlock(lock: int) -> None:
    fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: a forked process may hold a copy of the descriptor
    os.close(lock)


def _remove_if_dead(path: str) -> bool:
    """Remove a part whose writer has died and thus released its lock. The caller holds the folder lock."""
    if (lock := _try_lock(path)) is None:
        return False
    os.unlink(path)
    os.close(lock)
    return True


def _touch(path: str) -> None:
    """Set the time of last use explicitly, because disks are often mounted without access times."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))
