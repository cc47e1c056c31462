"""Requests by signals and by the wall-time limit, and when a run acts on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama_ds.config.declare import SectionError
from llama_ds.config.schema import CheckpointConfig
from llama_ds.errors import UserError
from llama_ds.job import wall_time
from llama_ds.job.folder import VARIABLE, Job
from llama_ds.job.wall_time import job_start, seconds_left
from llama_ds.launch.job_files import prepare
from llama_ds.training.interruptions import Interruptions, Request, check_time_left


@contextmanager
def handled(**settings: float) -> Iterator[Interruptions]:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    interruptions = Interruptions(CheckpointConfig(**settings), torch.device("cpu"))  # type: ignore[arg-type]
    yield interruptions
    interruptions.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_checkpoint_is_asked_for_once() -> None:
    """Ranks agree on the request during one step and act on it after the next; then the run continues."""
    with handled() as this:
        assert this.after_step() is Request.NOTHING
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [this.after_step() for _ in range(3)] == [Request.NOTHING, Request.SAVE, Request.NOTHING]


def test_the_end_is_final_and_outdoes_a_checkpoint() -> None:
    with handled() as this:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [this.after_step() for _ in range(3)] == [Request.NOTHING, Request.END, Request.END]


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a call that puts the start of this process's job so many seconds into the past."""

    def ago(seconds: float) -> None:
        monkeypatch.setenv("SLURM_JOB_START_TIME", f"{time.time() - seconds:.0f}")
        monkeypatch.setenv("SLURM_JOB_ID", "77")

    return ago


def test_the_time_limit_counts_from_the_jobs_start_and_leaves_its_margin(began: Callable[[float], None]) -> None:
    """It counted from the first step, after imports, loading and checksums, which take minutes for a large model."""
    began(1000)
    with handled(wall_time_s=1100.0, wall_time_margin_s=101.0) as this:
        assert [this.after_step() for _ in range(2)] == [Request.NOTHING, Request.END]
        assert this.reason == "the wall-time limit"
    with handled(wall_time_s=3000.0, wall_time_margin_s=101.0) as this:
        assert [this.after_step() for _ in range(2)] == [Request.NOTHING, Request.NOTHING]


def test_a_start_without_time_for_a_step_is_refused(began: Callable[[float], None]) -> None:
    began(1000)
    settings = CheckpointConfig(wall_time_s=1100.0, wall_time_margin_s=101.0)
    with pytest.raises(UserError, match=r"wall_time_s = 1100: counted from the start of Slurm job 77, 100\d s ago, no"):
        check_time_left(settings)
    for rest in (CheckpointConfig(), CheckpointConfig(wall_time_s=3000.0)):
        check_time_left(rest)


def test_a_limit_within_its_margin_is_refused() -> None:
    with pytest.raises(SectionError, match=r"wall_time_s = 60 is not above checkpoint.wall_time_margin_s = 120,"):
        CheckpointConfig(wall_time_s=60.0)


def test_a_restart_continues_the_limit_of_its_job(
    began: Callable[[float], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether tools/launch.py starts the ranks again, or torchrun does."""
    monkeypatch.delenv("SLURM_JOB_START_TIME", raising=False)
    start = time.time() - 500
    job = Job(str(tmp_path / "attempt_02"), {"node1": 1}, "pdsh", ("127.0.0.1", 1), 5.0, 60.0, started=start)
    prepare(job, [])
    assert job_start({VARIABLE: job.folder}).at == start
    settings = CheckpointConfig(wall_time_s=1000.0, wall_time_margin_s=400.0)
    left = seconds_left(settings, job_start({VARIABLE: job.folder}))
    assert left is not None and 0 < left <= 100
    restarted, launcher, shell = (
        SimpleNamespace(create_time=lambda at=at: at, cmdline=lambda words=words: words)
        for at, words in ((900.0, []), (300.0, ["torchrun", "llama_ds/train.py"]), (100.0, ["bash", "job.sh"]))
    )
    restarted.parents = lambda: [launcher, shell]
    monkeypatch.setattr(wall_time.psutil, "Process", lambda: restarted)
    assert job_start({}).at == 300.0


def test_a_second_sigterm_ends_the_process() -> None:
    """Sent by an impatient person, or by a scheduler at the end of its grace period."""
    program = (
        "import os, signal, torch\n"
        "from llama_ds.config.schema import CheckpointConfig\n"
        "from llama_ds.training.interruptions import Interruptions\n"
        "Interruptions(CheckpointConfig(), torch.device('cpu'))\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('went on', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('went on', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "went on\n")
    assert done.stderr.splitlines()[-1] == "ended at once (SIGTERM again); what was not yet saved is lost"
