"""Effective training time under failures: the simulation against closed forms, spares, published runs, the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from llama_ds.perf.plan.goodput import Tier, best_intervals, daly_share, simulate, spares_needed
from llama_ds.perf.plan.goodput_published import RUNS
from tools import plan

MTBF_S = 3600.0
DISK = Tier("disk", save_s=30.0, restart_s=120.0)


def test_intervals_are_those_of_young_and_daly() -> None:
    assert DISK.young(MTBF_S) == math.sqrt(2 * 30 * 3600)
    # Daly 2006: sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + (d / 2M) / 9) - d
    assert DISK.daly(MTBF_S) == pytest.approx(464.758 * (1 + 0.0645497 / 3 + 0.00416667 / 9) - 30, rel=1e-5)
    assert replace(DISK, save_s=7200.0).daly(MTBF_S) == MTBF_S, "saves longer than twice the MTBF"


@pytest.mark.parametrize("interval_s", [100.0, 464.0, 2000.0])
def test_the_simulation_agrees_with_dalys_model(interval_s: float) -> None:
    """Tolerance: three standard errors of 200 runs of 100 h, which have about 110 failures each."""
    tier = replace(DISK, interval_s=interval_s)
    found = simulate([tier], MTBF_S, 360_000.0, runs=200)
    error = found.wall_s.std() / found.wall_s.mean() / math.sqrt(200)
    assert found.effective == pytest.approx(daly_share(tier, MTBF_S), rel=3 * error + 1e-3)


def test_without_failures_saves_alone_cost_time() -> None:
    assert simulate([replace(DISK, interval_s=300.0)], 1e15, 3e5, runs=2).effective == pytest.approx(1 / 1.1)


def test_a_save_under_way_is_not_restored() -> None:
    """With a write that takes three intervals, a failure loses three more intervals; nothing that was complete."""
    quick, late = (replace(DISK, interval_s=300.0, write_s=write_s) for write_s in (0.0, 900.0))
    shares = [simulate([tier], 36_000.0, 720_000.0, runs=100).effective for tier in (quick, late)]
    # Every 10 h, 900 s more: 2.5 percent of the time, within the scatter of 100 x 20 failures.
    assert shares[0] - shares[1] == pytest.approx(0.025, rel=0.15)


def test_memory_beside_disk_loses_less_than_disk_alone() -> None:
    memory = Tier("memory", save_s=0.05, restart_s=120.0, share=0.9)
    both, share = best_intervals([memory, replace(DISK, share=0.1)], MTBF_S, 3.6e5, 1.0, runs=32)
    _, alone = best_intervals([DISK], MTBF_S, 3.6e5, 1.0, runs=32)
    assert share > alone + 0.05 and both[0].interval_s < 60 < both[1].interval_s


def test_spares_follow_the_poisson_distribution() -> None:
    """A mean of 1.5 hosts out: P(at most 3) = 0.934, P(at most 4) = 0.981."""
    moment, throughout = spares_needed(1.5 / 3600, 3600.0, 100 * 3600.0, 0.95)
    assert moment == 4 and throughout > moment
    assert spares_needed(0.0, 3600.0, 3600.0, 0.95) == (0, 0)


def test_published_runs() -> None:
    """The plan must not contradict what Llama 3 and ByteRobust state, and not hide where it explains less."""
    llama, byterobust, bloom, opt = (run.planned()[0] for run in RUNS)
    assert llama == pytest.approx(0.90, abs=0.02) and byterobust == pytest.approx(0.97, abs=0.01)
    assert bloom > 0.95 and 0.75 < opt < 0.9, "failures explain a part of what these two lost"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    run = ("goodput", "--gpus", "2048", "--training-days", "20", "--step-s", "10", "--start", "2026-12-01")
    assert plan.main([*run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 20 < found["expected_days"] < found["days_95"] < 22 and found["expected_end"] == "2026-12-21"
    assert found["effective_share"] == pytest.approx(found["effective_share_daly"], abs=0.002)
    assert found["tiers"][0]["interval_steps"] * 10 == pytest.approx(found["tiers"][0]["young_s"], rel=1.0)
    assert plan.main([*run, "--restart-s", "1e6", "--failures-per-gpu-day", "0.1"]) == 0
    assert "the run may make no progress: failures come faster" in capsys.readouterr().out
    assert plan.main([*run, "--failures-per-gpu-day", "1"]) == 2
    assert "40,960 failures during the training are more than 20,000" in capsys.readouterr().err
    assert plan.main([*run[:-1], "9999-12-30"]) == 0
    assert "end: after the year 9999" in capsys.readouterr().out
    assert plan.main(["goodput", "--gpus", "8"]) == 2
    assert "goodput: needs --gpus and --model" in capsys.readouterr().err
    assert plan.main([*run[:-1], "1.12.2026"]) == 2
    assert "'1.12.2026' is not a date; write YYYY-MM-DD" in capsys.readouterr().err
