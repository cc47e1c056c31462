"""tools/launch.py on real hosts: losses equal those of a single host, and an error is reported first and once."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import LAUNCH, Job, slow_links, start
from launching import ROOT, TRAIN, environment, forked, succeed
from tiny_run import Run

from llama_ds.job.folder import VARIABLE
from llama_ds.job.folder import Job as Attempt
from llama_ds.launch.job_files import prepare
from tests.hosts import Hosts, missing

needs_hosts = pytest.mark.skipif(missing() is not None, reason=str(missing()))
LAYOUT = {"parallel.pp": 2, "training.steps": 12, "checkpoint.interval": 5}
ENDLESS = {"parallel.pp": 2, "training.steps": 10**6}
ORPHAN_S = 12.0


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(2, tmp_path_factory.mktemp("hosts"), subnet=96, before=slow_links(8)) as those:
        yield those


@pytest.fixture(scope="module")
def alone(make_run: Callable[..., Run]) -> Run:
    """The run on one host."""
    run = make_run("one_host", LAYOUT)
    succeed(forked(4, TRAIN, run.file), run.log)
    return run


@pytest.mark.slow
@needs_hosts
@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_two_hosts_train_as_one(launcher: str, hosts: Hosts, alone: Run, make_run: Callable[..., Run]) -> None:
    """pp 2, dp 2 on two hosts: the same losses to the bit, a log for each rank, the console's from rank 0.

    The job's token is only in its file: not in a command line, an environment, a log or the output.
    """
    run = make_run(f"two_hosts_{launcher}", LAYOUT)
    job = start(run, hosts, ["node1", "node2"], 2, "--launcher", launcher)
    try:
        assert not job.leaks()
    finally:
        code = job.finish()
    assert code == 0, job.output[-4000:]
    assert run.losses == alone.losses
    assert run.validation_loss == alone.validation_loss
    logs = job.folder / "attempt_01" / "logs"
    assert sorted(path.name for path in logs.glob("rank_*")) == [f"rank_{rank:05d}.log" for rank in range(4)]
    assert f"step 12/12 | loss {run.losses[-1]:.4f}" in job.output
    assert [event["event"] for event in job.events if event["event"] not in ("killed", "progress", "waiting")] == [
        *("job started", "attempt started", "ranks joined", "done", "job ended"),
    ]
    assert not job.left_running()


@pytest.mark.slow
@needs_hosts
def test_the_first_failing_rank_is_shown_first(hosts: Hosts, make_run: Callable[..., Run], tmp_path: Path) -> None:
    """One host's copy of the code raises: its error comes first, with rank and host, and is the only traceback."""
    source = (ROOT / "llama_ds" / "model" / "manual_backward.py").read_text()
    broken = tmp_path / "manual_backward.py"
    broken.write_text(source + "\n\ndef _broken(*_):\n    raise RuntimeError('broken on this host')\n\n"
                      "ManualBackwardLayer.forward = _broken\n")  # fmt: skip
    hosts.restart("node2", f"mount --bind {broken} {ROOT / 'llama_ds' / 'model' / 'manual_backward.py'}")
    run = make_run("exception", LAYOUT)
    try:
        job = start(run, hosts, ["node1", "node2"], 2)
        code = job.finish()
    finally:
        hosts.restart("node2")
    assert code == 1, job.output[-4000:]
    (failure,) = job.named("failure")
    assert failure["hosts"] == ["node2"]
    assert failure["ranks"][0] in (2, 3)
    assert failure["text"].startswith(f"rank {failure['ranks'][0]} on node2 failed:\nTraceback")
    assert job.output.count("RuntimeError: broken on this host") == 1
    assert not job.left_running()


@pytest.mark.slow
@needs_hosts
def test_a_mistake_that_one_host_sees_ends_the_job_for_good(hosts: Hosts, make_run: Callable[..., Run]) -> None:
    """The data is missing on node2: one error, exit code 2, and no restart, which would not help."""
    run = make_run("no_data", LAYOUT)
    shards = next(path for path in run.file.parent.parent.glob("corpus*/shards"))
    hosts.restart("node2", f"mount -t tmpfs none {shards}")
    try:
        job = start(run, hosts, ["node1", "node2"], 1, "--supervise")
        code = job.finish()
    finally:
        hosts.restart("node2")
    assert code == 2, job.output[-4000:]
    assert job.output.count("error: ") == 1
    assert str(shards) in job.output
    assert len(job.named("attempt started")) == 1
    assert not job.left_running()


