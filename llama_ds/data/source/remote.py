"""Transports: how the bytes of one remote file arrive, once. `store.py` tries again, `cache.py` keeps what came.

A transport yields (offset, bytes) pairs in order. It is asked to begin at `start`, to resume a download; one that
cannot begins at 0. Whatever goes wrong is a `Fault`, and none holds its caller past `until` (time.monotonic, seconds),
even if the library below it hangs.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import IO, Any, Protocol

from llama_ds.errors import UserError

Chunks = Generator[tuple[int, bytes], None, None]

CHUNK = 1 << 18  # bytes asked of a socket or a pipe at once
EXIT_S = 1.0  # that a command may take to end after its output, also past the deadline: its status says what happened
FSSPEC_CHUNK = 1 << 22  # bytes: an object store is asked anew for each
MISSING_STATUS = (401, 403, 404, 410)
KINDS = "a folder, file://, http://, https://, s3://, gs://, pipe:COMMAND, or what fsspec knows"


@dataclass(frozen=True)
class RetryPolicy:
    """How long a remote file is waited for, in seconds."""

    deadline_s: float = 300.0  # from the first try to giving up
    first_wait_s: float = 0.5  # between the first two tries; then it doubles
    longest_wait_s: float = 30.0
    stall_s: float = 30.0  # without a byte, after which a try has failed


class Fault(Exception):
    """A try that failed: `reason` in words, `offset` of the first byte that did not come where known."""

    def __init__(self, reason: str, offset: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.offset = reason, offset


class Missing(Fault):
    """There is no such file, or it is not ours to read: more tries are of little use."""


class Unsound(Fault):
    """What came is not the file. The same `sign` twice in a row: the object itself is damaged."""

    def __init__(self, reason: str, sign: str, offset: int | None = None) -> None:
        super().__init__(reason, offset)
        self.sign = sign


class Transport(Protocol):
    """One way to read the files below a place."""

    place: str  # for messages: without password and query

    def where(self, name: str) -> str:
        """Return the URL or the command of a file, for messages."""

    def chunks(self, name: str, start: int, stall_s: float, until: float) -> Chunks:
        """Yield (offset, bytes) from `start` on, or from 0. Close it to end it early. Raises Fault."""


def open_transport(place: str) -> Transport:
    """Return the transport of a URL or a `pipe:` command, without connecting.

    Raises:
        UserError: of a kind that is unknown, or whose package is not installed.
    """
    if place.startswith("pipe:"):
        return PipeTransport(place)
    return HttpTransport(place) if re.match("https?://", place) else FsspecTransport(place)


class HttpTransport:
    """http and https by the standard library; proxies and certificates as the environment names them."""

    def __init__(self, place: str) -> None:
        self.place = shown(place)
        self.parts = urllib.parse.urlsplit(place)
        self.opener = urllib.request.build_opener()

    def where(self, name: str) -> str:
        return f"{self.place}/{name}"

    def chunks(self, name: str, start: int, stall_s: float, until: float) -> Chunks:
        # In a thread: the socket's time-out covers neither the look-up of the host nor headers that trickle.
        return in_thread(self._chunks(name, start, min(stall_s, max(0.001, until - time.monotonic()))), stall_s, until)

    def _chunks(self, name: str, start: int, timeout_s: float) -> Chunks:
        try:
            with self.opener.open(self._request(name, start), timeout=timeout_s) as response:
                offset, end = _span(response, start)
                while chunk := response.read1(CHUNK):
                    yield offset, chunk
                    offset += len(chunk)
                if end is not None and offset != end:
                    raise Fault(f"cut short at byte {offset} of {end}", offset)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            error.close()
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise Unsound(reason, f"range {start}") from None
            raise (Missing if error.code in MISSING_STATUS else Fault)(reason) from None
        except urllib.error.URLError as error:
            raise Fault(_words(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise Fault(_words(error)) from None

    def _request(self, name: str, start: int) -> urllib.request.Request:
        path = f"{self.parts.path.rstrip('/')}/{urllib.parse.quote(name)}"
        host = self.parts.netloc.rpartition("@")[2]
        request = urllib.request.Request(urllib.parse.urlunsplit(self.parts._replace(netloc=host, path=path)))
        if start:
            request.add_header("Range", f"bytes={start}-")
        if self.parts.username is not None:
            pair = f"{urllib.parse.unquote(self.parts.username)}:{urllib.parse.unquote(self.parts.password or '')}"
            # Not redirected: another host must not see the password.
            request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
        return request


def _span(response: http.client.HTTPResponse, start: int) -> tuple[int, int | None]:
    """Return the offset of an answer's first byte, and its end where the server tells."""
    if response.status != http.client.PARTIAL_CONTENT:
        return 0, response.length
    span = re.match(r"bytes (\d+)-(\d+)/", response.headers.get("Content-Range", ""))
    if span is None or int(span[1]) != start:
        raise Unsound(f"asked for bytes from {start} on, got {response.headers.get('Content-Range')}", f"range {start}")
    return start, int(span[2]) + 1


