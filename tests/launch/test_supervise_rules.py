"""The supervisor's rules: detection of loss spikes and hangs, the culprits of a hang, and the choice of hosts."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.job.folder import Job
from llama_ds.job.wire import Beat, Phase
from llama_ds.launch.supervise import hang
from llama_ds.launch.supervise.hang_detector import HangDetector, HangLimits
from llama_ds.launch.supervise.host_pool import DRAINED, HostPool, first_slots, largest_world
from llama_ds.launch.supervise.processes import HostProcesses
from llama_ds.launch.supervise.server import Member
from llama_ds.launch.supervise.spikes import WINDOW, SpikeRule

ROOT = Path(__file__).resolve().parents[2]


def falling(step: int) -> float:
    """A typical loss: a power law with batch noise."""
    return 2.0 + 8.0 * (step + 10) ** -0.3 + 0.02 * math.sin(step * 12.9898)


def test_no_spike_in_a_run_as_they_are() -> None:
    rule = SpikeRule()
    assert not any(rule.take(step, falling(step)) for step in range(5000))


@pytest.mark.parametrize("at", [3 * WINDOW, 1000, 4000])
def test_a_spike_is_found_at_its_first_step(at: int) -> None:
    rule = SpikeRule()
    found = [rule.take(step, falling(step) + (1.0 if at <= step else 0)) for step in range(at + 4)]
    (spike,) = [one for one in found[: at + 3] if one]
    assert spike.step == at
    assert spike.before == pytest.approx(falling(at), rel=0.05)


def test_one_bad_batch_is_none_and_nan_is_one_at_once() -> None:
    rule = SpikeRule()
    losses = [falling(step) + (3.0 if step in (200, 201, 250) else 0) for step in range(300)]
    assert not any(rule.take(step, loss) for step, loss in enumerate(losses))
    assert rule.take(300, math.nan) is not None


def member(rank: int, step: int, phase: Phase = Phase.TRAINING, waits: bool = True, stacks: str = "") -> Member:
    return Member(rank, f"node{rank // 2 + 1}", {"pid": rank}, Beat(step, phase, waits, "wait"), stacks=stacks or None)


def test_the_hang_limit_is_learned_from_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is ten times the median step, at least min_s, and start_s while the step time is unknown."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    detector = HangDetector(HangLimits(factor=10, min_s=5, start_s=600))
    detector.update([member(0, 0)])
    assert detector.bound() == 600
    for step in range(1, 9):
        now[0] += 2.0
        assert not detector.update([member(0, step), member(1, step)])
    assert detector.step_s == 2.0
    assert detector.bound() == 20
    now[0] += 19.9
    assert not detector.update([member(0, 8), member(1, 8)])
    now[0] += 0.2
    assert detector.update([member(0, 8), member(1, 8)])
    # The first save may take start_s, later ones ten times the longest save.
    assert not detector.update([member(0, 8, Phase.SAVING), member(1, 8)])
    assert detector.bound() == 600
    detector.learn(Phase.SAVING, 3.0)
    assert detector.bound() == 30


STACK = 'MainThread:\n  File "/x/train.py", line 1, in main\n  File "/x/{file}", line {line}, in {function}\n'
WAITING = STACK.format(file="point_to_point.py", line=9, function="wait")
WORKING = STACK.format(file="loss.py", line=40, function="forward")


def standings(
    tmp_path: Path, members: dict[int, Member], hosts: dict[str, HostProcesses], silent: tuple[int, ...] = ()
) -> hang.HangReport:
    job = Job(str(tmp_path), {"node1": 2, "node2": 2}, "pdsh", ("", 0), 1, 1)
    now = time.monotonic()
    beats = {rank: now - (60 if rank in silent else 0) for rank in members}
    report = hang.HangReport(12, 10)
    report.ranks = hang.examine(job, members, hosts, beats, 5)
    return report


def host(name: str, ranks: dict[int, str], problem: str | None = None) -> HostProcesses:
    command = "python llama_ds/train.py"
    found = {str(r): {"rank": str(r), "state": s, "command": command} for r, s in ranks.items()}
    return HostProcesses(name, problem, {"processes": found} if problem is None else {})


ALIVE = {"node1": host("node1", {0: "S", 1: "S"}), "node2": host("node2", {2: "S", 3: "S"})}
ALL_WAIT = {rank: member(rank, 5, stacks=WAITING) for rank in range(4)}


@pytest.mark.parametrize(
    ("members", "hosts", "silent", "culprits", "reason"),
    [
        (ALL_WAIT, ALIVE, (), [], "no rank stands out"),
        (ALL_WAIT, ALIVE | {"node2": host("node2", {2: "S", 3: "T"})}, (3,), [3], "its process is stopped"),
        (ALL_WAIT, ALIVE | {"node2": host("node2", {2: "S"})}, (), [3], "its process is gone"),
        (ALL_WAIT, ALIVE | {"node2": host("node2", {}, "ssh: no route")}, (2, 3), [2, 3], "its host does not answer"),
        (ALL_WAIT, ALIVE, (1,), [1], "does not report"),
        (ALL_WAIT | {2: member(2, 5, waits=False, stacks=WORKING)}, ALIVE, (), [2], "computes while most"),
        (ALL_WAIT | {0: member(0, 4, stacks=WAITING)}, ALIVE, (), [0], "fewer steps"),
        (ALL_WAIT | {1: member(1, 5, stacks=WORKING)}, ALIVE, (), [1], "in another part of the step"),
        (
            {r: ALL_WAIT[r] for r in (0, 1, 2)},
            ALIVE | {"node2": host("node2", {2: "S"})},
            (),
            [3],
            "its process is gone",
        ),
    ],
)
def test_the_culprit_is_named(
    tmp_path: Path,
    members: dict[int, Member],
    hosts: dict[str, HostProcesses],
    silent: tuple[int, ...],
    culprits: list[int],
    reason: str,
) -> None:
    report = standings(tmp_path, members, hosts, silent)
    assert [s.rank for s in report.culprits] == culprits
    assert reason in report.text()
    assert len(report.as_json()["ranks"]) == 4  # type: ignore[arg-type]


def test_stacks_of_the_fault_handler_are_read_too() -> None:
    text = (
        'Thread 0x01 (most recent call first):\n  File "/x/threading.py", line 5 in wait\n\n'
        'Current thread 0x02 (most recent call first):\n  File "/x/loss.py", line 40 in forward\n'
        '  File "/x/t.py", line 1 in main\n'
    )
    assert hang.innermost(text) == ("t.py:1 main", "loss.py:40 forward")


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return load_run(str(ROOT / "ds_configs" / "llama_65b.yaml"), [])


HOSTS = {f"node{i:03}": 8 for i in range(256)}


def test_spares_take_the_places_of_bad_hosts(run: RunConfig) -> None:
    """Ranks of good hosts keep their hosts, where their states in memory are, also when a replaced host is back."""
    host_pool = HostPool(run, HOSTS, {"spare1": 8, "spare2": 4, "spare3": 8})
    good = [host for host in host_pool.all_hosts if host not in ("node003", "node200")]
    chosen = host_pool.choose(good)
    assert list(chosen)[3] == "spare1"
    assert list(chosen)[200] == "spare3"  # spare2 has too few slots
    assert [h for h in chosen if h in HOSTS] == [h for h in HOSTS if h in good]
    assert host_pool.choose(list(host_pool.all_hosts)) == chosen
    assert list(host_pool.choose([host for host in host_pool.all_hosts if host != "spare3"]))[200] == "node003"
    assert host_pool.choose(list(HOSTS)) == HOSTS


def test_a_host_that_fails_twice_makes_place_for_a_spare(run: RunConfig) -> None:
    host_pool = HostPool(run, HOSTS, {"spare1": 8})
    host_pool.blame(["node007"])
    assert host_pool.choose(list(host_pool.all_hosts)) == HOSTS
    host_pool.blame(["node007"])
    assert list(host_pool.choose(list(host_pool.all_hosts)))[7] == "spare1"
    # Without a spare, the host stays.
    assert host_pool.choose(list(HOSTS)) == HOSTS


def test_strikes_decay_and_the_worst_host_makes_place_first(run: RunConfig) -> None:
    """Two failures in a month exclude no host; among hosts that all failed twice, the spare replaces the worst."""
    at = 0.0
    host_pool = HostPool(run, HOSTS, {"spare1": 8}, lambda: at)
    host_pool.blame(["node007"])
    at = 15 * 86400.0
    host_pool.blame(["node007"])
    assert host_pool.strikes == {"node007": pytest.approx(1 + 0.5 ** (15 / 7), abs=1e-3)}
    assert host_pool.choose(list(host_pool.all_hosts)) == HOSTS
    for host, failures in (("node007", 1), ("node008", 3), ("node009", 2)):
        host_pool.blame([host] * failures)
    chosen = host_pool.choose(list(host_pool.all_hosts))
    assert list(chosen)[7:10] == ["node007", "spare1", "node009"]
    # node008 is free again, but who loses another host must not move those that hold the copies of its states.
    assert (
        list(host_pool.choose([host for host in host_pool.all_hosts if host != "node100"]))[7:10] == list(chosen)[7:10]
    )


def test_a_host_with_wrong_numbers_makes_place_as_soon_as_there_is_another(run: RunConfig) -> None:
    """It is taken while no other host is there; one that only failed keeps its place, and its copies of states."""
    at = 0.0
    host_pool = HostPool(run, HOSTS, now=lambda: at)
    host_pool.blame(["node007"], DRAINED)
    host_pool.blame(["node008"] * 3)
    assert host_pool.choose(list(HOSTS)) == HOSTS
    host_pool.replace(HOSTS, {"spare1": 8, "spare2": 8})
    chosen = host_pool.choose(list(host_pool.all_hosts))
    assert list(chosen)[7:9] == ["spare1", "node008"]
    bad = {"node100", "spare2"}
    back = host_pool.choose([host for host in host_pool.all_hosts if host not in bad])
    assert list(back)[100] == "node007", "better than fewer ranks"
    at = 11 * 86400.0
    host_pool.replace(HOSTS, {"spare1": 8, "spare2": 8})
    assert host_pool.choose(list(host_pool.all_hosts)) == back, "its strikes have decayed"


def test_hosts_that_are_added_to_the_hostfile_are_used_or_are_spares(run: RunConfig) -> None:
    """65B: dp divides the batch, so that three more are spares, and 256 more double dp; a removed one is left out."""
    host_pool = HostPool(run, HOSTS)
    new = {f"new{i:03}": 8 for i in range(256)}
    some = dict(list(new.items())[:3])
    assert host_pool.replace(HOSTS | some, {}) == "with new000, new001, new002"
    assert host_pool.choose(list(host_pool.all_hosts)) == HOSTS
    assert list(host_pool.choose([host for host in host_pool.all_hosts if host != "node003"]))[3] == "new000"
    host_pool.replace(HOSTS | new, {})
    assert host_pool.choose(list(host_pool.all_hosts)) == HOSTS | new
    left = {host: slots for host, slots in (HOSTS | new).items() if host != "node000"}
    assert host_pool.replace(left, {}) == "without node000"
    assert "node000" not in host_pool.choose(list(HOSTS | new))


def test_without_spares_the_world_shrinks_to_a_legal_one(run: RunConfig) -> None:
    """65B: pp * tp = 64, and dp divides the global batch, so 128 of 255 hosts are used."""
    host_pool = HostPool(run, HOSTS)
    chosen = host_pool.choose([host for host in HOSTS if host != "node000"])
    world = sum(chosen.values())
    parallel = run.parallel
    assert world % (parallel.pp * parallel.tp) == 0
    dp = world // (parallel.pp * parallel.tp)
    assert run.training.global_batch % dp == 0
    assert "node000" not in chosen
    assert largest_world(run, 2048) == 2048
    assert largest_world(run, 2047) == world
    with pytest.raises(UserError, match="too few"):
        host_pool.choose(["node001"])


def test_a_smaller_world_has_whole_groups_of_neighbours(run: RunConfig) -> None:
    """65B with dp 32: no smaller one has 32 neighbours."""
    run = replace(run, parallel=replace(run.parallel, gradient_neighbours=32))
    host_pool = HostPool(run, HOSTS)
    with pytest.raises(UserError, match=r"a multiple of parallel\.gradient_neighbours = 32"):
        host_pool.choose([host for host in HOSTS if host != "node000"])


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(1, 8), min_size=1), st.integers(0, 40))
def test_first_slots_are_as_many_as_asked(hosts: dict[str, int], world: int) -> None:
    world = min(world, sum(hosts.values()))
    chosen = first_slots(hosts, world)
    assert sum(chosen.values()) == world
    assert all(chosen[host] <= hosts[host] for host in chosen)
    assert list(chosen) == list(hosts)[: len(chosen)]
