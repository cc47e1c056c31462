"""The lock on a run's folder: two jobs of one run would overwrite each other's checkpoints and mix their metrics.

A lock is a folder that contains one file, named by the random id of its holder. Each change is one rename:

| | from | to | fails if |
|---|---|---|---|
| acquire | `NAME.ID`, a folder with the file `ID` | `NAME` | `NAME` contains a file: somebody holds the lock |
| take over | `NAME/OTHER` | `NAME.dead-OTHER`, then deleted | the holder is no longer `OTHER` |
| release | `NAME/ID` is deleted | | |

Renames are atomic on every file system that hosts share. flock is not used: without a lock service (NFS with `nolock`,
Lustre without `-o flock`) it excludes only processes of one host, or fails.

Whether a holder lives: on its own machine its process is looked up, so that a killed job delays nobody. From another
machine its heartbeats are watched: it touches its file every BEAT_S, and is dead after LEASE_S without a change. Only
changes count, not their times, because clocks of hosts differ. A holder that was stopped for longer and taken over
finds its file gone at its next heartbeat, and ends; its checkpoints were shut out before (`checkpoint/attempt.py`).
"""

from __future__ import annotations

import getpass
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from llama_ds.errors import UserError
from llama_ds.job.folder import VARIABLE
from llama_ds.log import logger

RANKS, LAUNCHER = "ranks.lock", "launcher.lock"  # held by the first rank; by tools/launch.py, also between attempts
BEAT_S = 5.0
LEASE_S = 60.0  # time without a heartbeat after which a holder on another machine counts as dead
POLL_S = 0.2
SETTLE_S = 10.0  # time for a lock that others are changing to settle


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    id: str
    machine: str  # host name, boot and process namespace: only there is the process id meaningful
    host: str
    pid: int
    started: int  # start time of the process in clock ticks since boot, because process ids are reused
    user: str
    since: float  # seconds since the epoch
    job: str  # folder of the job that tools/launch.py has started; "" without one
    attempt: str  # folder of its attempt; "" for a launcher

    def __str__(self) -> str:
        what = f", job folder {self.job}" if self.job else ""
        since = datetime.fromtimestamp(self.since, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.pid} of {self.user} on {self.host} since {since}{what}"


class RunLock:
    """One of the locks of a run's folder."""

    def __init__(
        self, run_dir: str, name: str, job: str = "", attempt: str = "", say: Callable[[str], None] = logger.info
    ) -> None:
        """`job` and `attempt` are the folders of the job by tools/launch.py that this process belongs to.

        `say` gets a line for each event that a user should know of.
        """
        self.run_dir, self._name = Path(run_dir), name
        self._path = self.run_dir / name
        self._own = _this_process(job, attempt)
        self._say = say
        self._made_folder = False
        self._released = threading.Event()
        self._lost = False

    def acquire(self) -> None:
        """Acquire the lock, take it over from a dead process, or wait until a silent one on another host is judged.

        Raises:
            UserError: a living job holds it, or the folder cannot be written.
        """
        try:
            self._made_folder = not self.run_dir.exists()
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._wait_for()
        except OSError as error:
            raise UserError(
                f"{self.run_dir}: cannot write the run's lock ({error.strerror}); set output_dir to a writable folder"
            ) from None
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def check(self) -> None:
        """Check that no other job has taken the lock over.

        Raises:
            UserError: one has, because this process was stopped or cut off from the file system.
        """
        if self._lost:
            raise UserError(
                f"{self.run_dir}: another job has taken this run over, because nothing was heard of this one for "
                f"{LEASE_S:.0f} s; only the other one continues"
            )

    def release(self) -> None:
        """Release the lock, if this process still holds it."""
        self._released.set()
        with suppress(OSError):
            (self._path / self._own.id).unlink()
        for folder in (self._path, *([self.run_dir] if self._made_folder else [])):
            with suppress(OSError):  # not empty
                folder.rmdir()

    def _wait_for(self) -> None:
        deadline = time.monotonic() + SETTLE_S
        while not self._claim():
            holder = read_holder(self.run_dir, self._name)
            if holder is None and time.monotonic() > deadline:
                raise UserError(
                    f"{self._path}: is no lock of a run, or cannot be read; make sure that no job of this run is "
                    "running, and remove it"
                )
            if holder is None:  # it was released or taken over meanwhile, or a network file system is late
                time.sleep(POLL_S)
                continue
            if not is_dead(self.run_dir, self._name, holder, self._own, self._say):
                raise in_use(self.run_dir, holder)
            if not self._is_of_own_job(holder):
                self._say(f"{self.run_dir}: taking over the lock of a job that has died: {holder}")
            self._remove(holder)
            deadline = time.monotonic() + SETTLE_S

    def _is_of_own_job(self, holder: Holder) -> bool:
        return bool(holder.job) and holder.job == self._own.job

    def _claim(self) -> bool:
        prepared = self.run_dir / f"{self._name}.{self._own.id}"
        prepared.mkdir(exist_ok=True)
        try:
            (prepared / self._own.id).write_text(json.dumps(asdict(self._own)), encoding="utf-8")
            os.rename(prepared, self._path)
        except OSError:
            shutil.rmtree(prepared, ignore_errors=True)
            if not self._path.is_dir():
                raise
        # A network file system may answer a repeated request with an error though the first one was carried out.
        return (self._path / self._own.id).exists()

    def _remove(self, holder: Holder) -> None:
        moved = self.run_dir / f"{self._name}.dead-{holder.id}"
        with suppress(FileNotFoundError):  # another start was faster
            os.rename(self._path / holder.id, moved)
            moved.unlink()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                os.utime(self._path / self._own.id)
            except FileNotFoundError:
                self._lost = not self._released.is_set()
                return
            except OSError:  # the file system may answer again at the next heartbeat
                continue


