"""A failure that comes again at once in the same place ends the job; others are restarted up to the limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_supervisor_restarts import HOSTS, events, reports, supervisor

from llama_ds.job.folder import Job
from llama_ds.launch.command import Command
from llama_ds.launch.job_files import prepare
from llama_ds.launch.rendezvous import Rendezvous
from llama_ds.launch.supervise import attempt as outcomes
from llama_ds.launch.supervise.attempt import Attempt, Outcome, Watch
from llama_ds.launch.supervise.server import Server

HOST, OTHER = HOSTS


def failed(message: str, step: int = 7, host: str = HOST, rank: int = 0) -> Outcome:
    text = f"rank {rank} on {host} failed:\nTraceback (most recent call last):\n  File {rank}\nValueError: {message}\n"
    return Outcome(outcomes.FAILURE, text, step, [rank], [host])


def job_with(monkeypatch: pytest.MonkeyPatch, folder: Path, found: Sequence[Outcome], spares: bool = False) -> Any:
    """Return a supervisor whose attempts end with these outcomes, one after the other."""
    job = supervisor(folder, reports(*[True] * 9))
    answers = iter(found)
    monkeypatch.setattr(job, "_rendezvous", lambda hosts, again: Rendezvous("10.0.0.1", 1, "127.0.0.1"))
    monkeypatch.setattr(job, "_run_attempt", lambda *_: next(answers))
    job.host_pool.spares = {"spare": 8} if spares else {}
    return job


DEATH = Outcome(outcomes.DEATH, "RANK DIED", 7, hosts=[HOST])
LOST = failed("Connection closed by peer [10.0.0.2]:4711")


@pytest.mark.parametrize(
    ("found", "spares", "attempts"),
    [
        ([failed("tensor at 0x7f12 is bad"), failed("tensor at 0x7f99 is bad", rank=9, host=OTHER)], False, 2),
        ([Outcome(outcomes.LAUNCHER, "no rank has started", 0)] * 2, False, 2),
        ([failed("a"), failed("b"), failed("b")], False, 3),
        ([failed("a"), failed("a", step=8), failed("a", step=9), failed("a", step=9)], False, 4),
        ([DEATH] * 3, False, 3),
        ([LOST] * 3, False, 3),
        ([failed("a"), failed("a"), failed("a", host=OTHER)], True, 3),
    ],
    ids=["twice", "no start", "another message", "progress", "death", "communication", "the host's own"],
)
def test_attempts_until_the_job_ends(
    found: list[Outcome], spares: bool, attempts: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two restarts without progress are allowed: without the rule each of these jobs takes three attempts or more."""
    job = job_with(monkeypatch, tmp_path, found, spares)
    assert job.supervise() == 1
    kinds = [event["event"] for event in events(job)]
    assert sum(kind in (outcomes.FAILURE, outcomes.LAUNCHER, outcomes.DEATH) for kind in kinds) == attempts
    assert kinds[-1] == "gave up"


def test_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = job_with(monkeypatch, tmp_path, [failed("bad row 3"), failed("bad row 3")])
    job.supervise()
    assert events(job)[-1]["text"] == (
        "the same failure came again at step 7, and would after another restart: ValueError: bad row 3; "
        f"see {tmp_path}, fix the cause and run the same command again"
    )


@pytest.mark.parametrize(
    ("log", "code", "kind"),
    [
        ("node1: error: environment: RANK = 'x' is not a whole number", 2, outcomes.MISTAKE),
        ("error: run.yaml: cannot be read", 2, outcomes.MISTAKE),
        ("ssh: connect to host node1 port 22: No route to host", 255, outcomes.LAUNCHER),
        ("error: something", 1, outcomes.LAUNCHER),
    ],
)
def test_a_mistake_of_a_rank_that_never_connected_is_one(log: str, code: int, kind: str, tmp_path: Path) -> None:
    """The supervisor restarted such a job to the limit."""
    server = Server("127.0.0.1")
    try:
        job = Job(str(tmp_path / "attempt"), {HOST: 1}, "pdsh", server.address, 5, 60)
        prepare(job, [])
        job.launcher_log.write_text(f"starting\n{log}\n")
        attempt = Attempt(job, Command([], {}, "", "", ""), server, Watch(), None, print)  # type: ignore[arg-type]
        outcome = attempt._launcher_failed(code)
    finally:
        server.close()
    assert outcome.kind == kind
    assert outcome.kind != outcomes.MISTAKE or outcome.text == log.removeprefix("node1: ")
