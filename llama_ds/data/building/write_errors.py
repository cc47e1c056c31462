"""Atomic files of a build, and the user error for a disk that is full or broken."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from llama_ds.atomic_files import atomic_file, temporary_name
from llama_ds.errors import UserError


@contextmanager
def atomic_writer(path: str, expected_bytes: int = 0, wait: bool = True) -> Iterator[BinaryIO]:
    """Open a file of a build as `atomic_file` does; `wait`: it is durable.

    Raises:
        UserError: it cannot be written; for a full disk, names the folder, the space needed (at least
            `expected_bytes`) and the free space.
    """
    with reporting_write_errors(path, expected_bytes), atomic_file(path, wait, temporary_name(path)) as file:
        yield file


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
