"""Logging of the package: one logger, one line format, silent on ranks that are told to be."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("llama_ds")


def setup(quiet: bool = False) -> None:
    """Send the package's log lines to stderr; with `quiet` only errors (ranks other than the first)."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
