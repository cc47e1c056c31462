"""Processes that stop at a given operation in a folder until the test lets them continue."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from commit_points import Points, without_writes

Act = Callable[[], object]


class Held:
    """A process that has reached a point, or has ended without reaching it."""

    def __init__(self, process: int, resume: int) -> None:
        self._process, self._resume = process, resume

    def release(self) -> bool:
        """Let the process continue to its end; return whether it succeeded."""
        with suppress(BrokenPipeError):  # the process has ended
            os.write(self._resume, b".")
        return os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1]) == 0


@contextmanager
def held(folder: str, act: Act, at: Callable[[str], bool]) -> Iterator[Held]:
    """Run `act` in another process, and wait until it is at a point in `folder` for which `at` is true."""
    arrived, arriving = os.pipe()
    resumed, resume = os.pipe()
    write = os.write  # the original, which `Points` does not watch

    def stop(point: str, _: int) -> None:
        if at(point):
            write(arriving, b".")
            os.read(resumed, 1)

    process = os.fork()
    if not process:
        status = 1
        try:
            os.close(resume)  # so that the process continues if the test ends early
            Points(folder, stop, None)
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(arriving)
    os.close(resumed)
    os.read(arrived, 1)
    try:
        yield Held(process, resume)
    finally:
        os.close(arrived)
        os.close(resume)


def note(file: int, point: str) -> None:
    """Append a point to a log file."""
    os.writev(file, [point.encode() + b"\n"])  # os.write is watched


def points_of(folder: str, act: Act, log: Path) -> list[str]:
    """Return the points of `act` in a folder; of the writes to a file, only the first and the last."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    process = os.fork()
    if not process:
        status = 1
        try:
            Points(folder, lambda point, _: note(file, point), None)
            act()
            status = 0
        finally:
            os._exit(status)
    os.close(file)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    points = [point for point in log.read_text().splitlines() if not point.startswith("synced")]
    others, writes = without_writes(points)
    chosen = {*others, *(point for of_file in writes for point in (of_file[0], of_file[-1]))}
    return [point for point in points if point in chosen]
