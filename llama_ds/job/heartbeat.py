"""A rank's side of being supervised: it says where it is, answers when asked, and ends when nobody is left to ask.

All of it is one thread that sleeps. Without a job there is no thread, and `Progress` is a few attributes that nobody
reads.
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
from llama_ds.job.folder import RETRY_S, Job
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

REACH_S = 60.0  # to find the supervisor at the start
STACKS_SIGNAL = signal.SIGUSR2  # has the C library write the stacks, also while Python hangs


class Progress:
    """Where this rank is. Written by the training, read by whoever wants to know."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.step = 0  # steps done
        self.doing: Callable[[], tuple[str, bool]] = lambda: ("", False)  # in words, and whether it waits for others
        self.told: deque[dict[str, Any]] = deque()  # to go with the next beat
        self.host = socket.gethostname()  # what people call it: its name in the hostfile, where there is one
        self.speaks = False  # for the job: one rank tells what all know
        self._since = time.monotonic()

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Begin a phase, with `step` steps done."""
        now = time.monotonic()
        if self.phase is not phase:
            self.tell(what="phase", phase=int(self.phase), seconds=now - self._since)
            self.phase, self._since = phase, now
        if step is not None:
            self.step = step

    def tell(self, **values: Any) -> None:
        """Have the supervisor told something with the next beat, if this rank is the one that does."""
        if self.speaks:
            self.told.append(values)

    def beat(self) -> Beat:
        """Return where this rank is now."""
        doing, waits = self.doing()
        return Beat(self.step, self.phase, waits, doing)


class HeartbeatConnection:
    """This rank's connection to its job's supervisor."""

    def __init__(self, job: Job, rank: int, progress: Progress) -> None:
        """Connect and begin to beat.

        Raises:
            UserError: the supervisor cannot be reached.
        """
        self.job, self.rank, self.progress = job, rank, progress
        progress.speaks, progress.host = rank == 0, job.places[rank]
        self._token = job.token()
        self._about = {"rank": rank, "host": progress.host, "pid": os.getpid()}
        self._socket: socket.socket | None = None
        self._sending = threading.Lock()
        self._ended = threading.Event()
        self._lost_since: float | None = None
        self._term_sent = False
        self._stacks = open(job.stacks(rank), "w")  # noqa: SIM115 (the fault handler needs it to the end)
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
        threading.Thread(target=self._attend, name="attendance", daemon=True).start()

    def tell(self, **values: Any) -> None:
        """Tell the supervisor something now, after what waits to be told; what cannot be said is lost."""
        self._flush()
        self._send(Kind.TELL, as_json(values))

    def close(self) -> None:
        """Say that this rank ends as it should."""
        self._ended.set()
        self._flush()
        self._send(Kind.BEAT, pack_beat(self.progress.beat()))
        self._send(Kind.GOODBYE)

    def _attend(self) -> None:
        due = time.monotonic()
        buffer = bytearray()
        while not self._ended.is_set():
            now = time.monotonic()
            if self._socket is None:
                self._orphaned(now)
                buffer.clear()
                if self._connect() is not None:
                    self._ended.wait(RETRY_S)
                continue
            if now >= due:
                due = now + self.job.beat_s
                self._flush()
                self._send(Kind.BEAT, pack_beat(self.progress.beat()))
            self._listen(buffer, max(due - time.monotonic(), 0))

    def _listen(self, buffer: bytearray, seconds: float) -> None:
        try:
            connection = self._socket
            if connection is None or not select.select([connection], [], [], seconds)[0]:
                return
            chunk = connection.recv(1 << 16)
            if not chunk:
                raise ConnectionError("closed")
            buffer += chunk
            for kind, payload in frames(buffer):
                if kind is Kind.ASK:
                    self._answer(from_json(payload).get("do"))
        except (OSError, ValueError, ProtocolError):
            self._lose()

    def _answer(self, wanted: Any) -> None:
        if wanted == "stacks":
            self._send(Kind.STACKS, stacks().encode())
        elif wanted == "save":
            os.kill(os.getpid(), signal.SIGUSR1)
        elif wanted == "end":
            os.kill(os.getpid(), signal.SIGTERM)

    def _flush(self) -> None:
        with suppress(IndexError):  # the other thread has taken the last one
            while self.progress.told:
                self._send(Kind.TELL, as_json(self.progress.told.popleft()))

    def _orphaned(self, now: float) -> None:
        """Save and end when the supervisor stays away, and end without when that takes too long."""
        self._lost_since = self._lost_since or now
        gone = now - self._lost_since
        if gone > self.job.orphan_s:
            print(f"rank {self.rank}: the launcher is gone for {gone:.0f} s; ending", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if gone > self.job.orphan_s / 3 and not self._term_sent:
            self._term_sent = True
            print(
                f"rank {self.rank}: the launcher is gone for {gone:.0f} s; saving, ending", file=sys.stderr, flush=True
            )
            os.kill(os.getpid(), signal.SIGTERM)

    def _connect(self) -> str | None:
        """Connect and shake hands; return what went wrong, if anything."""
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
        # A supervisor whose host vanishes closes nothing: beats that nobody acknowledges tell.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * self.job.unheard_s))
        self._socket, self._lost_since = connection, None
        return None

    def _shake_hands(self, connection: socket.socket) -> None:
        buffer = bytearray()

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

        theirs, own = receive(Kind.NONCE), new_nonce()
        connection.sendall(frame(Kind.HELLO, hello(self._token, theirs, own, self._about)))
        if not is_welcome(self._token, theirs, own, receive(Kind.WELCOME)):
            raise ProtocolError("who answers does not know the job's token")

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
    """A rank's attendance where it is part of a job, and nothing where it is not."""

    def __init__(self) -> None:
        self.progress = Progress()
        self._attendance: HeartbeatConnection | None = None

    def begin(self, job: Job, rank: int) -> None:
        """Attend `job`.

        Raises:
            UserError: its supervisor cannot be reached.
        """
        self._attendance = HeartbeatConnection(job, rank, self.progress)

    def tell(self, **values: Any) -> None:
        """Tell the supervisor something now, if there is one."""
        if self._attendance:
            self._attendance.tell(**values)

    def end(self) -> None:
        """Say that this rank ends as it should."""
        if self._attendance:
            self._attendance.close()


