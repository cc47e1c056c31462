"""Files that are there with all their content or not at all, and the one error of a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from llama_ds.errors import UserError

TEMPORARY = ".tmp-"  # and the process: one that outlives a killed build must not write into another's file


@contextmanager
def writing(path: str, expected_bytes: int = 0, wait: bool = True) -> Iterator[BinaryIO]:
    """Give a file to write that takes the name `path` when all of it is written; on an error nothing is left.

    `wait` for the disk, so that a power failure cannot take the content and leave the name.

    Raises:
        UserError: the disk is full; names the folder, what the file needs (at least `expected_bytes`) and what is free.
    """
    temporary = f"{path}{TEMPORARY}{os.getpid()}"
    with naming_a_full_disk(path, expected_bytes):
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
def naming_a_full_disk(path: str, expected_bytes: int = 0) -> Iterator[None]:
    """Turn the system's error of a full disk or quota, on writing `path`, into one that a user can act upon."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder, name = os.path.split(path)
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"{folder}: the disk or the quota is full ({error.strerror}): {name} takes {max(1, expected_bytes)} bytes, "
            f"{free} are free; make room and run the same command again, it goes on where it stopped"
        ) from None
