"""Worker processes of a build on several hosts, which share its files: input, tokenizer and output at the same paths.

The build starts one command for each host (`serve`, over ssh), whose stdin and stdout carry tasks and messages. When
either side ends, so does the connection, and with it the host's processes.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from llama_ds.data.building.workers import Done, Failed, Workers, WorkerTask
from llama_ds.errors import UserError
from llama_ds.log import logger

GREETING = b"llama_ds build host\n"  # first bytes of a host: shells may print something else before
SHARED = "hosts-"  # first part of the name of the file by which hosts see that they share the output
LOOK_S = 60.0  # time after its start in which a build's hosts look for that file
END_S = 5.0  # time for a host's command to end by itself


@dataclass(frozen=True)
class Ready:
    """First message of a host: its number of processes."""

    workers: int


class _Host:
    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self.size, self.free = name, 0, 0
        ours, theirs = socket.socketpair()
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        try:
            self.process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=self.errors, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"host {name}: {command[0]} cannot be started ({error.strerror}); install it") from None
        finally:
            theirs.close()
        self.connection = Connection(ours.detach())
        self._greeted = False

    def receive(self) -> object:
        """Return the next message; None for the greeting."""
        if self._greeted:
            return self.connection.recv()
        found = b""
        while len(found) < len(GREETING) and (more := os.read(self.connection.fileno(), len(GREETING) - len(found))):
            found += more
        if not found:
            raise EOFError
        if found != GREETING:
            raise UserError(
                f"host {self.name}: its shell prints {found.decode(errors='replace').strip()!r} before the answer of a "
                "command; let its start-up files print nothing in shells that are not interactive"
            )
        self._greeted = True
        return None

    def lost(self) -> UserError:
        """Return the error for a host whose connection has ended."""
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            code = None
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or [f"exit code {code}"]
        return UserError(
            f"host {self.name}: the connection to its worker processes has ended ({lines[-1]}); run the same command "
            "again to resume the build, without this host if it is down"
        )

    def end(self) -> None:
        """Wait until the host's command ends, which it does when its connection is closed."""
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.errors.close()


class HostWorkers:
    """A pool of worker processes on hosts; a context manager that ends them on exit."""

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        """Start the command of each host, which must run `serve` there."""
        self._hosts = [_Host(name, command) for name, command in commands.items()]

    def __enter__(self) -> HostWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            host.connection.close()
        for host in self._hosts:
            host.end()

    @property
    def size(self) -> int:
        """Number of processes of all hosts that have answered."""
        return sum(host.size for host in self._hosts)

    @property
    def is_free(self) -> bool:
        """Whether a task can be started."""
        return any(host.free for host in self._hosts)

    def start(self, task: WorkerTask) -> None:
        """Send a task to the host with the most free processes."""
        host = max(self._hosts, key=lambda host: host.free)
        host.free -= 1
        try:
            host.connection.send(task)
        except OSError:
            raise host.lost() from None

    def receive(self) -> list[object]:
        """Wait until a message arrives or a task finishes; return the messages received since the last call.

        Raises:
            UserError: a task raised it, or a host was lost.
        """
        messages: list[object] = []
        hosts = {host.connection: host for host in self._hosts}
        for connection in wait(list(hosts)):
            assert isinstance(connection, Connection)
            host = hosts[connection]
            try:
                message = host.receive()
            except (EOFError, OSError):
                raise host.lost() from None
            if isinstance(message, Failed):
                raise Failed(f"host {host.name}: {message.text}", message.is_user_error).exception()
            if isinstance(message, Ready):
                host.size = host.free = message.workers
                logger.info("host %s builds with %d processes", host.name, message.workers)
            elif isinstance(message, Done):
                host.free += 1
            elif message is not None:
                messages.append(message)
        return messages


@contextmanager
def shared_file(folder: str) -> Iterator[str]:
    """Write a file by which hosts can tell whether they share the folder, for the time of the block.

    It is locked, by which the files of killed builds are recognised, and removed.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        for left in Path(folder).glob(f"{SHARED}*"):
            _remove_unlocked(left)
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=SHARED)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
    with file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file.name


def _remove_unlocked(path: Path) -> None:
    """Remove a file that no build holds, unless it is so new that it may belong to one whose lock is not seen here."""
    with suppress(OSError), open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - path.stat().st_mtime > LOOK_S:
            path.unlink()


def serve(workers: int, shared: str) -> None:
    """Run the tasks that arrive on stdin in `workers` processes, and send their messages to stdout, until stdin ends.

    `shared` is a file that the build has written. Call it once, in a process of its own.
    """
    tasks, answers = _Inbox(Connection(os.dup(0), writable=False)), Connection(os.dup(1), readable=False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the build, which ends its hosts
    os.write(answers.fileno(), GREETING)
    try:
        if not os.path.isfile(shared):
            raise UserError(
                f"{os.path.dirname(shared)}: this host does not see the files that the build writes there; choose an "
                "--out that all hosts share"
            )
        with Workers(workers) as pool:
            answers.send(Ready(workers))
            _run(pool, tasks, answers)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the build has ended
        return
    except Exception as error:
        answers.send(Failed.of(error))


class _Inbox:
    """Tasks read by a thread, so that the build can always send one: it receives no message while it sends."""

    def __init__(self, connection: Connection) -> None:
        self._tasks: SimpleQueue[WorkerTask] = SimpleQueue()
        self.signal, self._signaller = os.pipe()  # a byte for each task; closed after the last one
        threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def next(self) -> WorkerTask:
        """Return the next task. Raises EOFError if none will follow."""
        if not os.read(self.signal, 1):
            raise EOFError
        return self._tasks.get()

    def _read(self, connection: Connection) -> None:
        try:
            while True:
                self._tasks.put(connection.recv())
                os.write(self._signaller, b".")
        except (EOFError, OSError):
            os.close(self._signaller)


def _run(pool: Workers, tasks: _Inbox, answers: Connection) -> None:
    while True:
        if tasks.signal in wait([tasks.signal, *pool.running]):
            pool.start(tasks.next())
            continue
        before = len(pool.running)
        for message in pool.receive():
            answers.send(message)
        for _ in range(before - len(pool.running)):
            answers.send(Done())
