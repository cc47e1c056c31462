"""Faults in a job on real hosts: its losses equal those of an undisturbed run.

Three hosts, each with its own network, processes and sshd; DeepSpeed's launcher over pdsh and ssh.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Job, slow_links, start, stop
from launching import TRAIN, forked, succeed
from tiny_run import Run

from llama_ds.launch.supervise.attempt import TICK_S
from tests.hosts import Hosts, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

# Slow links make these few steps last through all faults.
LAYOUT = {
    "parallel.pp": 2,
    "model.num_hidden_layers": 2,
    "training.steps": 80,
    "optimizer.lr": 1e-3,  # at the tiny run's 3e-3 rounding grows to 2e-3 of the loss in 60 steps, here to 3e-7
    "checkpoint.interval": 5,
    "checkpoint.keep_last": 3,
}
ORPHAN_S = 12.0  # the supervisor waits longer than this for a vanished host, until its ranks have certainly ended
LEARNED_FROM = 8  # ticks of the supervisor with steps: it needs four, and may be slower than this process
DETECTED_S = 15.0  # limit for the detection of a killed rank on a machine with two cores


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(3, tmp_path_factory.mktemp("hosts"), before=slow_links(2)) as those:
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
    """Four faults in a job of pp 2, dp 2 on two hosts and one that is added later; losses equal an undisturbed run's.

    Its restarts start from warm processes and go on from the memory of its hosts, also where a host is replaced. Then
    one host of three is left: dp 2 becomes dp 1 with the same global batch, so that the losses from there on differ by
    the rounding of another summation order. When a host is back, the next restart takes it in. Another layout resumes
    from the disk.
    """
    run = make_run("faults", LAYOUT | {"checkpoint.memory_interval": 1, "checkpoint.memory_folder": str(tmp_path)})
    job = start(run, hosts, ["node1", "node2"], 2, "--supervise", orphan_s=ORPHAN_S)
    try:
        job.wait_for_attempt(1)
        for _ in range(LEARNED_FROM):
            time.sleep(TICK_S)
            job.wait_for_steps(1)
        stop(job.ranks("node1")[1])
        job.wait_for(lambda: job.named("hang"))

        job.wait_for_attempt(2)
        hosts.write_hostfile(run.file.with_suffix(".hosts"), 2)  # with node3, for which dp 3 would be of no use
        killed_at = kill_while_saving(job, "node1")
        job.wait_for(lambda: job.named("death"))

        job.wait_for_attempt(3)  # node1 has failed twice: the new host replaces it
        hosts.unplug("node1")
        hosts.unplug("node2")
        job.wait_for(lambda: len(job.named("attempt started")) >= 4)
        hosts.plug("node1")
        hosts.plug("node2")
        job.wait_for_attempt(4)
        job.ranks("node3")[0].kill()
        code = job.finish()
    finally:
        job.kill()
        hosts.plug("node1")
        hosts.plug("node2")
    assert code == 0, job.output[-4000:]

    assert [event.get("warm") for event in job.named("attempt started")] == [None, True, True, True, True]
    death, last = job.named("death")
    assert (last["ranks"], last["hosts"]) == ([0], ["node3"])
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
        (["node2"], []),
        ([], ["node2"]),
    ]
    assert [(e["before"], e["after"]) for e in job.named("world changed")] == [(4, 2), (2, 4)]
    same = job.resumed_at(4)
    assert 0 < same < LAYOUT["training.steps"]
    assert run.losses[:same] == whole.losses[:same]
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    assert run.validation_loss == pytest.approx(whole.validation_loss, rel=1e-5)
    assert not job.left_running()

    for attempt, failed_at, own in ((2, hang["step"], 4), (3, death["step"], 2)):
        step, kept = job.resumed_from_memory(attempt)
        assert step == job.resumed_at(attempt) >= failed_at - 1
        assert kept == own, "ranks whose host was not replaced"
    assert not list(tmp_path.glob("*/node[23]")), "the memory of the job's last hosts is free"


def kill_while_saving(job: Job, host: str) -> float:
    """Kill the first rank of a host while a checkpoint is being written; return when."""
    victim = job.ranks(host)[0]
    job.wait_for_save()
    victim.kill()
    return time.time()
