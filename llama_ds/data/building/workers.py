"""Worker processes for tasks. The messages that a task's `run` yields are sent back immediately.

concurrent.futures does not suffice: its processes outlive a killed parent, cannot be stopped at once after an error in
one of them, and return nothing before a task is finished.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Protocol

from llama_ds.child_processes import without_interrupts
from llama_ds.errors import UserError


class WorkerTask(Protocol):
    """A task that any process can run."""

    def run(self) -> Iterator[object]:
        """Run the task and yield its messages."""


class WorkerPool(Protocol):
    """Processes that run tasks; a context manager that ends them."""

    def __enter__(self) -> WorkerPool: ...

    def __exit__(self, *error: object) -> None: ...

    @property
    def size(self) -> int:
        """Number of tasks that can run at the same time."""

    @property
    def is_free(self) -> bool:
        """Whether a task can be started."""

    def start(self, task: WorkerTask) -> None:
        """Start a task."""

    def receive(self) -> list[object]:
        """Wait until a message arrives or a task finishes; return the messages received since the last call.

        Raises:
            UserError: a task raised it, or a process was killed.
        """


class Done:
    """Message: the task is finished."""


class Failed:
    """Message: the task raised an error; `is_user_error` if it was a UserError."""

    def __init__(self, text: str, is_user_error: bool) -> None:
        self.text, self.is_user_error = text, is_user_error

    @classmethod
    def of(cls, error: Exception) -> Failed:
        """Return the message for an error; call it while the error is handled."""
        if isinstance(error, UserError):
            return cls(str(error), True)
        if isinstance(error, MemoryError):
            return cls("the memory does not suffice; run the same command again, with fewer --workers", True)
        if isinstance(error, OSError):
            fix = "repair that and run the same command again to resume the build"
            return cls(f"{error.filename or 'a file'}: {error.strerror or error}; {fix}", True)
        return cls(f"in a worker process:\n{traceback.format_exc()}", False)

    def exception(self) -> Exception:
        """Return the error for the process that receives the message."""
        return UserError(self.text) if self.is_user_error else RuntimeError(self.text)


class ThisProcess:
    """Runs one task at a time in this process; `receive` runs it up to its next message."""

    size = 1

    def __init__(self) -> None:
        self._messages: Iterator[object] | None = None

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def is_free(self) -> bool:
        """Whether a task can be started."""
        return self._messages is None

    def start(self, task: WorkerTask) -> None:
        """Start a task."""
        self._messages = task.run()

    def receive(self) -> list[object]:
        """Wait until a message arrives or a task finishes; return the messages received since the last call."""
        for message in self._messages or ():
            return [message]
        self._messages = None
        return []


class Workers:
    """Runs tasks in processes; a context manager that kills them on exit."""

    def __init__(self, count: int) -> None:
        context = get_context("spawn")
        resource_tracker.ensure_running()  # unblocks SIGINT when it starts, also for the process started next
        self._processes: dict[Connection, SpawnProcess] = {}
        self._free: deque[Connection] = deque()
        self._busy: list[Connection] = []
        try:
            for _ in range(count):
                self._start_process(context)
        except BaseException:
            self.__exit__()
            raise

    def _start_process(self, context: SpawnContext) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        with without_interrupts():
            process.start()
            self._processes[ours] = process
            self._free.append(ours)
        theirs.close()  # so that the pipe closes when the process ends

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            process.join()
            connection.close()

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self._processes)

    @property
    def is_free(self) -> bool:
        """Whether a task can be started."""
        return bool(self._free)

    @property
    def running(self) -> list[Connection]:
        """Connections of the processes that run tasks."""
        return list(self._busy)

    def start(self, task: WorkerTask) -> None:
        """Send a task to a free process."""
        connection = self._free.popleft()
        self._busy.append(connection)
        try:
            connection.send(task)
        except OSError:
            raise self._died(connection) from None

    def receive(self) -> list[object]:
        """Wait until a message arrives or a task finishes; return the messages received since the last call.

        Raises:
            UserError: a task raised it, or a process was killed.
        """
        messages: list[object] = []
        for connection in wait(self._busy):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, OSError):
                raise self._died(connection) from None
            if isinstance(message, Failed):
                raise message.exception()
            if isinstance(message, Done):
                self._busy.remove(connection)
                self._free.append(connection)
            else:
                messages.append(message)
        return messages

    def _died(self, connection: Connection) -> UserError:
        process = self._processes[connection]
        process.join(10)
        code = process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return UserError(
            f"a worker process (pid {process.pid}) of the build was killed ({how}; the system does so when memory runs "
            "out); run the same command again to resume the build, with fewer --workers if memory is short"
        )


def workers(count: int) -> WorkerPool:
    """Return `count` worker processes, or this process if `count` is 1."""
    return Workers(count) if count > 1 else ThisProcess()


def _work(connection: Connection) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    while True:
        try:
            task: WorkerTask = connection.recv()
        except EOFError:  # the parent has exited
            return
        try:
            for message in task.run():
                connection.send(message)
            connection.send(Done())
        except Exception as error:
            connection.send(Failed.of(error))


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
