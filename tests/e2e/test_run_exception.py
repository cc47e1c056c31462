"""An exception on one stage ends every rank, without a launcher that would kill them, and is the first thing shown."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import TIMEOUT_S, environment
from tiny_run import Run

from llama_ds.machine import free_port
from tests import warm

FAILING = Path(__file__).with_name("failing_rank.py")


def run_with(error: str, method: str, call: int, rank: int, run: Run) -> tuple[list[int], str]:
    """Return the exit codes of two ranks, of which one fails, and their output."""
    common = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = (FAILING, method, call, rank, error, run.file)
    with open(run.log, "wb") as log:
        ranks = [
            warm.start(command, log, environment=common | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)
        ]
        try:
            codes = [process.wait(TIMEOUT_S) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
    return codes, run.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule, virtual_stages, method, rank",
    [
        ("1f1b", 1, "forward", 0),
        ("1f1b", 1, "backward", 1),
        ("zb_h1", 1, "run_deferred_wgrad", 1),
        ("interleaved", 2, "forward", 1),
        ("dualpipe_v", 2, "backward", 0),
    ],
)
def test_exception_on_one_stage_ends_all(
    schedule: str, virtual_stages: int, method: str, rank: int, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    name, board = f"{schedule}_{method}", tmp_path / "run.prom"
    parallel = {"parallel.pp": 2, "parallel.schedule": schedule, "parallel.virtual_stages": virtual_stages}
    run = make_run(name, {**parallel, "logging.boards": [{"name": "prometheus", "textfile": str(board)}]})
    codes, output = run_with("broken", method, 11, rank, run)
    assert 0 not in codes, output
    errors = [line for line in output.splitlines() if "rank" in line and ("ERROR" in line or "failed" in line)]
    assert f"rank {rank} of 2 failed" in errors[0], output
    assert "RuntimeError: broken" in output
    assert output.count("Traceback (most recent call last)") == 1, output
    assert os.path.exists(run.dir / "run.yaml")
    assert run.metrics, "no step was reported, and the board had nothing to close"
    assert not board.exists(), "the board shows values of a run that has ended"


@pytest.mark.slow
def test_a_rank_without_memory_ends_all_with_one_line(make_run: Callable[..., Run]) -> None:
    """In bf16 with masters, so that every category has bytes of its own; the plan of a tiny model is exact for them."""
    run = make_run("out_of_memory", {"parallel.pp": 2, "deepspeed.bf16.enabled": True, "parallel.micro_batch": 4})
    codes, output = run_with("out_of_memory", "backward", 5, 1, run)
    assert codes == [2, 2], output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    assert "rank 1 (pp 1 dp 0 tp 0, stage 1) ran out of memory in step 2: it could not allocate 0.02 MiB more" in line
    held = dict(re.findall(r"(weights|gradients|optimizer) (\S+ MiB) \(planned", line))
    planned = dict(re.findall(r"(weights|gradients|optimizer) \S+ MiB \(planned (\S+ MiB)\)", line))
    assert held == planned and len(held) == 3 and "0.00 MiB" not in held.values(), line
    rest = r"activations and temporaries, with the program itself \S+ [MG]iB \(planned \S+ MiB\)"
    assert re.search(rf"{rest}; use parallel.recompute=selective, planned to need \S+ MiB less", line)
