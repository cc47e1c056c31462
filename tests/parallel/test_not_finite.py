"""A step whose gradient norm is not finite changes no weight and no moment, on the device, without asking the host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.not_finite_worker import CASE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_step_that_is_not_finite_is_left_out() -> None:
    """And the end of a step reads nothing from the device: `not_finite_worker.py` asserts both on every rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={CASE.world}"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [*command, "-m", "tests.parallel.not_finite_worker"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("fine") == CASE.world