@pytest.mark.slow
@needs_hosts
def test_two_jobs_on_the_same_hosts_end_one_by_one(hosts: Hosts, make_run: Callable[..., Run]) -> None:
    """Killing one job on all hosts must not touch another job's processes on the same hosts.

    The other saves on a signal to its launcher and continues. After kill -9 of the launcher its ranks notice, save and
    exit.
    """
    jobs: list[Job] = []
    runs = [make_run(name, ENDLESS | layout) for name, layout in (("first", {"parallel.pp": 1}), ("second", {}))]
    try:
        for run in runs:
            jobs.append(start(run, hosts, ["node1", "node2"], 1, orphan_s=ORPHAN_S))
        for job in jobs:
            job.wait_for_attempt(1)
        jobs[0].ranks("node2")[0].kill()
        assert jobs[0].finish() == 1
        jobs[1].wait_for_steps(5)
        assert jobs[1].process.poll() is None
        found = [event["event"] for event in jobs[1].events if event["event"] not in ("progress", "waiting")]
        assert found == ["job started", "attempt started", "ranks joined"]

        jobs[1].process.send_signal(signal.SIGUSR1)
        jobs[1].wait_for(lambda: (runs[1].checkpoints / "latest").exists())
        saved = runs[1].newest
        jobs[1].wait_for_steps(3)
        at = jobs[1].step
        jobs[1].process.kill()
        assert not jobs[1].left_running(ORPHAN_S + 60)
    finally:
        for job in jobs:
            job.kill()
    assert runs[1].newest.name > saved.name
    assert int(runs[1].newest.name.removeprefix("step_")) >= at


@pytest.mark.slow
def test_single_processes_of_a_broken_mpi_are_refused(make_run: Callable[..., Run]) -> None:
    """An mpirun of another MPI than mpi4py's starts worlds of one rank: each rank must refuse to run alone."""
    run = make_run("singleton", LAYOUT)
    attempt = Attempt(str(run.dir / "jobs" / "0001" / "attempt_01"), {"node1": 2, "node2": 2}, "openmpi", ("", 0), 1, 9)
    prepare(attempt, [str(run.file)])
    done = subprocess.run(
        [sys.executable, TRAIN, f"@{attempt.path('arguments')}"],
        env=environment() | {VARIABLE: attempt.folder},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "has 4 slots, but openmpi started rank 0 of 1; its processes do not know of each other" in done.stderr


def launch(*words: object) -> subprocess.CompletedProcess[str]:
    """Run tools/launch.py to its end."""
    return subprocess.run(
        [sys.executable, LAUNCH, *map(str, words)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_dry_run_shows_the_command_and_starts_nothing(make_run: Callable[..., Run]) -> None:
    run = make_run("dry", LAYOUT)
    done = launch("ds_configs/llama_65b.yaml", f"output_dir={run.dir}", "--hostfile", "hostfiles/256x8", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "deepspeed.launcher.runner" in done.stdout
    assert "--master_addr=node001" in done.stdout
    assert not run.dir.exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--hostfile", "nowhere"], "nowhere: the hostfile cannot be read"),
        (["--hostfile", "hostfiles/2x8", "--include", "node003"], "node003"),
        (["--hostfile", "hostfiles/local", "--export", "HF_TOKEN=abc"], "HF_TOKEN"),
        (["--hostfile", "hostfiles/local", "--export", "X"], "--export X: write NAME=VALUE"),
        (["--hostfile", "hostfiles/local", "--listen", "192.0.2.1"], "--listen 192.0.2.1"),
        (["--hostfile", "hostfiles/local", "--nic", "nic7"], "--nic nic7: localhost has no such interface"),
        (["--hostfile", "hostfiles/local", "parallel.pp=3"], "world size 2 is not a multiple"),
        (["--hostfile", "hostfiles/local", "--spares", "x"], "--spares x: is of restarts, and without --supervise"),
        (["--hostfile", "hostfiles/local", "--max-restarts", "9"], "--max-restarts 9: is of restarts, and without"),
        (["--hostfile", "hostfiles/local", "--rewind-steps", "9"], "--rewind-steps 9: is of restarts, and without"),
        (["--hostfile", "hostfiles/local", "--supervise", "--skip-steps", "9"], "--rewind-steps is 0; add it"),
        (
            ["--hostfile", "hostfiles/local", "--supervise", "--spares", "nowhere"],
            "nowhere: the hostfile cannot be read",
        ),
    ],
)
def test_mistakes_are_one_line(words: list[str], error: str, make_run: Callable[..., Run]) -> None:
    run = make_run("mistake", LAYOUT | {"parallel.pp": 1})
    done = launch(run.file, *words)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if error in line]
    assert len(lines) == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "abc" not in done.stdout + done.stderr


@pytest.mark.slow
@needs_hosts
def test_a_host_that_does_not_answer_is_named(hosts: Hosts, make_run: Callable[..., Run]) -> None:
    run = make_run("no_answer", LAYOUT)
    hosts.unplug("node1")
    try:
        job = start(run, hosts, ["node1", "node2"], 1)
        assert job.finish() == 2
    finally:
        hosts.plug("node1")
    assert "node1: the first host does not answer" in job.output
