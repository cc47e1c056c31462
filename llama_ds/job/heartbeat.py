"""The rank's side of supervision: it sends heartbeats, answers requests, and terminates if the supervisor disappears.

One thread does this and sleeps most of the time. Without a job there is no thread, and nobody reads `Progress`.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from llama_ds.errors import UserError
from llama_ds.job.departure import Departure
from llama_ds.job.folder import RETRY_S, Job
from llama_ds.job.requests import Request, Requests
from llama_ds.job.wire import (
    Beat,
    Kind,
    Phase,
    ProtocolError,
    as_json,
    frame,
    frames,
    from_json,
    hello,
    is_welcome,
    new_nonce,
    pack_beat,
)

REACH_S = 60.0  # timeout for the first connection to the supervisor
FROM_LAUNCHER = "asked by the launcher"
STACKS_SIGNAL = signal.SIGUSR2  # faulthandler dumps the stacks from C, even while Python hangs


class Progress:
    """The progress of this rank: the training loop writes it, the heartbeat thread reads it."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.step = 0  # completed steps
        self.doing: Callable[[], tuple[str, bool]] = lambda: ("", False)  # description; whether it waits for others
        self.queue: deque[dict[str, Any]] = deque()  # reports to send with the next heartbeat
        self.send: Callable[[], None] = lambda: None  # sends them at once
        self.host = socket.gethostname()  # replaced by the name in the hostfile, if there is one
        self.is_reporter = False  # one rank reports for the whole job
        self._since = time.monotonic()

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Enter a phase after `step` completed steps."""
        now = time.monotonic()
        if self.phase is not phase:
            done = self.step if step is None else step
            self.tell(what="phase", phase=int(self.phase), seconds=now - self._since, to=int(phase), step=done)
            self.phase, self._since = phase, now
            self.send()  # the supervisor times the phases of a restart
        if step is not None:
            self.step = step

    def tell(self, **values: Any) -> None:
        """Queue a report for the next heartbeat, if this rank reports for the job."""
        if self.is_reporter:
            self.queue.append(values)

    def beat(self) -> Beat:
        """Return the current state of this rank."""
        doing, waits = self.doing()
        return Beat(self.step, self.phase, waits, doing)


class HeartbeatConnection:
    """This rank's connection to its job's supervisor."""

    def __init__(
        self, job: Job, rank: int, progress: Progress, requests: Requests | None = None, can_leave: bool = False
    ) -> None:
        """Connect and start the heartbeat thread, which passes on the supervisor's requests.

        `can_leave`: whether this process can go on in another attempt after this one.

        Raises:
            UserError: the supervisor cannot be reached.
        """
        self.job, self.rank, self.progress, self._requests = job, rank, progress, requests
        progress.is_reporter, progress.host = rank == 0, job.rank_hosts[rank]
        self._token = job.token()
        self._about = {"rank": rank, "host": progress.host, "pid": os.getpid(), "can_leave": can_leave}
        self._socket: socket.socket | None = None
        self._sending = threading.Lock()
        self._ended = threading.Event()
        self._lost_since: float | None = None
        self._end_asked = False
        self._buffer = bytearray()  # received, not yet handled
        self._departure = Departure(self, job.orphan_s if job.keeps_ranks and can_leave else 0.0)
        if requests:
            requests.departure = self._departure
        progress.send = self._flush
        self._stacks = open(job.stacks(rank), "w")  # noqa: SIM115 (the fault handler keeps it open)
        faulthandler.register(STACKS_SIGNAL, self._stacks, all_threads=True)
        deadline = time.monotonic() + REACH_S
        while (problem := self._connect()) is not None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank {rank} on {socket.gethostname()} cannot reach the launcher at "
                    f"{job.server[0]}:{job.server[1]} ({problem}); open that port range to the hosts, or give the "
                    "launcher's address that they see with --listen"
                )
            time.sleep(RETRY_S)
        threading.Thread(target=self._serve, name="heartbeat", daemon=True).start()

    def tell(self, **values: Any) -> None:
        """Send the queued reports and then this one at once; a report that cannot be sent is lost."""
        self._flush()
        self._send(Kind.TELL, as_json(values))

    def close(self) -> None:
        """Report that this rank exits cleanly."""
        self._ended.set()
        self._flush()
        self._send(Kind.BEAT, pack_beat(self.progress.beat()))
        self._send(Kind.GOODBYE)

    def inode(self) -> int | None:
        """Return the inode of the connection's socket, None while there is none."""
        with suppress(OSError, AttributeError):  # it is lost at this moment
            return os.fstat(self._socket.fileno()).st_ino  # type: ignore[union-attr]
        return None

    def end(self) -> None:
        """Close this attempt's file and connection, by which the supervisor knows that the rank has joined the next."""
        self._ended.set()
        faulthandler.unregister(STACKS_SIGNAL)
        self._stacks.close()
        self._lose()

    def _serve(self) -> None:
        due = time.monotonic()
        while not self._ended.is_set():
            now = time.monotonic()
            if self._socket is None:
                if self._departure.has_left:  # the supervisor has no use for this rank, or is gone
                    os.kill(os.getpid(), signal.SIGKILL)
                self._check_orphaned(now)
                if self._connect() is not None:
                    self._ended.wait(RETRY_S)
                continue
            if now >= due:
                due = now + self.job.beat_s
                self._flush()
                self._send(Kind.BEAT, pack_beat(self.progress.beat()))
            self._receive(max(due - time.monotonic(), 0))

    def _receive(self, seconds: float) -> None:
        try:
            for kind, payload in frames(self._buffer):
                if kind is Kind.ASK:
                    self._answer(from_json(payload))
            connection = self._socket
            if connection is None or self._ended.is_set() or not select.select([connection], [], [], seconds)[0]:
                return
            chunk = connection.recv(1 << 16)
            if not chunk:
                raise ConnectionError("closed")
            self._buffer += chunk
        except (OSError, ValueError, ProtocolError):
            self._lose()

    def _answer(self, message: dict[str, Any]) -> None:
        request = message.get("do")
        if request == "stacks":
            self._send(Kind.STACKS, stacks().encode())
        elif request == "save":
            self._ask(Request.SAVE, FROM_LAUNCHER)
        elif request == "end":
            self._ask(Request.END, FROM_LAUNCHER)
        elif request == "leave":
            self._departure.ask()
        elif request == "join":
            self._ended.set()  # this thread; the main thread closes the connection
            self._departure.join(message)

    def _ask(self, request: Request, reason: str) -> None:
        if self._requests:
            self._requests.ask(request, reason, farewell=self.close)

    def _flush(self) -> None:
        with suppress(IndexError):  # the other thread took the last report
            while self._socket and self.progress.queue:
                self._send(Kind.TELL, as_json(self.progress.queue.popleft()))

    def _check_orphaned(self, now: float) -> None:
        """Save and exit if the supervisor stays unreachable; exit without a save if that takes too long."""
        self._lost_since = self._lost_since or now
        lost_s = now - self._lost_since
        prefix = f"rank {self.rank}: no connection to the launcher for {lost_s:.0f} s"
        if lost_s > self.job.orphan_s:
            print(f"{prefix}; terminating", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if lost_s > self.job.orphan_s / 3 and not self._end_asked:
            self._end_asked = True
            print(f"{prefix}; saving a checkpoint and exiting", file=sys.stderr, flush=True)
            self._ask(Request.END, f"no connection to the launcher for {lost_s:.0f} s")

    def _connect(self) -> str | None:
        """Connect and perform the handshake; return the reason of a failure."""
        try:
            connection = socket.create_connection(self.job.server, self.job.connect_s)
            try:
                self._shake_hands(connection)
            except BaseException:
                connection.close()
                raise
        except (OSError, ProtocolError) as error:
            return str(error)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A supervisor whose host vanishes closes no connection: unacknowledged heartbeats reveal it.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * self.job.unheard_s))
        self._socket, self._lost_since = connection, None
        return None

    def _shake_hands(self, connection: socket.socket) -> None:
        buffer = self._buffer = bytearray()  # a request may have arrived with the welcome

        def receive(wanted: Kind) -> bytes:
            while True:
                for kind, payload in frames(buffer):
                    if kind is wanted:
                        return payload
                    raise ProtocolError(f"{kind.name} instead of {wanted.name}")
                chunk = connection.recv(4096)
                if not chunk:
                    raise ProtocolError("refused: it is the launcher of another attempt")
                buffer.extend(chunk)

        server_nonce, own_nonce = receive(Kind.NONCE), new_nonce()
        connection.sendall(frame(Kind.HELLO, hello(self._token, server_nonce, own_nonce, self._about)))
        if not is_welcome(self._token, server_nonce, own_nonce, receive(Kind.WELCOME)):
            raise ProtocolError("the server does not know the job's token")

    def _send(self, kind: Kind, payload: bytes = b"") -> None:
        with self._sending:
            try:
                if self._socket:
                    self._socket.sendall(frame(kind, payload))
            except OSError:
                self._lose()

    def _lose(self) -> None:
        connection, self._socket = self._socket, None
        if connection:
            with suppress(OSError):
                connection.close()


