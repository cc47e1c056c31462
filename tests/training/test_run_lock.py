"""The lock on a run's folder: one job trains a run; a dead one hands over at once, a silent one after its lease."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_ds.errors import UserError
from llama_ds.job import run_lock
from llama_ds.job.folder import VARIABLE
from llama_ds.job.run_lock import LAUNCHER, RANKS, RunLock, check_unused, read_holder
from llama_ds.launch.job_files import lock_run, new_folder
from llama_ds.parallel.world import RankInfo
from llama_ds.training.run_in_use import locked


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beat often; the lease stays far above a pause of a busy machine, unless a test sets it."""
    monkeypatch.setattr(run_lock, "BEAT_S", 0.02)
    monkeypatch.setattr(run_lock, "POLL_S", 0.005)


@pytest.fixture
def lines() -> list[str]:
    return []


def lock(run: Path, lines: list[str] | None = None, job: str = "", attempt: str = "") -> RunLock:
    return RunLock(str(run), RANKS, job, attempt, (lines if lines is not None else []).append)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[RunLock]:
    """A lock that this process holds for a job of tools/launch.py."""
    one = lock(tmp_path / "run", job="jobs/0001", attempt="jobs/0001/attempt_01")
    one.acquire()
    yield one
    one.release()


@pytest.fixture
def elsewhere(held: RunLock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the lock is held, this process asks from another machine."""
    monkeypatch.setattr(run_lock, "_this_machine", lambda: "another machine")


def test_a_second_job_is_refused_and_told_of_the_first(held: RunLock, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError) as refused:
        lock(run).acquire()
    message = str(refused.value)
    assert message.startswith(f"{run}: this run is in use by another job: process {os.getpid()} of ")
    assert "on " + os.uname().nodename + " since 20" in message and "UTC, job folder jobs/0001; wait" in message
    assert f"kill -TERM {os.getpid()}" in message and "name=..." in message
    held.check()
    assert os.listdir(run) == [RANKS], "the refused start leaves nothing"


def test_the_end_leaves_nothing_and_the_next_job_starts_at_once(held: RunLock, tmp_path: Path) -> None:
    held.release()
    assert not (tmp_path / "run").exists()
    lines: list[str] = []
    after = lock(tmp_path / "run", lines)
    after.acquire()
    after.release()
    assert lines == []


def test_a_killed_process_of_this_machine_is_replaced_without_delay(tmp_path: Path, lines: list[str]) -> None:
    """The zombie that nobody has waited for yet counts as dead, and a process that reuses its number is another."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        lock(tmp_path).acquire()
        os.write(writer, b".")
        signal.pause()
    os.read(reader, 1)
    with pytest.raises(UserError, match=f"process {pid} of"):
        lock(tmp_path).acquire()
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    after = lock(tmp_path, lines)
    after.acquire()
    os.waitpid(pid, 0)
    assert [line.partition(": process")[0] for line in lines] == [
        f"{tmp_path}: taking over the lock of a job that has died"
    ]
    (file,) = (tmp_path / RANKS).iterdir()
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"started": content["started"] - 1}))
    again = lock(tmp_path, lines)
    again.acquire()
    again.release()


