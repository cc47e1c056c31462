"""Atomic file writes, and the user error for a disk that is full or broken."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from llama_ds.errors import UserError

TEMPORARY = ".tmp-"  # followed by host and process id, because a worker may outlive a killed build


@contextmanager
def atomic_writer(path: str, expected_bytes: int = 0, wait: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that is renamed to `path` once it is complete; on an error nothing is left.

    `wait`: sync it to disk before the rename, so that a power failure cannot leave the name without the content.

    Raises:
        UserError: it cannot be written; for a full disk, names the folder, the space needed (at least
            `expected_bytes`) and the free space.
    """
    temporary = f"{path}{TEMPORARY}{socket.gethostname()}-{os.getpid()}"
    with reporting_write_errors(path, expected_bytes):
        try:
            with open(temporary, "wb") as file:
                yield file
                if wait:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.remove(temporary)
            raise


@contextmanager
def reporting_write_errors(path: str, expected_bytes: int = 0) -> Iterator[None]:
    """Convert a system error while writing `path`, such as a full disk or quota, into a UserError."""
    try:
        yield
    except OSError as error:
        folder, name = os.path.split(path)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename if isinstance(error.filename, str) else path
            raise UserError(
                f"{where}: cannot be written or read ({error.strerror or error}); the build in {folder} needs it: "
                "repair that and run the same command again to resume the build, or choose another --out"
            ) from None
        raise UserError(
            f"{folder}: the disk or the quota is full ({error.strerror}): {name} takes {max(1, expected_bytes)} bytes, "
            f"{_free(folder)} are free; make room and run the same command again to resume the build"
        ) from None


def _free(folder: str) -> int:
    while not os.path.isdir(folder or "."):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder or ".").free