class Heartbeat:
    """A rank's heartbeat if it belongs to a job; otherwise every method does nothing."""

    def __init__(self, requests: Requests | None = None) -> None:
        """`requests` gets those of the supervisor."""
        self.progress = Progress()
        self._requests = requests
        self._connection: HeartbeatConnection | None = None

    def begin(self, job: Job, rank: int, can_leave: bool = False) -> None:
        """Connect to the supervisor of `job`; arguments as of `HeartbeatConnection`.

        Raises:
            UserError: the supervisor cannot be reached.
        """
        self._connection = HeartbeatConnection(job, rank, self.progress, self._requests, can_leave)

    def tell(self, **values: Any) -> None:
        """Send a report to the supervisor at once, if there is one."""
        if self._connection:
            self._connection.tell(**values)

    def end(self) -> None:
        """Report that this rank exits cleanly."""
        if self._connection:
            self._connection.close()


def check_world(job: Job, rank: int, world: int) -> None:
    """Check that the launcher started as many ranks as the job has slots.

    Raises:
        UserError: the world size differs, for example because every process is a world of its own.
    """
    if world == job.world:
        return
    hint = "start the ranks that the hostfile has slots for"
    if world == 1:
        hint = "its processes do not know of each other: use the mpirun of the MPI that mpi4py was built with"
    raise UserError(
        f"{job.path('hostfile')}: has {job.world} slots, but {job.launcher} started rank {rank} of {world}; {hint}"
    )


