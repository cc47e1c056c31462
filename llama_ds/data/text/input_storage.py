"""Files of the input: opening them, and their sizes."""

from __future__ import annotations

import os
from typing import BinaryIO

from llama_ds.errors import UserError


def open_input(path: str) -> BinaryIO:
    """Open a file of the input.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from None


def input_size(path: str) -> int:
    """Return the size of a file of the input in bytes.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: str, error: OSError) -> UserError:
    """Return the error for a file or a folder that cannot be read."""
    return UserError(f"{path}: cannot be read ({error.strerror or error}); check that it exists, and its permissions")
