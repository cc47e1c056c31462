"""What may stand on the console of a normal run: our own lines, and nothing that a library says."""

from __future__ import annotations

import re

OURS = re.compile(
    r"""
    \d\d:\d\d:\d\d\ (INFO|WARNING|ERROR)\ (?!.*Warning)  # our logger's
    | step\ \d+(/\d+)?\ \|\                                # training's
    | \d+\ of\ \d+\ hosts\ have\ answered | measuring\ \d+\ hosts   # preflight's
    | job\ folder:\  | all\ \d+\ ranks\ have\ connected | all\ ranks\ exited\ cleanly   # the launcher's
    | read\ \d+\ of\ \d+\ pipelines | wrote\                # the analysis', the planner's
    | rank\ \d+\ computes\ products\ at\b   # a measurement's
    """,
    re.VERBOSE,
)


def foreign_lines(text: str) -> list[str]:
    """Return the lines that no program of ours has written."""
    return [line for line in text.splitlines() if line.strip() and not OURS.match(line)]
