"""Logging of the package: one logger, one line format, silent on ranks that are told to be."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("llama_ds")


def setup(quiet: bool = False) -> None:
    """Send the package's log lines to stderr; with `quiet` only errors (ranks other than the first)."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.ERROR if quiet else logging.INFO)


def silence_libraries() -> None:
    """Keep off the console what libraries say that no user can act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings(  # DeepSpeed calls collectives by names that torch has replaced
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning, r"torch\.distributed\.c10d_logger"
    )


@contextmanager
def without_profiler_marks() -> Iterator[None]:
    """Leave out of stderr the lines with which libkineto marks a profile's begin and end at its every log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            os.write(2, b"".join(line for line in written if not line.startswith(b"USDT:")))