class PipeTransport:
    """What a shell command writes, as webdataset's `pipe:`; of a pipeline the shell sees the last command fail only."""

    def __init__(self, place: str) -> None:
        if "{}" not in place:
            raise UserError(
                f"{place}: the command does not say where the name of a file goes; write {{}} there, "
                "as in pipe:aws s3 cp s3://bucket/c4/{} -"
            )
        self.place = place

    def where(self, name: str) -> str:
        return self.place.replace("{}", shlex.quote(name))

    def chunks(self, name: str, start: int, stall_s: float, until: float) -> Chunks:
        command = self.where(name).removeprefix("pipe:")
        with tempfile.TemporaryFile() as stderr:  # a file: nobody need empty it for the command to go on
            process = subprocess.Popen(
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                start_new_session=True,  # a group of its own, to be killed with all that the shell started
            )
            try:
                yield from _output(process, stall_s, until)
            except Fault as fault:
                raise type(fault)(fault.reason + _last_line(stderr), fault.offset) from None
            finally:
                if process.returncode is None:  # not reaped: the group is still ours, even if the shell has ended
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                process.stdout.close()  # type: ignore[union-attr]


def _output(process: subprocess.Popen[bytes], stall_s: float, until: float) -> Chunks:
    """Yield a command's output. Raises Fault: it stalls, or fails."""
    assert process.stdout is not None
    descriptor, offset = process.stdout.fileno(), 0
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        timeout_s = min(stall_s, until - time.monotonic())
        if not poll.poll(max(0, timeout_s * 1000)):
            raise Fault(f"no byte in {max(0, timeout_s):.1f} s", offset)
        if not (chunk := os.read(descriptor, CHUNK)):
            break
        yield offset, chunk
        offset += len(chunk)
    try:
        code = process.wait(max(EXIT_S, min(stall_s, until - time.monotonic())))
    except subprocess.TimeoutExpired:
        raise Fault("closed its output but does not end", offset) from None
    if code:  # 126, 127: the shell found no such program
        raise (Missing if code in (126, 127) else Fault)(f"exit status {code}", offset)


def _last_line(stderr: IO[bytes]) -> str:
    """Return ": " and the last line of a file, or "" of an empty one."""
    stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 4096))
    lines = stderr.read().decode(errors="replace").strip().splitlines()
    return f": {lines[-1].strip()}" if lines else ""


class FsspecTransport:
    """Whatever fsspec has a file system for: object stores, sftp, hdfs."""

    def __init__(self, place: str) -> None:
        self.place, self.url = shown(place), place.rstrip("/")
        classes = [_file_system_class(self.place, part) for part in place.split("::")]
        # A synchronous one may hold one connection: an own one for each try. The others are made for many threads.
        self.own = not all(kind.async_impl for kind in classes)

    def where(self, name: str) -> str:
        return f"{self.place}/{name}"

    def chunks(self, name: str, start: int, stall_s: float, until: float) -> Chunks:
        return in_thread(self._chunks(name, start), stall_s, until)

    def _chunks(self, name: str, start: int) -> Chunks:
        import fsspec  # type: ignore[import-untyped]

        offset = start
        try:
            # Each time: fsspec keeps it for each process, and it does not outlive a fork.
            system, root = fsspec.url_to_fs(self.url, skip_instance_cache=self.own)
            path = f"{root.rstrip('/')}/{name}"
            with system.open(path, "rb", block_size=FSSPEC_CHUNK, cache_type="none") as file:
                if start:
                    file.seek(start)
                while chunk := file.read(FSSPEC_CHUNK):
                    yield offset, chunk
                    offset += len(chunk)
        except (FileNotFoundError, PermissionError) as error:
            raise Missing(_words(error)) from None
        except Exception as error:  # each store has its own kinds
            raise Fault(_words(error), offset) from None


def _file_system_class(place: str, part: str) -> Any:
    """Return fsspec's class for one URL of a chain. Raises UserError: unknown, or not installed."""
    import fsspec

    kind = part.partition("://")[0]
    try:
        return fsspec.get_filesystem_class(kind)
    except ValueError:
        raise UserError(f"{place}: no kind of place is called {kind}://; name {KINDS}") from None
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}.get(kind)
        fix = f"pip install 'llama_ds[{extra}]'" if extra else "install it"
        raise UserError(
            f"{place}: a package for {kind}:// is not installed ({error}); {fix}, or name {KINDS}"
        ) from None


def in_thread(chunks: Chunks, stall_s: float, until: float) -> Chunks:
    """Yield what `chunks` yields, run in a thread of its own that is left behind when it hangs.

    Raises:
        Fault: nothing came for `stall_s`, or `until` is past.
    """
    wanted: SimpleQueue[bool] = SimpleQueue()
    given: SimpleQueue[tuple[int, bytes] | Exception | None] = SimpleQueue()

    def work() -> None:
        try:
            while wanted.get():
                given.put(next(chunks, None))
        except Exception as error:
            given.put(error)
        finally:
            chunks.close()

    threading.Thread(target=work, name="llama_ds-download", daemon=True).start()
    offset = None
    try:
        while True:
            wanted.put(True)
            timeout_s = max(0.0, min(stall_s, until - time.monotonic()))
            try:
                item = given.get(timeout=timeout_s)
            except Empty:
                raise Fault(f"no byte in {timeout_s:.1f} s", offset) from None
            if isinstance(item, Exception):
                raise item
            if item is None:
                return
            yield item
            offset = item[0] + len(item[1])
    finally:
        wanted.put(False)


def shown(url: str) -> str:
    """Return a URL as messages show it: without user, password, query and last slash."""
    return re.sub(r"(?<=://)[^/@]*@", "", url).partition("?")[0].rstrip("/")


def _words(error: object) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