def host_identity() -> str:
    """Return a unique identity of this host: containers share a boot id, and machines may share a name."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def check_hosts(job: Job, identities: list[str]) -> None:
    """Check that every rank runs on the host that the hostfile assigns to it, and hosts are distinct.

    Raises:
        UserError: a rank runs on another host, or two names mean one host.
    """
    found: dict[str, str] = {}
    for rank, (host, identity) in enumerate(zip(job.rank_hosts, identities, strict=True)):
        if found.setdefault(host, identity) != identity:
            raise UserError(
                f"{job.path('hostfile')}: rank {rank} belongs on {host}, but is on {identity.split()[0]}, apart "
                f"from the ranks before it; {job.launcher} must place ranks by slot, in the hostfile's order"
            )
    if len(set(found.values())) < len(found):
        first, second = next((a, b) for a in found for b in found if a != b and found[a] == found[b])
        raise UserError(
            f"{job.path('hostfile')}: the ranks of {first} and {second} are on one host, {found[first].split()[0]}; "
            "a host may stand under one name only, and must get the ranks of its own slots"
        )


def stacks() -> str:
    """Return the stack traces of all other threads of this process, the main thread first."""
    main, own = threading.main_thread().ident, threading.get_ident()
    frames_now = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    order = sorted((ident for ident in frames_now if ident != own), key=lambda ident: ident != main)
    parts = [
        f"{names.get(ident, 'a thread of C')}:\n{''.join(traceback.format_stack(frames_now[ident]))}" for ident in order
    ]
    return "\n".join(parts)


def keep_output(job: Job, rank: int) -> None:
    """Redirect stdout and stderr of this process to the rank's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(job.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def interface_towards(address: str) -> str | None:
    """Return the name of the network interface that routes to `address`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # no packet is sent
        except OSError:
            return None
        own = probe.getsockname()[0]
    return next((name for name, found in psutil.net_if_addrs().items() if any(a.address == own for a in found)), None)
