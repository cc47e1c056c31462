"""How a run ends, in the words of boards."""

from __future__ import annotations

from enum import Enum


class RunEnd(Enum):
    """The state in which a start of a run leaves its boards."""

    FINISHED = "finished"  # after its last step
    INTERRUPTED = "interrupted"  # as asked, before its last step
    FAILED = "failed"
