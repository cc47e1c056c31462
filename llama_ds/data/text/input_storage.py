"""Files of the input, on disk or remote: finding, opening and identifying them."""

from __future__ import annotations

import hashlib
import os
import re
from typing import BinaryIO, NamedTuple, cast

from llama_ds.data.source.remote import FileStatus, without_secrets
from llama_ds.data.source.remote_file import find_remote, open_remote
from llama_ds.errors import UserError

BUFFER = 1 << 20  # bytes per system call; lines are long documents
_known: dict[str, FileStatus] = {}  # remote files that this process has found, by URL


class Stamp(NamedTuple):
    """Size of a file, and times that change when the file does; of a remote file, a number made of its version."""

    size: int
    mtime_ns: int
    ctime_ns: int


def is_remote(path: str) -> bool:
    """Whether a path or a pattern is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None and not path.startswith("file://")


def list_remote(url: str) -> list[str]:
    """Return the URLs of the files at a URL, below it if it is a folder, or that match it if it is a glob.

    Raises:
        UserError: the URL cannot be used or listed, or names no file.
    """
    if without_secrets(url) != url.rstrip("/"):
        raise UserError(
            f"{without_secrets(url)}: a URL with a password or a query would be written into the index of "
            "documents; leave them out, or download the files first"
        )
    found = find_remote(url)
    _known.update((status.url, status) for status in found)
    return [status.url for status in found]


def open_input(path: str) -> BinaryIO:
    """Open a file of the input.

    Raises:
        UserError: it cannot be read.
    """
    if is_remote(path):
        return cast(BinaryIO, open_remote(_status(path)))
    try:
        return open(path, "rb", BUFFER)
    except OSError as error:
        raise unreadable(path, error) from None


def input_size(path: str) -> int:
    """Return the size of a file of the input in bytes.

    Raises:
        UserError: it cannot be read.
    """
    return _status(path).size if is_remote(path) else stamp(path).size


def stamp(path: str) -> Stamp:
    """Return the present stamp of a file; that of a remote file is requested again.

    Raises:
        UserError: it cannot be read.
    """
    if is_remote(path):
        list_remote(path)
        number = int.from_bytes(hashlib.sha256(_known[path].version.encode()).digest()[:7], "big")
        return Stamp(_known[path].size, number, number)
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def remote_version(path: str) -> str:
    """Return what a store says of the version of a remote file's content; "" for a file on disk."""
    return _status(path).version if is_remote(path) else ""


def _status(path: str) -> FileStatus:
    if path not in _known:
        list_remote(path)
    return _known[path]


def unreadable(path: str, error: OSError) -> UserError:
    """Return the error for a file or a folder that cannot be read."""
    return UserError(f"{path}: cannot be read ({error.strerror or error}); check that it exists, and its permissions")
