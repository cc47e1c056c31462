"""machine.py gemm, comm and check-plan measure real ranks, and the planner reads the files that they write."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_ds.perf.plan import hardware
from tests import warm
from tests.console import foreign_lines
from tests.hosts import Hosts, missing

ROOT = Path(__file__).resolve().parents[2]
TINY = ("model.vocab_size=64", "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2")
SMALL = (
    *TINY,
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "data.seq_len=32",
    "training.global_batch=8",
)
ONE_RANK = ("parallel.pp=1", "parallel.tp=1", "parallel.sequence_parallel=false", "parallel.micro_batch=2")
needs_hosts = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def run(tool: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return warm.run(ROOT / "tools" / tool, *args, environment=os.environ | warm.SETTINGS | environment)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The description of this machine as measured by two ranks."""
    path = tmp_path_factory.mktemp("machine") / "here.yaml"
    done = run("machine.py", "gemm", "--cluster", path, "--quick", "--dtype", "fp32", "--power-w", 90)
    assert done.returncode == 0, done.stderr
    assert "products in TFLOP/s" in done.stdout and foreign_lines(done.stderr) == []
    limits = ("--max-bytes", 65536, "--seconds", 0.01)
    done = run("machine.py", "comm", "--cluster", path, *limits, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {(one["operation"], one["ranks"], one["nodes"]) for one in found["collectives"]} == {
        (operation, 2, 1) for operation in ("all_reduce", "all_gather", "reduce_scatter", "send")
    }
    assert all(one["sizes"] == [4096, 16384, 65536] and min(one["seconds"]) > 0 for one in found["collectives"])
    return path


@pytest.mark.slow
def test_what_ranks_measured_is_what_the_planner_goes_by(cluster: Path) -> None:
    machine = hardware.load(str(cluster))
    assert (machine.name, machine.dtype, machine.power_w, machine.host_computes) == ("here", "fp32", 90, True)
    assert machine.curves and machine.curves.products and machine.curves.kernels and machine.curves.attention
    assert machine.peak_tflops == max(r for plane in machine.curves.products.tflops for row in plane for r in row)
    assert 0.01 <= machine.calibration.contention <= 1
    # The bus bandwidth of nccl-tests for an all-reduce of two ranks is bytes over time.
    curve = machine.curves.collective("all_reduce", 2, 1)
    assert curve and machine.links.nvlink_gb_s == pytest.approx(curve.bytes[-1] / curve.us[-1] / 1e3, rel=1e-3)
    wanted = ("estimate", "ds_configs/quickstart.yaml", "--gpu", cluster, "deepspeed.bf16.enabled=false", "--explain")
    done = run("plan.py", *wanted, "--gpus", 4)
    assert done.returncode == 2 and "here: links.network_gb_s is not stated" in done.stderr
    done = run("plan.py", *wanted, "--gpus", 2, "parallel.pp=1")
    assert done.returncode == 0, done.stderr
    assert "measured, 8 sizes from 32 to 128" in done.stdout and "4 curves among 1 kinds of groups" in done.stdout


@pytest.mark.slow
def test_predictions_stand_beside_steps_of_the_trainers_engines(cluster: Path) -> None:
    fp32 = "deepspeed.bf16.enabled=false"
    layouts = [[*ONE_RANK, fp32], [*ONE_RANK, fp32, "parallel.pp=2"]]
    words = [word for layout in layouts for word in ("--layout", *SMALL, *layout)]
    shown = ("--rounds", 1, "--steps", 2, "--json")
    done = run("machine.py", "check-plan", "ds_configs/quickstart.yaml", "--cluster", cluster, *words, *shown)
    assert done.returncode == 0, done.stderr
    assert foreign_lines(done.stderr) == []
    found = json.loads(done.stdout)
    assert [row["overrides"] for row in found["layouts"]] == [[*SMALL, *layout] for layout in layouts]
    for row in found["layouts"]:
        assert row["error"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1)
        assert row["fastest_s"] <= row["measured_s"] <= row["slowest_s"]
    # Both layouts train the same weights on the same rows.
    one, two = (row["loss"] for row in found["layouts"])
    assert one == pytest.approx(two, rel=1e-5)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(2, tmp_path_factory.mktemp("hosts"), subnet=91) as hosts:
        yield hosts


@pytest.mark.slow
@needs_hosts
def test_links_between_hosts_are_told_from_those_within(hosts: Hosts, tmp_path: Path) -> None:
    path, hostfile = tmp_path / "two.yaml", hosts.write_hostfile(tmp_path / "hosts", 2, ["node1", "node2"])
    limits = ("--max-bytes", 16384, "--seconds", 0.01, "--hostfile", hostfile, "--cluster", path)
    done = run("machine.py", "comm", *limits, **hosts.environment)
    assert done.returncode == 0, done.stderr
    machine = hardware.load(str(path))
    assert machine.links.gpus_per_node == 2 and machine.curves
    kinds = {(c.ranks, c.nodes) for c in machine.curves.collectives if c.operation == "all_reduce"}
    assert kinds == {(2, 1), (1, 2), (2, 2)}
    assert {(c.ranks, c.nodes) for c in machine.curves.collectives if c.operation == "send"} == {(2, 1), (1, 2)}
    across = machine.curves.collective("all_reduce", 2, 2)
    assert across and machine.links.network_gb_s == pytest.approx(across.bus_gb_s()[-1], rel=1e-3)
    assert "each of 2 nodes" in done.stdout


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    uneven = tmp_path / "uneven"
    uneven.write_text("localhost slots=2\nother slots=4\n")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: x\n")
    new = tmp_path / "new" / "machine.yaml"
    for args, word in (
        (("comm", "--cluster", new, "--hostfile", uneven), "hosts have [2, 4] slots"),
        (("comm", "--cluster", new, "--min-bytes", 8192, "--max-bytes", 4096), "--min-bytes 8192 is above --max-bytes"),
        (("comm", "--cluster", broken), "device is missing"),
        (("gemm", "--cluster", new, "--run", "no.yaml"), "no.yaml"),
        (("check-plan", "ds_configs/quickstart.yaml", "--cluster", "nowhere.yaml"), "nowhere.yaml"),
    ):
        done = run("machine.py", *args)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: ") and word in line
    assert not new.exists()
