"""Lets this rank leave an attempt that another rank has broken, and go on in the next one in the same process.

The supervisor asks for it over the heartbeat's connection. Then a thread shuts down all other TCP connections of this
process until the main thread has left: whatever it waits for raises an error. After "left" the rank waits, still
sending heartbeats, until the supervisor sends it the next attempt. A rank whose connection is lost meanwhile ends.
"""

from __future__ import annotations

import os
import queue
import socket
import stat
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from llama_ds.job import devices
from llama_ds.job.shown_process import replace_process

SEVER_S = 0.05  # pause between two searches for connections
OF_PROCESS = ("heartbeat", "leaving", "tqdm_monitor")  # threads that may outlive an attempt
LINGER_S = 2.0  # time for threads and connections to end by themselves


class Connection(Protocol):
    """The connection to the supervisor, as far as a departure needs it."""

    def tell(self, **values: Any) -> None:
        """Send a report at once."""

    def inode(self) -> int | None:
        """Return the inode of its socket."""

    def end(self) -> None:
        """Close it."""


class Departure:
    """The departure of one rank from one attempt. Its threads and connections until now outlive the attempt."""

    def __init__(self, connection: Connection, patience_s: float) -> None:
        """`patience_s`: how long a rank with a broken connection waits to be asked; 0: it is never asked."""
        self._connection, self._patience_s = connection, patience_s
        self._asked, self._gone = threading.Event(), threading.Event()
        self._next: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        self._before = set(threading.enumerate())
        self._severing = threading.Thread(target=self._sever, name="leaving", daemon=True)
        self.has_left = False

    @property
    def possible(self) -> bool:
        """Whether the supervisor keeps ranks."""
        return self._patience_s > 0

    @property
    def asked(self) -> bool:
        """Whether the supervisor has asked this rank to leave."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Begin to shut down connections. From any thread."""
        if self.possible and not self._asked.is_set():
            self._asked.set()
            self._severing.start()

    def wait_until_asked(self) -> bool:
        """Return whether this rank is to leave, once that is known."""
        return self._asked.wait(self._patience_s)

    def tell(self, **values: Any) -> None:
        """Send a report to the supervisor."""
        self._connection.tell(**values)

    def remains(self) -> str:
        """Wait up to LINGER_S until threads and connections of the attempt have ended; return what is left of them."""
        deadline = time.monotonic() + LINGER_S
        while left := self._remains():
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        return left

    def end(self) -> None:
        """Say that nothing of the attempt is left."""
        self._gone.set()
        if self._severing.is_alive():
            self._severing.join()  # it would take connections of the next attempt for those of this one
        self.has_left = True
        self.tell(what="left")

    def become_next(self, environment: Mapping[str, str]) -> list[str]:
        """Wait for the next attempt and make this process one of its ranks; return its arguments.

        `environment` is that of the start of this process, to which each attempt adds its own variables.
        """
        following = self._next.get()
        of_job = {name: value for name, value in environment.items() if name != devices.VARIABLE}
        replace_process([sys.executable, "-u", *following["argv"]], {**of_job, **following["environment"]})
        os.chdir(following["folder"])
        self._connection.end()
        return list(following["argv"])

    def join(self, request: Mapping[str, Any]) -> None:
        """Hand the next attempt to the main thread: "argv", "environment" and "folder", as to a warm process."""
        self._next.put(request)

    def _sever(self) -> None:
        while not self._gone.is_set():
            for one in tcp_sockets(self._connection.inode()):
                with suppress(OSError), one:
                    one.getpeername()  # raises if it listens: a shutdown would keep its event loop busy
                    one.shutdown(socket.SHUT_RDWR)
            self._gone.wait(SEVER_S)

    def _remains(self) -> str:
        threads = [t.name for t in set(threading.enumerate()) - self._before if t.name not in OF_PROCESS]
        sockets = 0
        for one in tcp_sockets(self._connection.inode()):
            one.close()
            sockets += 1
        words = [f"the thread {name}" for name in threads]
        return ", ".join(words + ([f"{sockets} sockets"] if sockets else []))


def tcp_sockets(but: int | None) -> list[socket.socket]:
    """Return duplicates of the TCP sockets of this process, but for the one with this inode."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            file = os.dup(int(name))
            about = os.fstat(file)
            if not stat.S_ISSOCK(about.st_mode) or about.st_ino == but:
                os.close(file)
                continue
            one = socket.socket(fileno=file)
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                found.append(one)
            else:
                one.close()
    return found
