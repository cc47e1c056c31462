"""Logging of the package: one logger with one line format; ranks can be set to log only errors."""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from llama_ds.shipped import as_typed

logger = logging.getLogger("llama_ds")


class _Formatter(logging.Formatter):
    """Spells commands as the user types them."""

    def format(self, record: logging.LogRecord) -> str:
        return as_typed(super().format(record))


def setup(quiet: bool = False) -> None:
    """Send the package's log lines to stderr; with `quiet` (all ranks but the first) only errors."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.ERROR if quiet else logging.INFO)


def silence_libraries() -> None:
    """Suppress library log lines and warnings that users cannot act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings(  # DeepSpeed uses deprecated names of collectives
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning, r"torch\.distributed\.c10d_logger"
    )


def console_is_gone(error: OSError) -> bool:
    """Return whether whoever read stdout is gone, a pipe's reader or a terminal; further output then goes nowhere."""
    if error.errno not in (errno.EPIPE, errno.EIO):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return True


@contextmanager
def only_warnings() -> Iterator[None]:
    """Suppress the package's log lines below warnings."""
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def without_profiler_marks() -> Iterator[None]:
    """Remove from stderr the lines that libkineto prints, at every log level, when a profile starts and ends."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            captured.seek(0)
            os.write(2, b"".join(line for line in captured if not line.startswith(b"USDT:")))
