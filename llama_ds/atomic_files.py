"""Files that appear whole or not at all: a kill, an error or a full disk leaves the file that was there before."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = re.compile(r".*\.tmp(-.*)?")  # names of files in progress; earlier versions had the second form


@contextmanager
def atomic_file(path: str, durable: bool = False, temporary: str = "") -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends; an error in the block removes it.

    It has the permissions of the file that it replaces.

    durable: sync it to disk before the rename, so that a power failure cannot leave the name without the content.
    temporary: name of the file until the rename, if this process alone uses that; default: a name that no other uses.
    """
    temporary = temporary or f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "wb") as file:
            _copy_permissions(path, file.fileno())
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise


def write_atomically(path: str, content: str | bytes, durable: bool = False, temporary: str = "") -> None:
    """Write a file as `atomic_file` does."""
    with atomic_file(path, durable, temporary) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def overwrite(path: str, content: str | bytes) -> None:
    """Write a file that a user has named, durably and atomically; a link stays, and its target is written.

    What cannot be replaced is written in place: a device, a pipe, a mounted file, or one in a read-only folder.
    """
    target, data = os.path.realpath(path), content.encode() if isinstance(content, str) else content
    writable = os.access(target, os.W_OK) and os.access(os.path.dirname(target), os.W_OK)
    if os.path.exists(path) and not (os.path.isfile(path) and writable and not os.path.ismount(target)):
        Path(path).write_bytes(data)
    else:
        write_atomically(target, data, durable=True)


def _copy_permissions(path: str, file: int) -> None:
    if os.path.isfile(path):
        old = os.stat(path)
        with suppress(OSError):  # only members of a group may give a file to it, and only root to another owner
            os.fchown(file, -1, old.st_gid)
            os.fchown(file, old.st_uid, -1)
        if os.fstat(file).st_mode != old.st_mode:  # not every file system can change modes
            os.fchmod(file, stat.S_IMODE(old.st_mode))
