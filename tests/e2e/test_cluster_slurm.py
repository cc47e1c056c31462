"""Runs under a real Slurm on two nodes, which nothing but Slurm can reach: there is no ssh."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import ROOT, environment
from tiny_run import Run

from tests.slurm import Slurm, missing, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
LAUNCH, PREFLIGHT = ROOT / "tools" / "launch.py", ROOT / "tools" / "preflight.py"
SLOW = ROOT / "tests" / "e2e" / "slow_rank.py"
LAYOUT = {"parallel.pp": 2, "training.steps": 4}
TWO = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(2, tmp_path_factory.mktemp("slurm"), subnet=77) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def hostfile(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slurm.hosts.write_hostfile(tmp_path_factory.mktemp("files") / "hosts", 1)


def test_a_batch_job_launches_ranks_on_all_nodes(slurm: Slurm, hostfile: Path, make_run: Callable[..., Run]) -> None:
    """tools/launch.py in an sbatch script asks, starts and watches the nodes by srun; on SIGTERM it saves and ends."""
    run = make_run("batch", {**LAYOUT, "training.steps": 10**6})
    script = f"cd {ROOT}; exec {sys.executable} {LAUNCH} {run.file} --hostfile {hostfile} --launcher slurm --beat-s 0.5"
    job = slurm.submit(script, *TWO, **environment())
    wait_until(lambda: has_a_step(run), "no step")
    slurm.run("scancel", "--batch", "--signal=TERM", job)
    state = slurm.finish(job)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), slurm.output(job)
    assert run.newest.name == f"step_{len(run.losses):08d}"
    logs = sorted((run.dir / "jobs" / "0001" / "attempt_01" / "logs").glob("rank_*"))
    assert [log.name for log in logs] == ["rank_00000.log", "rank_00001.log"]


def has_a_step(run: Run) -> bool:
    """Return whether a run has reported a step."""
    path = run.dir / "metrics.jsonl"
    return path.exists() and '"loss"' in path.read_text()


def test_an_allocation_is_checked_and_used_from_outside_of_it(
    slurm: Slurm, hostfile: Path, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """In salloc's shell on a login node, the preflight and the launcher reach the nodes by srun, and no others."""
    (tmp_path / "three").write_text(hostfile.read_text() + "node9 slots=1\n")
    run = make_run("salloc", LAYOUT)
    checked = [sys.executable, PREFLIGHT, "--hostfile", tmp_path / "three", "--no-measure", "--json", "--world", 2]
    trained = [sys.executable, LAUNCH, run.file, "--hostfile", hostfile, "--launcher", "slurm", "--beat-s", 0.5]
    script = tmp_path / "in_allocation"
    script.write_text(f"{shlex.join(map(str, checked))}\n{shlex.join(map(str, trained))} >{run.log} 2>&1\n")
    kept = environment() | {"SSH_CONNECTION": "192.0.2.1 5 192.0.2.2 22"}  # the login of this user
    report = json.loads(slurm.run("salloc", "--quiet", *TWO, "sh", script, **kept))
    assert report["good"] == ["node1", "node2"]
    assert {finding["host"] for finding in report["findings"] if finding["severity"] == "error"} == {"node9"}
    assert len(run.losses) == 4 and "step 4/4" in run.log.read_text()


def test_a_job_saves_before_its_time_limit_and_is_requeued(
    slurm: Slurm, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """An element of an array: srun starts the ranks, --signal ends them in time, and the requeued job goes on."""
    steps = 60
    run = make_run("array_3", {**LAYOUT, "training.steps": steps})
    latest, pace = run.checkpoints / "latest", tmp_path / "pace"
    pace.write_text("1")  # seconds for a step
    script = f"""
        srun {sys.executable} {SLOW} data $(cat {pace}) all {run.file} name=array_$SLURM_ARRAY_TASK_ID
        [ "$(cat {latest})" = step_{steps:08d} ] || scontrol requeue $SLURM_JOB_ID
    """
    options = ("--array=3", "--requeue", "--time=60", "--signal=TERM@60")
    job = f"{slurm.submit(script, *TWO, *options, **environment())}_3"
    wait_until(lambda: has_a_step(run), "no step")
    # The signal comes a minute before the end. Slurm looks at time limits every half a minute.
    slurm.run("scontrol", "update", f"JobId={job}", "EndTime=now+90")
    wait_until(latest.exists, "the ranks do not save")
    saved = int(latest.read_text().removeprefix("step_"))
    pace.write_text("0")
    slurm.wait_for(job, lambda state: state.get("Restarts") == "1", "is not requeued")
    # Else it waits two minutes; sooner than in a few seconds the nodes refuse it, as they have just seen it cancelled.
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60", "StartTime=now+10")
    state = slurm.finish(job)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), slurm.output(job.partition("_")[0])
    assert 0 < saved < steps
    assert len(run.losses) == steps  # every step once
