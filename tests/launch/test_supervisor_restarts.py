"""Between two attempts: a temporary outage of hosts does not end a job, and unreachable ranks terminate themselves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from llama_ds.config.run_file import load_run
from llama_ds.errors import Corruption, UserError
from llama_ds.job.folder import Job
from llama_ds.job.wall_time import JobStart
from llama_ds.job.wire import Beat, Phase
from llama_ds.launch.job_files import prepare
from llama_ds.launch.preflight import HostFinding, Report
from llama_ds.launch.rendezvous import Rendezvous
from llama_ds.launch.supervise import attempt as outcomes
from llama_ds.launch.supervise import supervisor as supervisor_module
from llama_ds.launch.supervise.attempt import Outcome, Watch, _reported_failure
from llama_ds.launch.supervise.host_pool import HostPool
from llama_ds.launch.supervise.server import Member, Server
from llama_ds.launch.supervise.supervisor import (
    MAX_BACKOFF_S,
    LaunchSettings,
    ListedHosts,
    RestartLimits,
    Supervisor,
)

ROOT = Path(__file__).resolve().parents[2]
RUN_FILE = str(ROOT / "ds_configs" / "llama_7b.yaml")
HOSTS = {"nowhere1.invalid": 8, "nowhere2.invalid": 8}


def supervisor(folder: Path, examine: Callable[[Mapping[str, int]], Report]) -> Supervisor:
    run = load_run(RUN_FILE, [])
    limits = RestartLimits(restarts=2, backoff_s=0.01)
    return Supervisor(
        run,
        LaunchSettings(RUN_FILE, [], "train.py"),
        HostPool(run, HOSTS),
        Watch(),
        limits,
        folder,
        examine,
        lambda text: None,
    )


def events(of: Supervisor) -> list[dict[str, Any]]:
    return [json.loads(line) for line in of.events.path.read_text().splitlines()]


def reports(*good: bool) -> Callable[[Mapping[str, int]], Report]:
    """Return a preflight that finds all hosts good or all bad, as listed call by call."""
    answers = iter(good)

    def examine(hosts: Mapping[str, int]) -> Report:
        bad = [] if next(answers) else [HostFinding(host, "answer", "error", "no route") for host in hosts]
        return Report(list(hosts), bad)

    return examine


DEATH = Outcome(outcomes.DEATH, "RANK DIED", 100, ranks=[0], hosts=["nowhere1.invalid"])


def test_a_network_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    job = supervisor(tmp_path, reports(False, False, True))
    assert job._prepare_restart(DEATH, HOSTS, 1) == HOSTS
    assert [event["event"] for event in events(job)] == [
        *("preflight", "too few hosts", "preflight", "too few hosts", "preflight", "restart"),
    ]


def test_accounts_that_are_slow_to_read_hold_up_no_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "ACCOUNTS_S", 0.01)
    job, read = supervisor(tmp_path, reports(True)), Event()
    job._accounts = lambda: {"failures": float(read.wait(60))}
    assert job._known_accounts() == {}
    job._prepare_restart(DEATH, HOSTS, 1)
    assert job._known_accounts() == {}
    read.set()
    monkeypatch.setattr(supervisor_module, "ACCOUNTS_S", 60)
    assert job._known_accounts() == {"failures": 1.0}


def test_one_that_does_not_is_waited_for_no_more_often_than_restarts_are_allowed(tmp_path: Path) -> None:
    job = supervisor(tmp_path, reports(*[False] * 9))
    with pytest.raises(UserError, match="0 good hosts with 0 slots are left, too few"):
        job._prepare_restart(DEATH, HOSTS, 1)
    assert sum(event["event"] == "preflight" for event in events(job)) == 3


def test_a_first_host_that_is_gone_at_a_restart_is_one_more_failure(tmp_path: Path) -> None:
    """At the first start it is a user error; later the job continues without the host."""
    job = supervisor(tmp_path, reports())
    with pytest.raises(UserError, match=r"nowhere1\.invalid: the first host does not answer"):
        job._rendezvous(HOSTS, again=False)
    outcome = job._rendezvous(HOSTS, again=True)
    assert isinstance(outcome, Outcome)
    assert (outcome.kind, outcome.hosts) == (outcomes.HOST_LOST, ["nowhere1.invalid"])
    assert job._exit_code(outcome, 1) is None


def test_no_restart_begins_after_the_jobs_time_limit(tmp_path: Path) -> None:
    """Each restart had the whole limit anew, until the scheduler killed the job without a checkpoint."""
    job = supervisor(tmp_path, reports())
    job.run = load_run(RUN_FILE, ["checkpoint.wall_time_s=3600"])
    assert job._exit_code(DEATH, 1) is None
    job._job_start = JobStart(job._job_start.at - 3481, "")
    assert job._exit_code(DEATH, 1) == 1
    assert "no time for a restart is left of checkpoint.wall_time_s = 3600; the same" in events(job)[-1]["text"]


def test_each_restart_in_a_row_waits_twice_as_long(tmp_path: Path) -> None:
    """Restarts without a pause would be used up before a file system or a switch is back; after progress none waits."""
    job = supervisor(tmp_path, reports())
    assert [job._backoff_s(in_a_row) for in_a_row in (1, 2, 3, 4)] == [0, 0.01, 0.02, 0.04]
    assert job._backoff_s(100) == MAX_BACKOFF_S


def test_hostfiles_that_change_during_a_job_count_at_the_next_restart(tmp_path: Path) -> None:
    """One that cannot be read, because it is just being written, changes nothing."""
    job = supervisor(tmp_path, reports(True))
    found: Iterator[ListedHosts | UserError] = iter(
        [UserError("hosts: line 3"), ListedHosts({**HOSTS, "new": 8}, {}, {"new": "1,2"})]
    )

    def read() -> ListedHosts:
        now = next(found)
        if isinstance(now, UserError):
            raise now
        return now

    job._read_hosts = read
    job._read_hosts_again()
    assert job.host_pool.hosts == HOSTS
    job._read_hosts_again()
    assert list(job.host_pool.all_hosts) == [*HOSTS, "new"]
    assert job.start.devices == {"new": "1,2"}
    assert [event.get("text") for event in events(job)] == [
        "HOSTFILE: hosts: line 3; the job goes on with the hosts that it has",
        "the hostfiles have changed: with new",
    ]


def test_a_host_with_wrong_weights_is_drained_and_the_job_goes_on(tmp_path: Path) -> None:
    """At once, not after a second failure; of two hosts that differ either may be right, so that both stay."""
    job = supervisor(tmp_path, reports(True, True))
    spare = {"nowhere3.invalid": 8}
    job.host_pool.spares = spare
    host = list(HOSTS)[1]
    report = {"kind": Corruption.kind, "text": "CORRUPTION: rank 8", "ranks": [8, 9]}
    member = Member(0, next(iter(HOSTS)), {"pid": 1}, beat=Beat(40, Phase.TRAINING, False, ""))
    found = _reported_failure(member, report, [host for host in HOSTS for _ in range(8)])
    assert (found.kind, found.hosts, found.ranks, found.step) == (outcomes.CORRUPTION, [host], [8, 9], 40)
    assert job._exit_code(found, 1) is None
    pair = Outcome(outcomes.CORRUPTION, "CORRUPTION", 40, ranks=[0, 8], hosts=list(HOSTS))
    assert job._prepare_restart(pair, HOSTS, 1) == HOSTS
    assert job._prepare_restart(found, HOSTS, 1) == {next(iter(HOSTS)): 8, **spare}


RANK = """
import signal, sys, time
from llama_ds.job.heartbeat import HeartbeatConnection, Progress
from llama_ds.job.folder import current
signal.signal(signal.SIGTERM, signal.SIG_IGN)
connection = HeartbeatConnection(current({"LLAMA_DS_JOB": sys.argv[1]}), 0, Progress())
while True:
    time.sleep(1)
