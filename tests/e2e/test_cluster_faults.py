"""Faults in a job on real hosts: its losses equal those of an undisturbed run.

Three or four hosts, each with its own network, processes and sshd; DeepSpeed's launcher over pdsh and ssh.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import QUICK, Job, slow_links, start, stop
from launching import TRAIN, forked, succeed
from tiny_run import Run

from tests.hosts import Hosts, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

# Slow links make these few steps last through all faults.
LAYOUT = {
    "parallel.pp": 2,
    "model.num_hidden_layers": 2,
    "training.steps": 100,
    "optimizer.lr": 1e-3,  # at the tiny run's 3e-3 rounding grows to 2e-3 of the loss in 60 steps, here to 3e-7
    "checkpoint.interval": 5,
    "checkpoint.keep_last": 3,
}
ORPHAN_S = 12.0  # the supervisor waits longer than this for a vanished host, until its ranks have certainly ended
LEARN_S = 6.0  # time for the supervisor to learn the duration of steps; it polls twice a second
DETECTED_S = 15.0  # limit for the detection of a killed rank on a machine with two cores


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(4, tmp_path_factory.mktemp("hosts"), before=slow_links(2)) as those:
        yield those


@pytest.fixture(scope="module")
def whole(make_run: Callable[..., Run]) -> Run:
    """The undisturbed run: four ranks on this machine."""
    run = make_run("whole", LAYOUT)
    succeed(forked(4, TRAIN, run.file), run.log)
    return run


def test_stopped_killed_while_saving_and_cut_off(
    hosts: Hosts, whole: Run, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """Three faults in a job of pp 2, dp 2 on two hosts with two spares; losses equal an undisturbed run's.

    Each time it goes on from the memory of the hosts, after the last step but one at least.
    """
    memory = tmp_path / "memory"
    memory.mkdir()
    run = make_run("faults", LAYOUT | {"checkpoint.memory_interval": 1, "checkpoint.memory_folder": str(memory)})
    spares = hosts.write_hostfile(run.file.with_suffix(".spares"), 2, ["node3", "node4"])
    job = start(run, hosts, ["node1", "node2"], 2, "--supervise", "--spares", str(spares), orphan_s=ORPHAN_S)
    try:
        job.wait_for_attempt(1)
        time.sleep(LEARN_S)
        stop(job.ranks("node1")[1])
        job.wait_for(lambda: job.named("hang"))

        job.wait_for_attempt(2)
        killed_at = kill_while_saving(job, "node1")
        job.wait_for(lambda: job.named("death"))

        job.wait_for_attempt(3)  # node1 has failed twice: a spare replaces it
        hosts.unplug("node2")
        job.wait_for(lambda: job.named("host lost"))
        code = job.finish()
    finally:
        job.kill()
        hosts.plug("node2")
    assert code == 0, job.output[-4000:]

    (death,) = job.named("death")
    assert (death["ranks"], death["hosts"]) == ([0], ["node1"])
    detected = next(event for event in job.named("detected") if event["ranks"] == [0])
    assert detected["time"] - killed_at < DETECTED_S
    assert "rank 0 on node1" in death["text"]
    (hang,) = job.named("hang")
    assert (hang["ranks"], hang["hosts"]) == ([1], ["node1"])
    assert "probably because of rank 1 on node1: its process is stopped" in hang["text"]
    (lost,) = job.named("host lost")
    assert lost["hosts"] == ["node2"]
    assert [(e["out"], e["into"]) for e in job.named("hosts changed")] == [
        (["node1"], ["node3"]),
        (["node2"], ["node4"]),
    ]
    assert run.losses == whole.losses
    assert run.validation_loss == whole.validation_loss
    assert not job.left_running()

    failed_at = [event["step"] for kind in ("hang", "death", "host lost") for event in job.named(kind)]
    logs = [(job.folder / f"attempt_{n:02d}/logs/rank_00000.log").read_text() for n in (2, 3, 4)]
    found = [
        re.search(r"MEMORY CHECKPOINT: step (\d+) .*?; (\d) of 4 ranks have their state on their own", log)
        for log in logs
    ]
    assert [match and match[2] for match in found] == ["4", "2", "2"]  # a host was replaced twice
    for step, match in zip(failed_at, found, strict=True):
        assert match and int(match[1]) >= step - 1
    assert not list(memory.iterdir())


def kill_while_saving(job: Job, host: str) -> float:
    """Kill the first rank of a host while a checkpoint is being written; return when."""
    victim = job.ranks(host)[0]
    job.wait_for_save()
    victim.kill()
    return time.time()


def test_without_a_spare_fewer_ranks_go_on(hosts: Hosts, whole: Run, make_run: Callable[..., Run]) -> None:
    """dp 2 becomes dp 1 with the same global batch: losses differ only by the rounding of another summation order."""
    run = make_run("fewer", LAYOUT)
    job = start(run, hosts, ["node1", "node2"], 2, "--supervise", orphan_s=ORPHAN_S)
    try:
        job.wait_for_attempt(1)
        hosts.unplug("node2")
        code = job.finish()
    finally:
        job.kill()
        hosts.plug("node2")
    assert code == 0, job.output[-4000:]
    (changed,) = job.named("world changed")
    assert (changed["before"], changed["after"]) == (4, 2)
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    assert not job.left_running()


def test_killed_launcher_leaves_no_process_and_loses_nothing(hosts: Hosts, make_run: Callable[..., Run]) -> None:
    """After kill -9 of tools/launch.py the ranks notice, save a checkpoint and exit."""
    run = make_run("launcher_killed", LAYOUT | {"training.steps": 10**6, "checkpoint.interval": 0})
    job = start(run, hosts, ["node1", "node2"], 1)
    try:
        job.wait_for_attempt(1)
        job.wait_for_steps(5)
        at = job.step
        job.process.kill()
        deadline = time.monotonic() + QUICK["orphan-s"] + 60
        while job.leftovers() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not job.left_running()
    finally:
        job.kill()
    assert int(run.newest.name.removeprefix("step_")) >= at