def lock_for_ranks(run_dir: str) -> RunLock:
    """Acquire the lock of a run for its ranks, which may belong to a job of tools/launch.py; return it.

    Raises:
        UserError: another job trains the run, or is about to start its ranks again.
    """
    attempt = os.environ.get(VARIABLE, "")
    job = os.path.dirname(attempt)
    lock = RunLock(run_dir, RANKS, job, attempt)
    lock.acquire()
    if launcher := living_holder(run_dir, LAUNCHER, job):
        lock.release()
        raise in_use(run_dir, launcher)
    return lock


def read_holder(run_dir: Path, name: str) -> Holder | None:
    """Return the holder of a lock; None if there is none, or the lock changes at this moment."""
    try:
        (file,) = [path for path in (run_dir / name).iterdir() if not path.name.startswith(".")]
        return Holder(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def living_holder(run_dir: str, name: str, job: str, say: Callable[[str], None] = logger.info) -> Holder | None:
    """Return the holder of a lock if it lives and does not belong to `job`."""
    holder = read_holder(Path(run_dir), name)
    if holder is None or (job and holder.job == job):
        return None
    return None if is_dead(Path(run_dir), name, holder, _this_process(job, ""), say) else holder


def check_unused(run_dir: str) -> None:
    """Check that no living job holds a run, whose folder is going to be removed.

    Raises:
        UserError: one does.
    """
    for name in (RANKS, LAUNCHER):
        if holder := living_holder(run_dir, name, ""):
            raise in_use(run_dir, holder)


def is_dead(run_dir: Path, name: str, holder: Holder, asking: Holder, say: Callable[[str], None]) -> bool:
    """Return whether the holder of a lock has ended, or released it.

    An earlier attempt of the asking job has: its supervisor starts the next one only when all ranks have ended.
    """
    if holder.job and holder.job == asking.job and holder.attempt != asking.attempt:
        return True
    if holder.machine == asking.machine:
        return _has_ended_here(holder)
    say(f"{run_dir}: watching for up to {LEASE_S:.0f} s whether the job that holds it is alive: {holder}")
    path = run_dir / name / holder.id
    first, until = _changed(path), time.monotonic() + LEASE_S
    while time.monotonic() < until:
        time.sleep(POLL_S)
        if (now := _changed(path)) != first:
            return now is None
    return True


def in_use(run_dir: Path | str, holder: Holder) -> UserError:
    """Return the error for a run that a living job holds."""
    return UserError(
        f"{run_dir}: this run is in use by another job: {holder}; wait for its end, end it (kill -TERM {holder.pid} on "
        f"{holder.host} saves a checkpoint first), or train under another name (name=...)"
    )


def wait_until_free(run_dir: str, holder: Holder, seconds: float, say: Callable[[str], None]) -> bool:
    """Wait until ranks without a launcher have saved and ended; return whether they have released the lock."""
    say(f"{run_dir}: waiting up to {seconds:.0f} s until ranks whose launcher is gone have saved and ended: {holder}")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(POLL_S)
        now = read_holder(Path(run_dir), RANKS)
        if now is None or now.id != holder.id or _has_ended_here(now):
            return True
    return False


def _has_ended_here(holder: Holder) -> bool:
    return holder.machine == _this_machine() and _started(holder.pid) != holder.started


def _changed(path: Path) -> int | None:
    """Return the time of a file's last change in ns, None without the file. Opening makes NFS ask the server."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _this_process(job: str, attempt: str) -> Holder:
    host, pid = socket.gethostname(), os.getpid()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"user {os.getuid()}"
    return Holder(secrets.token_hex(8), _this_machine(), host, pid, _started(pid) or 0, user, time.time(), job, attempt)


def _this_machine() -> str:
    return " ".join([socket.gethostname(), _text("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid")])


def _started(pid: int) -> int | None:
    """Return the start time of a living process, None if there is none (a zombie has ended)."""
    state = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(state[19]) if state and state[0] not in "ZX" else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