"""


@contextmanager
def heard_rank(folder: Path) -> Iterator[tuple[Server, Job, subprocess.Popen[bytes]]]:
    """Start a process that is rank 0 of a job, and yield once its supervisor hears it."""
    server = Server("127.0.0.1")
    job = Job(str(folder / "attempt"), {"localhost": 1}, "pdsh", server.address, beat_s=0.2, orphan_s=1.5)
    prepare(job, [])
    server.expect(job.token(), job.world)
    rank = subprocess.Popen([sys.executable, "-c", RANK, job.folder], cwd=ROOT)
    try:
        hear(server, rank)
        yield server, job, rank
    finally:
        rank.kill()
        rank.wait()
        server.close()


def hear(server: Server, rank: subprocess.Popen[bytes]) -> None:
    """Return when the rank beats."""
    while 0 not in server.members or not server.last_beat[0]:
        assert rank.poll() is None, "the rank has ended"
        server.poll()
        time.sleep(0.05)


def test_a_rank_that_is_heard_no_more_has_ended_within_the_fence(tmp_path: Path) -> None:
    """It is alive and reachable, but ssh to it is not: when the next attempt starts it must not write any more."""
    with heard_rank(tmp_path) as (server, job, rank):
        server.dismiss()
        assert rank.wait(job.fence_s) == -9


def test_a_rank_that_is_heard_again_counts_the_next_break_anew(tmp_path: Path) -> None:
    """A network that is away for a moment twice a day would end a sound run."""
    with heard_rank(tmp_path) as (server, job, rank):
        for _ in range(2):
            server.expect(job.token(), job.world)  # closes the connection, and takes the next one
            hear(server, rank)
            time.sleep(job.orphan_s)
        hear(server, rank)
        assert rank.poll() is None


def test_a_restart_is_warm_only_after_an_attempt_that_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked ranks may fail where fresh ones work, and would then use up all restarts."""
    trained, warm, ended = iter([True, False, True]), [], []

    class FakeAttempt:
        def __init__(self, *arguments: Any) -> None:
            self.has_trained = next(trained)

        def run(self, asked: bool, kept: None) -> Outcome:
            warm.append(asked)
            return Outcome(outcomes.DEATH, "RANK DIED")

        def end(self, kept: None) -> list[str]:
            ended.append(len(warm))
            return []

    monkeypatch.setattr(supervisor_module, "Attempt", FakeAttempt)
    monkeypatch.setattr(supervisor_module, "command_of", lambda *arguments: None)
    job = supervisor(tmp_path, lambda hosts: Report(list(hosts), []))
    listener: Any = SimpleNamespace(address=("127.0.0.1", 1))
    for number in (1, 2, 3):
        job._run_attempt(number, HOSTS, Rendezvous("127.0.0.1", 1, "127.0.0.1"), listener)
    assert warm == [False, True, False]

    def broken() -> ListedHosts:
        raise OSError("the hostfile is gone")

    job._read_hosts, trained = broken, iter([True])
    with pytest.raises(OSError, match="the hostfile is gone"):
        job._run_attempt(4, HOSTS, Rendezvous("127.0.0.1", 1, "127.0.0.1"), listener)
    assert ended == [1, 2, 3, 4], "ranks are killed whatever happens"
