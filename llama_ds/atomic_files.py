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
    """Open a file for writing that replaces `path` when the block ends; an error removes it, and leaves `path`.

    It has the permissions of the file that it replaces.

    durable: sync it to disk before the rename, so that a power failure cannot leave the name without the content.
    temporary: name of the file until the rename, `path`.tmp by default, which the next writer uses again after a kill.
        Where several processes may write at once, each needs its own: `temporary_name`.
    """
    temporary = temporary or f"{path}.tmp"
    file = open(temporary, "wb")  # noqa: SIM115 (what cannot be opened is not removed)
    try:
        with file:
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


def temporary_name(path: str) -> str:
    """Return a name beside `path` that no other process uses, of at most 255 bytes."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f"{name[:60]}.{secrets.token_hex(4)}.tmp")


def write_atomically(path: str, content: str | bytes, durable: bool = False, temporary: str = "") -> None:
    """Write a file as `atomic_file` does."""
    with atomic_file(path, durable, temporary) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def overwrite(path: str, content: str | bytes) -> None:
    """Write a file that a user has named, atomically and synced; a link stays, and its target is written.

    What cannot be replaced, or would be another file afterwards, is written in place: a device, a pipe, a mounted file,
    one in a read-only folder or of another user, one with several names, or the log that stdout is.
    """
    target, data = os.path.realpath(path), content.encode() if isinstance(content, str) else content
    if os.path.exists(path) and not _replaceable(os.stat(path), target):
        Path(path).write_bytes(data)
    else:
        write_atomically(target, data, durable=True, temporary=temporary_name(target))


def _replaceable(found: os.stat_result, target: str) -> bool:
    alone = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and not os.path.ismount(target)
    own = os.geteuid() in (0, found.st_uid) and not any(_is_stream(found, number) for number in range(3))
    return alone and own and os.access(target, os.W_OK) and os.access(os.path.dirname(target), os.W_OK)


def _is_stream(found: os.stat_result, number: int) -> bool:
    try:
        return os.path.samestat(os.fstat(number), found)
    except OSError:  # closed
        return False


def _copy_permissions(path: str, file: int) -> None:
    if os.path.isfile(path):
        old = os.stat(path)
        with suppress(OSError):  # only members of a group may give a file to it, and only root to another owner
            os.fchown(file, -1, old.st_gid)
            os.fchown(file, old.st_uid, -1)
        new, mode = os.fstat(file), stat.S_IMODE(old.st_mode)
        if new.st_gid != old.st_gid:
            mode &= ~stat.S_IRWXG  # they were another group's
        if stat.S_IMODE(new.st_mode) != mode:  # not every file system can change modes
            os.fchmod(file, mode)
