"""Processes that stop at one of the steps that they take in a folder, until the test has done something else there."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from commit_points import Points, without_writes

Act = Callable[[], object]


class Held:
    """A process that has come to a point, or has ended without coming to it."""

    def __init__(self, process: int, going_on: int) -> None:
        self._process, self._going_on = process, going_on

    def release(self) -> bool:
        """Let the process do what is left; return whether it could."""
        with suppress(BrokenPipeError):  # it has ended
            os.write(self._going_on, b".")
        return os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1]) == 0


@contextmanager
def held(folder: str, act: Act, at: Callable[[str], bool]) -> Iterator[Held]:
    """Have another process `act`, and wait until it is about to do something in `folder` whose point fulfils `at`."""
    arrived, arriving = os.pipe()
    to_go_on, going_on = os.pipe()
    write = os.write  # not the one that is watched

    def stop(point: str, _: int) -> None:
        if at(point):
            write(arriving, b".")
            os.read(to_go_on, 1)

    process = os.fork()
    if not process:
        status = 1
        try:
            os.close(going_on)  # so that it goes on where the test ends
            Points(folder, stop, None)
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(arriving)
    os.close(to_go_on)
    os.read(arrived, 1)
    try:
        yield Held(process, going_on)
    finally:
        os.close(arrived)
        os.close(going_on)


def note(file: int, point: str) -> None:
    """Write a point down."""
    os.writev(file, [point.encode() + b"\n"])  # os.write is watched


def points_of(folder: str, act: Act, log: Path) -> list[str]:
    """Return the points that a process which acts passes in a folder: of a file's writes the first and the last."""
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
    chosen = {*others, *(point for own in writes for point in (own[0], own[-1]))}
    return [point for point in points if point in chosen]
