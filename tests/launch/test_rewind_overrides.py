"""Rewinds after a loss spike: the overrides for the next attempt, and the data that it then reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ds.config.run_file import load_run
from llama_ds.config.schema import SkipConfig
from llama_ds.data.skips import Skip, Skips
from llama_ds.launch.preflight import Report
from llama_ds.launch.supervise import attempt as outcomes
from llama_ds.launch.supervise.attempt import Outcome, Watch
from llama_ds.launch.supervise.host_pool import HostPool
from llama_ds.launch.supervise.rewinds import rewind_overrides, skips_with
from llama_ds.launch.supervise.spikes import Spike
from llama_ds.launch.supervise.supervisor import LaunchSettings, RestartLimits, Supervisor

RUN_FILE = str(Path(__file__).resolve().parents[2] / "ds_configs" / "llama_7b.yaml")
HOSTS = {"node1": 8}


def reads(skips: list[tuple[int, int]], steps: int) -> list[int]:
    """Return which step's data of the stream each step of a run reads."""
    all_skips = Skips([Skip(*skip) for skip in skips])
    return [all_skips.position(step) for step in range(steps)]


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=6))
def test_a_rewind_leaves_out_what_was_read_and_nothing_else(rewinds: list[tuple[int, int]]) -> None:
    """For any number and length of rewinds, skipped data stays skipped, and each rewind skips as much again."""
    skips: list[tuple[int, int]] = []
    for back, steps in rewinds:
        before = reads(skips, 200)
        skips = skips_with(skips, back, steps)
        assert [at for at, _ in skips] == sorted({at for at, _ in skips})
        assert reads(skips, 150) == [*before[:back], *before[back + steps :]][:150]


def test_going_back_twice_to_a_step_skips_more_data_there_not_the_same_again() -> None:
    once = skips_with([], 900, 300)
    assert once == [(900, 300)]
    assert skips_with(once, 900, 300) == [(900, 600)]
    assert skips_with(once, 1500, 300) == [(900, 300), (1500, 300)]
    assert skips_with(once, 850, 300) == [(850, 600)]


def test_the_overrides_are_a_run_s(tmp_path: Path) -> None:
    """The ranks parse the overrides like a user's, so they must have the intended meaning."""
    run = load_run(RUN_FILE, rewind_overrides([(100, 300), (900, 600)], 900, 2))
    assert (run.checkpoint.rewind_to, run.checkpoint.rewind_id) == (900, 2)
    assert run.data.skip == (SkipConfig(100, 300), SkipConfig(900, 600))


def supervising(tmp_path: Path, *overrides: str) -> Supervisor:
    run = load_run(RUN_FILE, overrides)
    return Supervisor(
        run=run,
        start=LaunchSettings(RUN_FILE, [], "train.py"),
        host_pool=HostPool(run, HOSTS),
        watch=Watch(spikes=True),
        limits=RestartLimits(restarts=3, backoff_s=0, rewind_steps=100, skip_steps=300),
        folder=tmp_path,
        examine=lambda hosts: Report(list(hosts), []),
        print_line=lambda text: None,
    )


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    return supervising(tmp_path)


def spiked(step: int) -> Outcome:
    return Outcome(outcomes.SPIKE, "LOSS SPIKE", step, spike=Spike(step, 9.0, 3.0))


def events(supervisor: Supervisor) -> list[dict[str, Any]]:
    return [json.loads(line) for line in supervisor.events.path.read_text().splitlines()]


def test_a_spike_sends_the_job_back_on_the_same_hosts(supervisor: Supervisor) -> None:
    """No host is blamed or checked; a second rewind adds to the skips of the first."""
    first = supervisor._rewind_id
    assert supervisor._prepare_restart(spiked(1000), HOSTS, 1) == HOSTS
    assert supervisor._rewind_overrides == rewind_overrides([(900, 300)], 900, first + 1)
    supervisor._prepare_restart(spiked(1002), HOSTS, 1)
    assert supervisor._rewind_overrides == rewind_overrides([(900, 300), (902, 300)], 902, first + 2)
    supervisor._prepare_restart(spiked(1001), HOSTS, 2)
    assert supervisor._rewind_overrides == rewind_overrides([(900, 300), (901, 600)], 901, first + 3)
    assert supervisor.host_pool.strikes == {}
    assert [event["event"] for event in events(supervisor)] == ["rewind", "restart"] * 3
    assert [event["to"] for event in events(supervisor) if event["event"] == "rewind"] == [900, 902, 901]


def test_what_the_run_file_skips_stays_skipped(tmp_path: Path) -> None:
    """The override replaces the whole list."""
    job = supervising(tmp_path, "data.skip=[{at_step: 500, steps: 10}, {at_step: 5000, steps: 20}]")
    first = job._rewind_id
    job._prepare_restart(spiked(1000), HOSTS, 1)
    assert job._rewind_overrides == rewind_overrides([(500, 10), (900, 300), (4700, 20)], 900, first + 1)


def test_divergence_is_a_spike_where_rewinds_are_on(supervisor: Supervisor) -> None:
    outcome = Outcome(outcomes.DIVERGENCE, "loss is nan at step 1000", 1000, ranks=[0], hosts=["node1"])
    assert supervisor._exit_code(outcome, 1) is None
    first = supervisor._rewind_id
    supervisor._prepare_restart(outcome, HOSTS, 1)
    assert supervisor._rewind_overrides == rewind_overrides([(900, 300)], 900, first + 1)
    supervisor.limits = RestartLimits(restarts=3)
    assert supervisor._exit_code(outcome, 1) == 2


@pytest.mark.parametrize("step", [1, 50, 100, 101])
def test_a_spike_too_early_to_go_back_before_it_asks_for_step_1(supervisor: Supervisor, step: int) -> None:
    """checkpoint.rewind_to = 0 would mean no rewind: the run would continue after the spike without a skip."""
    supervisor._prepare_restart(spiked(step), HOSTS, 1)
    assert supervisor._rewind_overrides[0] == "checkpoint.rewind_to=1"
    assert load_run(RUN_FILE, supervisor._rewind_overrides).checkpoint.rewind_to == 1


def test_spikes_at_one_place_end_the_job_in_the_end(supervisor: Supervisor) -> None:
    assert supervisor._exit_code(spiked(1000), 3) is None
    assert supervisor._exit_code(spiked(1000), 4) == 1
    assert events(supervisor)[-1]["event"] == "gave up"
