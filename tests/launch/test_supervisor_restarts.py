"""Between two attempts: a temporary outage of hosts does not end a job, and unreachable ranks terminate themselves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llama_ds.config.run_file import load_run
from llama_ds.errors import UserError
from llama_ds.job.folder import Job
from llama_ds.launch.job_files import prepare
from llama_ds.launch.preflight import HostFinding, Report
from llama_ds.launch.supervise import attempt as outcomes
from llama_ds.launch.supervise.attempt import Outcome, Watch
from llama_ds.launch.supervise.host_pool import HostPool
from llama_ds.launch.supervise.server import Server
from llama_ds.launch.supervise.supervisor import Bounds, Start, Supervisor

ROOT = Path(__file__).resolve().parents[2]
RUN_FILE = str(ROOT / "ds_configs" / "llama_7b.yaml")
HOSTS = {"nowhere1.invalid": 8, "nowhere2.invalid": 8}


def supervisor(folder: Path, examine: Callable[[Mapping[str, int]], Report]) -> Supervisor:
    run = load_run(RUN_FILE, [])
    bounds = Bounds(restarts=2, backoff_s=0.01)
    return Supervisor(
        run, Start(RUN_FILE, [], "train.py"), HostPool(run, HOSTS), Watch(), bounds, folder, examine, lambda text: None
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


RANK = """
import signal, sys, time
from llama_ds.job.heartbeat import HeartbeatConnection, Progress
from llama_ds.job.folder import current
signal.signal(signal.SIGTERM, signal.SIG_IGN)
heartbeat = HeartbeatConnection(current({"LLAMA_DS_JOB": sys.argv[1]}), 0, Progress())
while True:
    time.sleep(1)
"""


def test_a_rank_that_is_heard_no_more_has_ended_within_the_fence(tmp_path: Path) -> None:
    """A rank that survives on a host without ssh must not write any more when the next attempt starts."""
    server = Server("127.0.0.1")
    job = Job(str(tmp_path / "attempt"), {"localhost": 1}, "pdsh", server.address, beat_s=0.2, orphan_s=1.5)
    prepare(job, [])
    server.expect(job.token(), job.world)
    rank = subprocess.Popen([sys.executable, "-c", RANK, job.folder], cwd=ROOT)
    try:
        while 0 not in server.members or not server.last_beat[0]:
            server.poll()
            time.sleep(0.05)
        server.dismiss()
        assert rank.wait(job.fence_s) == -9
    finally:
        rank.kill()
        rank.wait()
        server.close()
