"""Atomic file writes, and the user error for a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from llama_ds.errors import UserError

TEMPORARY = ".tmp-"  # followed by the process id, because a worker may outlive a killed build


@contextmanager
def atomic_writer(path: str, expected_bytes: int = 0, wait: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that is renamed to `path` once it is complete; on an error nothing is left.

    `wait`: sync it to disk before the rename, so that a power failure cannot leave the name without the content.

    Raises:
        UserError: the disk is full; names the folder, the space needed (at least `expected_bytes`) and the free space.
    """
    temporary = f"{path}{TEMPORARY}{os.getpid()}"
    with reporting_full_disk(path, expected_bytes):
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
def reporting_full_disk(path: str, expected_bytes: int = 0) -> Iterator[None]:
    """Convert the system error of a full disk or quota, while writing `path`, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder, name = os.path.split(path)
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"{folder}: the disk or the quota is full ({error.strerror}): {name} takes {max(1, expected_bytes)} bytes, "
            f"{free} are free; make room and run the same command again to resume the build"
        ) from None
