"""A bounded cache of shards on a local disk, shared by all processes of a host.

    <16 hex digits of the place>-<name>     an entry; its time of modification is that of its last use
    .part-<key>-<random>                    a file on its way, as long as it will be; flock'd by who writes it
    .lock-<key>                             flock'd by who checks, fetches or evicts an entry
    .lock                                   flock'd by who makes room, for an instant

Entries and parts together never exceed the limit. An entry appears by a rename, with all its bytes checked and on disk.
One that is evicted while another process has it open or mapped stays readable there, as Linux keeps what is in use.
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

READ_CHUNK = 1 << 20  # bytes
POLL_S = 0.02  # between two looks at a lock that is held
FULL = (errno.ENOSPC, errno.EDQUOT)


class Busy(Exception):
    """Others held a lock, or the room, until our time was up."""


def key_of(place: str, name: str) -> str:
    """Return the file name of an entry: one for each place and name."""
    return f"{hashlib.sha256(place.encode()).hexdigest()[:16]}-{urllib.parse.quote(name, safe='')}"


def digest_of(path: str) -> tuple[int, str]:
    """Return a file's size in bytes and its sha256, reading it once from end to end. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while chunk := file.read(READ_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


class Cache:
    """A cache of at most `limit_bytes` in one folder, for many threads and processes, with an object each or shared."""

    def __init__(self, folder: str, limit_bytes: int) -> None:
        """Make the folder, or take it over with what it holds. Raises UserError: it cannot be written."""
        self.folder, self.limit_bytes = os.path.abspath(os.path.expanduser(folder)), limit_bytes
        self.sound: dict[str, tuple[int, int, str]] = {}  # key: inode, size and sha256 of what this process has checked
        try:
            os.makedirs(self.folder, exist_ok=True)
            with self._locked(os.path.join(self.folder, ".lock"), math.inf):
                pass
        except OSError as error:
            raise self._broken(error) from None

    def path_of(self, key: str) -> str:
        """Return where an entry stands, if it is there."""
        return os.path.join(self.folder, key)

    def hit(self, key: str, size: int, sha256: str) -> bool:
        """Whether an entry is there that this process has checked before; it counts as used now."""
        path = self.path_of(key)
        try:
            if self.sound.get(key) != (os.stat(path).st_ino, size, sha256):
                return False
            _touch(path)
        except OSError:  # evicted, or damaged so that `check` must look
            return False
        return True

    @contextmanager
    def lock(self, key: str, until: float) -> Iterator[None]:
        """Hold an entry, which then is neither fetched by others nor evicted, waiting until `until` (monotonic, s).

        Raises:
            Busy: another thread or process held it all the time.
            UserError: the folder fails, here or in the body.
        """
        lock_path = os.path.join(self.folder, f".lock-{key}")
        try:
            with self._locked(lock_path, until):
                try:
                    yield
                finally:
                    if not os.path.exists(self.path_of(key)):  # nothing came: leave no trace
                        with suppress(FileNotFoundError):
                            os.unlink(lock_path)
        except OSError as error:
            raise self._broken(error) from None

    def check(self, key: str, size: int, sha256: str) -> bool:
        """Whether the locked entry is there and sound; one that is damaged is removed."""
        if self.hit(key, size, sha256):
            return True
        path = self.path_of(key)
        if not os.path.exists(path):
            return False
        try:
            found = digest_of(path)
        except OSError as error:  # a bad block of the disk
            found = (-1, f"{error.strerror}")
        if found == (size, sha256):
            self.accept(key, size, sha256)
            return True
        logger.warning("%s: the cached shard is damaged or of an earlier build; fetched anew", path)
        os.unlink(path)
        return False

    def accept(self, key: str, size: int, sha256: str) -> None:
        """Note that this process has checked the locked entry, and that it was used now."""
        self.sound[key] = (os.stat(self.path_of(key)).st_ino, size, sha256)
        _touch(self.path_of(key))

    @contextmanager
    def part(self, key: str, size: int, until: float) -> Iterator[Part]:
        """Make room for the locked entry and give a file to write it to, removed again unless the body kept it.

        Raises:
            Busy: files under way in other threads and processes took all the room until `until`.
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
        """Remove the entry last used longest ago of those that nobody holds; False where there is none."""
        with self._room(math.inf):
            return any(self._evict(entry) for entry in self._entries())

    def _new_part(self, key: str, size: int, until: float) -> Part:
        while True:
            with self._room(until):
                if self._make_room(size):
                    return Part(self, key, size)
            if time.monotonic() >= until:
                raise Busy(f"files under way filled the cache of {self.limit_bytes} bytes; raise data.cache_gib")
            time.sleep(POLL_S)

    def _make_room(self, size: int) -> bool:
        """Evict until `size` more bytes keep the limit; False where what others hold makes that impossible."""
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
        """Remove an entry and its lock, unless somebody holds it."""
        lock_path = os.path.join(self.folder, f".lock-{entry.name}")
        lock = _try_lock(lock_path)
        if lock is None:
            return False
        for path in (entry.path, lock_path):  # who waits for the lock sees that it is gone, and makes a new one
            with suppress(FileNotFoundError):
                os.unlink(path)
        _unlock(lock)
        return True

    def _entries(self) -> list[os.DirEntry[str]]:
        """Return the entries, last used longest ago first; no other file that may stand in the folder."""
        return sorted(self._files("[0-9a-f]{16}-"), key=lambda entry: entry.stat().st_mtime_ns)

    def _files(self, pattern: str) -> list[os.DirEntry[str]]:
        found = []
        with os.scandir(self.folder) as files:
            for entry in files:
                with suppress(FileNotFoundError):
                    if re.match(pattern, entry.name) and entry.stat():  # which the entry keeps
                        found.append(entry)
        return found

    @contextmanager
    def _room(self, until: float) -> Iterator[None]:
        """Hold the right to make room, and to add and remove files."""
        with self._locked(os.path.join(self.folder, ".lock"), until):
            yield

    @contextmanager
    def _locked(self, path: str, until: float) -> Iterator[None]:
        while (lock := _try_lock(path)) is None:
            if time.monotonic() >= until:
                raise Busy("another process or thread was at it all the time")
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
    """A file on its way into the cache, which counts with its full size from the start."""

    def __init__(self, cache: Cache, key: str, size: int) -> None:
        """Create it. The caller has the right to make room: nobody may see the file before its lock."""
        self.cache, self.key, self.size = cache, key, size
        self.path = os.path.join(cache.folder, f".part-{key}-{secrets.token_hex(8)}")
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        os.ftruncate(self.descriptor, size)
        self.restart()

    def restart(self) -> None:
        """Forget what was written."""
        self.have, self.digest = 0, hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        """Append bytes, evicting other entries when the disk is full. Raises UserError: there are none left."""
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
        """Make the whole file, which the caller has checked, the entry. Raises UserError: the disk is full."""
        try:
            os.fsync(self.descriptor)
        except OSError as error:  # a network file system tells only here
            raise self._disk_full(error) if error.errno in FULL else error from None
        with self.cache._room(math.inf):
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
    """Return the descriptor of a lock file now held, None where another holds it or has just removed it."""
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
    fcntl.flock(lock, fcntl.LOCK_UN)  # a process forked meanwhile may have a copy of the descriptor
    os.close(lock)


def _remove_if_dead(path: str) -> bool:
    """Remove a part whose writer has died, and so lost its lock. The caller has the right to make room."""
    if (lock := _try_lock(path)) is None:
        return False
    os.unlink(path)
    os.close(lock)
    return True


def _touch(path: str) -> None:
    """Set the time of last use: by ourselves, as disks are often mounted without access times, to the nanosecond."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))
