"""Requests by signals and by the wall-time limit, and when a run acts on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llama_ds.config.schema import CheckpointConfig
from llama_ds.training.interruptions import Interruptions, Request


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


def test_the_time_limit_leaves_its_margin() -> None:
    with handled(wall_time_s=100.0, wall_time_margin_s=100.0) as this:
        assert [this.after_step() for _ in range(2)] == [Request.NOTHING, Request.END]
        assert this.reason == "the wall-time limit"
    with handled(wall_time_s=200.0, wall_time_margin_s=100.0) as this:
        assert [this.after_step() for _ in range(2)] == [Request.NOTHING, Request.NOTHING]


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
