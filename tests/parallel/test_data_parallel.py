"""Gradients cross the network as a reduce-scatter: half of an all-reduce's bytes, counted by the hosts' interfaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ds.launch.namespaces import INTERFACE, Hosts, missing

ROOT = Path(__file__).resolve().parents[2]
COUNT = 500_000  # elements of a rank's part: 2 MB in fp32


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_reduction_and_gather_send_each_part_once() -> None:
    """Two ranks: each sends the other's part, and 15 percent at most for headers and barriers."""
    with Hosts(2, rate_mbit=400, delay_ms=0) as hosts:
        base = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts.address(0), "MASTER_PORT": "29511"}
        base |= {"GLOO_SOCKET_IFNAME": INTERFACE, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.parallel.data_parallel_worker"]
        ranks = [
            subprocess.Popen(
                hosts.command(r, [*command, str(r), str(COUNT)]),
                env={**os.environ, **base, "RANK": str(r)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for r in range(2)
        ]
        results = [json.loads(process.communicate(timeout=60)[0].splitlines()[-1]) for process in ranks]
    part = 4 * COUNT
    for found in results:
        assert found["reduced exactly"] and found["rounded once"] and found["gathered"]
        assert part <= found["reduce bytes"] <= 1.15 * part
        assert part / 2 <= found["bf16 bytes"] <= 1.15 * part / 2
        assert part <= found["gather bytes"] <= 1.15 * part
        assert found["all-reduce bytes"] >= 2 * part  # what DeepSpeed's engine would send