def check_world(job: Job, rank: int, world: int) -> None:
    """Check that the launcher started the ranks that the job is to have.

    Raises:
        UserError: it started another number, such as many jobs of one rank each.
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
    """Return what tells this host from any other: containers share a boot, machines may share a name."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def check_hosts(job: Job, identities: list[str]) -> None:
    """Check that ranks are where the hostfile says: those of a line together, and no others there.

    Raises:
        UserError: they are not.
    """
    places: dict[str, str] = {}
    for rank, (host, identity) in enumerate(zip(job.places, identities, strict=True)):
        if places.setdefault(host, identity) != identity:
            raise UserError(
                f"{job.path('hostfile')}: rank {rank} belongs on {host}, but is on {identity.split()[0]}, apart "
                f"from the ranks before it; {job.launcher} must place ranks by slot, in the hostfile's order"
            )
    if len(set(places.values())) < len(places):
        first, second = next((a, b) for a in places for b in places if a != b and places[a] == places[b])
        raise UserError(
            f"{job.path('hostfile')}: the ranks of {first} and {second} are on one host, {places[first].split()[0]}; "
            "a host may stand under one name only, and must get the ranks of its own slots"
        )


def stacks() -> str:
    """Return where every thread of this process is, the main one first."""
    main, own = threading.main_thread().ident, threading.get_ident()
    frames_now = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    order = sorted((ident for ident in frames_now if ident != own), key=lambda ident: ident != main)
    parts = [
        f"{names.get(ident, 'a thread of C')}:\n{''.join(traceback.format_stack(frames_now[ident]))}" for ident in order
    ]
    return "\n".join(parts)


def keep_output(job: Job, rank: int) -> None:
    """Send all that this process prints from now on to its own file."""
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(job.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def interface_towards(address: str) -> str | None:
    """Return the name of the network interface by which this host reaches `address`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # no packet is sent
        except OSError:
            return None
        own = probe.getsockname()[0]
    return next((name for name, found in psutil.net_if_addrs().items() if any(a.address == own for a in found)), None)
