"""Logging of the package: one logger, one line format, silent on ranks that are told to be."""

from __future__ import annotations

import logging
import sys
import warnings

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
    """Keep off the console what libraries say that no user can act on; to be called before they are imported."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings(  # DeepSpeed calls collectives by names that torch has replaced
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning, r"torch\.distributed\.c10d_logger"
    )