@pytest.mark.usefixtures("elsewhere")
def test_a_job_on_another_machine_is_refused_while_it_beats(held: RunLock, tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(UserError, match="in use by another job"):
        lock(tmp_path / "run", lines).acquire()
    assert len(lines) == 1 and "watching for up to 60 s whether the job that holds it is alive" in lines[0]


def test_a_silent_job_on_another_machine_is_taken_over_and_ends(
    held: RunLock, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it was only stopped: it must not train on beside the new one."""
    resumed = threading.Event()

    def stopped(*_: object) -> None:
        resumed.wait(60)
        raise FileNotFoundError

    touch = os.utime
    monkeypatch.setattr(os, "utime", stopped)
    monkeypatch.setattr(run_lock, "LEASE_S", 0.3)
    with monkeypatch.context() as patch:
        patch.setattr(run_lock, "_this_machine", lambda: "another machine")
        second = lock(tmp_path / "run", lines)
        second.acquire()
    assert ["watching" in lines[0], "taking over" in lines[1]] == [True, True]
    resumed.set()
    with pytest.raises(UserError, match="another job has taken this run over"):
        while True:
            held.check()
    monkeypatch.setattr(os, "utime", touch)
    held.release()
    found = read_holder(tmp_path / "run", RANKS)
    assert found and found.machine == "another machine", "the loser does not release the winner's lock"
    second.release()


@pytest.mark.usefixtures("elsewhere")
def test_the_next_attempt_of_a_job_starts_at_once_on_any_host(held: RunLock, tmp_path: Path, lines: list[str]) -> None:
    """Its supervisor has ended the attempt before; a rank of that attempt is still refused, and so are other jobs."""
    restarted = lock(tmp_path / "run", lines, job="jobs/0001", attempt="jobs/0001/attempt_02")
    restarted.acquire()
    assert lines == []
    with pytest.raises(UserError, match="in use"):
        lock(tmp_path / "run", lines, job="jobs/0002", attempt="jobs/0002/attempt_01").acquire()
    restarted.release()


def test_of_many_that_find_a_dead_job_one_wins(tmp_path: Path) -> None:
    """They race for the takeover and for the free lock; a winner that another one displaced would find itself lost."""
    dead = lock(tmp_path)
    dead.acquire()
    dead._released.set()
    (file,) = (tmp_path / RANKS).iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"started": 1}))
    racers, won, start = [lock(tmp_path) for _ in range(16)], [], threading.Barrier(16)

    def race(one: RunLock) -> None:
        start.wait()
        try:
            one.acquire()
        except UserError:
            return
        won.append(one)

    threads = [threading.Thread(target=race, args=(one,)) for one in racers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = won
    found = read_holder(tmp_path, RANKS)
    assert found and found.id == winner._own.id
    winner.release()


def test_a_job_keeps_its_run_between_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise another job could begin during the pause before a restart, and the restart would be refused."""
    run = str(tmp_path / "run")
    folder = new_folder(run)
    held = lock_run(run, folder, 60.0, lambda _: None)
    with pytest.raises(UserError, match=f"in use by another job: .*{folder}"), locked(run, RankInfo(0, 1, 0)):
        pass
    with pytest.raises(UserError, match="in use by another job"):
        check_unused(run)
    with pytest.raises(UserError, match="in use by another job"):
        lock_run(run, new_folder(run), 60.0, lambda _: None)
    assert [path.name for path in sorted((tmp_path / "run" / "jobs").iterdir())] == ["0001"], "no empty job remains"
    monkeypatch.setenv(VARIABLE, str(folder / "attempt_01"))
    with locked(run, RankInfo(0, 1, 0)) as check:
        check()
    held.release()
    assert not (tmp_path / "run" / LAUNCHER).exists()


def test_a_launcher_waits_for_ranks_whose_launcher_was_killed(tmp_path: Path, lines: list[str]) -> None:
    """They save and end by themselves; a run that was started without a launcher does not, so it is refused at once."""
    run = str(tmp_path)
    orphans = lock(tmp_path, job="jobs/0001", attempt="jobs/0001/attempt_01")
    orphans.acquire()

    def say(line: str) -> None:
        lines.append(line)
        orphans.release()

    lock_run(run, new_folder(run), 60.0, say).release()
    assert len(lines) == 1 and "ranks whose launcher is gone" in lines[0]
    alone = lock(tmp_path)
    alone.acquire()
    with pytest.raises(UserError, match="in use by another job"):
        lock_run(run, new_folder(run), 60.0, say)
    alone.release()


def test_a_folder_that_cannot_be_locked_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the run's lock .*; set output_dir to a writable folder"):
        lock(tmp_path / "file").acquire()


def test_what_is_no_lock_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SETTLE_S", 0.1)
    (tmp_path / RANKS).mkdir()
    (tmp_path / RANKS / "notes").write_text("mine")
    with pytest.raises(UserError, match="is no lock of a run, or cannot be read"):
        lock(tmp_path).acquire()
    assert (tmp_path / RANKS / "notes").read_text() == "mine"
