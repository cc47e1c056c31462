"""Transports: a single attempt to download a remote file. `store.py` retries, `cache.py` stores the bytes.

A transport yields (offset, bytes) pairs in order. To resume a download, the caller requests the bytes from `start` on;
a transport that cannot resume begins at 0. Every failure is a `Fault`. No transport blocks its caller past `until`
(time.monotonic, seconds), even if the underlying library hangs.
"""

from __future__ import annotations

import base64
import glob
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
from typing import IO, Any, NamedTuple, Protocol

from llama_ds.errors import UserError

Chunks = Generator[tuple[int, bytes], None, None]

CHUNK = 1 << 18  # bytes per read of a socket or a pipe
EXIT_S = 1.0  # grace for a command to exit after its output, even past the deadline, for the sake of its exit status
FSSPEC_CHUNK = 1 << 22  # bytes per read; each is one request to an object store
STATUS_S = 60.0  # timeout of a request for the headers of a file
VERSIONS = ("ETag", "etag", "sha", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")
MISSING_STATUS = (401, 403, 404, 410)
KINDS = "a folder, file://, http://, https://, s3://, gs://, pipe:COMMAND, or a protocol of fsspec"


@dataclass(frozen=True)
class RetryPolicy:
    """Retries and timeouts of a remote file, in seconds."""

    deadline_s: float = 300.0  # total time for all tries
    first_wait_s: float = 0.5  # pause between the first two tries; it doubles with each try
    max_wait_s: float = 30.0
    stall_s: float = 30.0  # a try fails after this time without a byte


class FileStatus(NamedTuple):
    """A remote file."""

    url: str
    size: int
    version: str  # changes whenever the content does; "" if the store has no such mark


class Fault(Exception):
    """A failed try: the `reason`, and the `offset` of the first missing byte if known."""

    def __init__(self, reason: str, offset: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.offset = reason, offset


class Missing(Fault):
    """The file does not exist or access is denied: more tries rarely help."""


class CorruptDownload(Fault):
    """The received bytes are not the file. Two equal `signature`s in a row mean that the stored file is damaged."""

    def __init__(self, reason: str, signature: str, offset: int | None = None) -> None:
        super().__init__(reason, offset)
        self.signature = signature


class Transport(Protocol):
    """A protocol to read the files below a URL."""

    location: str  # URL or command for messages, without password and query

    def where(self, name: str) -> str:
        """Return the URL or command of a file, for messages."""

    def chunks(self, name: str, start: int, stall_s: float, until: float) -> Chunks:
        """Yield (offset, bytes) from `start` on, or from 0. Close the generator to end early. Raises Fault."""


def open_transport(url: str) -> Transport:
    """Return the transport of a URL or a `pipe:` command, without connecting.

    Raises:
        UserError: the protocol is unknown, or its package is not installed.
    """
    if url.startswith("pipe:"):
        return PipeTransport(url)
    return HttpTransport(url) if re.match("https?://", url) else FsspecTransport(url)


class HttpTransport:
    """http and https with the standard library; the environment sets proxies and certificates."""

    def __init__(self, url: str) -> None:
        self.location = without_secrets(url)
        self.parts = _in_ascii(urllib.parse.urlsplit(url), self.location)
        self.opener = urllib.request.build_opener()

    def where(self, name: str) -> str:
        return f"{self.location}/{name}"

    def chunks(self, name: str, start: int, stall_s: float, until: float) -> Chunks:
        # In a thread, because the socket timeout covers neither the DNS lookup nor headers that trickle in.
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
                raise CorruptDownload(reason, f"range {start}") from None
            raise (Missing if error.code in MISSING_STATUS else Fault)(reason) from None
        except urllib.error.URLError as error:
            raise Fault(_describe(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise Fault(_describe(error)) from None

    def size_and_version(self, name: str) -> tuple[int, str]:
        """Return the size and the version of a file, from the headers of a response. Raises Fault or UserError."""
        try:
            with self.opener.open(self._request(name, 0), timeout=STATUS_S) as response:
                size, headers = response.length, response.headers
        except urllib.error.HTTPError as error:
            error.close()
            raise (Missing if error.code in MISSING_STATUS else Fault)(f"HTTP {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise Fault(_describe(getattr(error, "reason", error))) from None
        if size is None:
            raise UserError(f"{self.where(name)}: the server does not tell the size of the file; download it first")
        return size, headers.get("ETag") or headers.get("Last-Modified") or ""

    def _request(self, name: str, start: int) -> urllib.request.Request:
        path = f"{self.parts.path.rstrip('/')}/{urllib.parse.quote(name)}"
        host = self.parts.netloc.rpartition("@")[2]
        request = urllib.request.Request(urllib.parse.urlunsplit(self.parts._replace(netloc=host, path=path)))
        if start:
            request.add_header("Range", f"bytes={start}-")
        if self.parts.username is not None:
            pair = f"{urllib.parse.unquote(self.parts.username)}:{urllib.parse.unquote(self.parts.password or '')}"
            # Not sent on redirects: another host must not see the password.
            request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
        return request


def _in_ascii(parts: urllib.parse.SplitResult, url: str) -> urllib.parse.SplitResult:
    """Return a URL with letters outside ASCII as HTTP sends them: escaped, and in the host's name by IDNA."""
    login, at, host = parts.netloc.rpartition("@")
    try:
        host = host.encode("idna").decode()
    except UnicodeError as error:
        raise UserError(f"{url}: not a valid host name ({error}); correct the URL") from None
    path, query = (urllib.parse.quote(part, safe="/%:@!$&'()*+,;=~?") for part in (parts.path, parts.query))
    return parts._replace(netloc=f"{login}{at}{host}", path=path, query=query)


def _span(response: http.client.HTTPResponse, start: int) -> tuple[int, int | None]:
    """Return the offset of the first byte of a response, and its end if the server reports it."""
    if response.status != http.client.PARTIAL_CONTENT:
        return 0, response.length
    span = re.match(r"bytes (\d+)-(\d+)/", response.headers.get("Content-Range", ""))
    if span is None or int(span[1]) != start:
        found = response.headers.get("Content-Range")
        raise CorruptDownload(f"requested bytes from {start} on, got {found}", f"range {start}")
    return start, int(span[2]) + 1


class PipeTransport:
    """The output of a shell command, as webdataset's `pipe:`; in a pipeline, the shell checks only the last command."""

    def __init__(self, command: str) -> None:
        if "{}" not in command:
            raise UserError(
                f"{command}: the command has no placeholder for the file name; write {{}} in its place, "
                "as in pipe:aws s3 cp s3://bucket/c4/{} -"
            )
        self.location = command

    def where(self, name: str) -> str:
        return self.location.replace("{}", shlex.quote(name))

    def chunks(self, name: str, start: int, stall_s: float, until: float) -> Chunks:
        command = self.where(name).removeprefix("pipe:")
        with tempfile.TemporaryFile() as stderr:  # a file, because a full pipe would block the command
            process = subprocess.Popen(
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                start_new_session=True,  # its own process group, to kill everything that the shell started
            )
            try:
                yield from _output(process, stall_s, until)
            except Fault as fault:
                raise type(fault)(fault.reason + _last_line(stderr), fault.offset) from None
            finally:
                if process.returncode is None:  # not reaped, so its group id is valid even if the shell has exited
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                process.stdout.close()  # type: ignore[union-attr]


def _output(process: subprocess.Popen[bytes], stall_s: float, until: float) -> Chunks:
    """Yield the output of a command. Raises Fault: the command stalls or fails."""
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
        raise Fault("closed its output but does not exit", offset) from None
    if code:  # 126, 127: the shell cannot find or execute the program
        raise (Missing if code in (126, 127) else Fault)(f"exit status {code}", offset)


def _last_line(stderr: IO[bytes]) -> str:
    """Return ": " and the last line of a file, or "" if it is empty."""
    stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 4096))
    lines = stderr.read().decode(errors="replace").strip().splitlines()
    return f": {lines[-1].strip()}" if lines else ""


class FsspecTransport:
    """Any file system of fsspec: object stores, sftp, hdfs."""

    def __init__(self, url: str) -> None:
        self.location, self.url = without_secrets(url), url.rstrip("/")
        classes = [_file_system_class(self.location, part) for part in url.split("::")]
        # A synchronous file system may hold one connection, so each try gets its own. The others are thread-safe.
        self.own = not all(kind.async_impl for kind in classes)

    def where(self, name: str) -> str:
        return f"{self.location}/{name}"

    def chunks(self, name: str, start: int, stall_s: float, until: float) -> Chunks:
        return in_thread(self._chunks(name, start), stall_s, until)

    def _chunks(self, name: str, start: int) -> Chunks:
        import fsspec  # type: ignore[import-untyped]

        offset = start
        try:
            # Created for each try: fsspec caches instances per process, and they do not survive a fork.
            system, root = fsspec.url_to_fs(self.url, skip_instance_cache=self.own)
            path = f"{root.rstrip('/')}/{name}"
            with system.open(path, "rb", block_size=FSSPEC_CHUNK, cache_type="none") as file:
                if start:
                    file.seek(start)
                while chunk := file.read(FSSPEC_CHUNK):
                    yield offset, chunk
                    offset += len(chunk)
        except (FileNotFoundError, PermissionError) as error:
            raise Missing(_describe(error)) from None
        except Exception as error:  # every store raises its own exception types
            raise Fault(_describe(error), offset) from None


def _file_system_class(url: str, part: str) -> Any:
    """Return fsspec's class for one URL of a chain. Raises UserError: it is unknown or not installed."""
    import fsspec

    kind = part.partition("://")[0]
    try:
        return fsspec.get_filesystem_class(kind)
    except ValueError:
        raise UserError(f"{url}: {kind}:// is not a known protocol; use {KINDS}") from None
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}.get(kind)
        fix = f"pip install 'llama_ds[{extra}]'" if extra else "install it"
        raise UserError(f"{url}: the package for {kind}:// is not installed ({error}); {fix}, or use {KINDS}") from None


def in_thread(chunks: Chunks, stall_s: float, until: float) -> Chunks:
    """Yield the items of `chunks`, which runs in a thread of its own; the thread is abandoned if it hangs.

    Raises:
        Fault: no item arrived for `stall_s`, or `until` has passed.
    """
    requests: SimpleQueue[bool] = SimpleQueue()
    items: SimpleQueue[tuple[int, bytes] | Exception | None] = SimpleQueue()

    def work() -> None:
        try:
            while requests.get():
                items.put(next(chunks, None))
        except Exception as error:
            items.put(error)
        finally:
            chunks.close()

    threading.Thread(target=work, name="llama_ds-download", daemon=True).start()
    offset = None
    try:
        while True:
            requests.put(True)
            timeout_s = max(0.0, min(stall_s, until - time.monotonic()))
            try:
                item = items.get(timeout=timeout_s)
            except Empty:
                raise Fault(f"no byte in {timeout_s:.1f} s", offset) from None
            if isinstance(item, Exception):
                raise item
            if item is None:
                return
            yield item
            offset = item[0] + len(item[1])
    finally:
        requests.put(False)


def list_files(url: str) -> list[FileStatus]:
    """Return the files at a URL, below it if it is a folder, or that match it if it is a glob, sorted by URL.

    Raises:
        Fault: the store cannot be reached, or there is no such file.
        UserError: the protocol is unknown, its package is not installed, or a web server would have to be searched.
    """
    if not re.match("https?://", url):
        return _fsspec_files(url)
    if glob.has_magic(url) or url.endswith("/"):
        raise UserError(f"{url}: a web server cannot be searched for files; name one file")
    folder, _, name = url.rpartition("/")
    return [FileStatus(url, *HttpTransport(folder).size_and_version(urllib.parse.unquote(name)))]


def _fsspec_files(url: str) -> list[FileStatus]:
    import fsspec

    _file_system_class(url, url)
    try:
        system, root = fsspec.url_to_fs(url, skip_instance_cache=True)
        system.invalidate_cache()
        if glob.has_magic(root):
            found = system.glob(root, detail=True)
        else:
            found = system.find(root, detail=True) if system.isdir(root) else {root: system.info(root)}
        for folder in [path for path, info in found.items() if info["type"] == "directory"]:
            found.update(system.find(folder, detail=True))
    except (FileNotFoundError, PermissionError) as error:
        raise Missing(_describe(error)) from None
    except Exception as error:  # every store raises its own exception types
        raise Fault(_describe(error)) from None
    files = {path: info for path, info in found.items() if info["type"] == "file"}
    return sorted(
        FileStatus(system.unstrip_protocol(p), int(info["size"]), _version(info)) for p, info in files.items()
    )


def _version(info: dict[str, Any]) -> str:
    return next((str(info[key]) for key in VERSIONS if info.get(key)), "")


def without_secrets(url: str) -> str:
    """Return a URL for messages: without user, password, query and trailing slash."""
    return re.sub(r"(?<=://)[^/@]*@", "", url).partition("?")[0].rstrip("/")


def _describe(error: object) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
