"""Ranks forked from a warm process: they are what DeepSpeed's launcher would have started, and killed like those."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llama_ds.job.folder import VARIABLE, Job
from llama_ds.launch.command import Command, build
from llama_ds.launch.job_files import prepare
from llama_ds.launch.supervise import agent
from llama_ds.launch.supervise.events import Events
from llama_ds.launch.supervise.standbys import Standbys, WarmRanks, reason_against

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "llama_ds" / "train.py")
TIMEOUT_S = 120.0  # imports on a busy machine
RANK = """
import json, os, pathlib, sys, time
rank = os.environ["RANK"]
print("rank", rank)
about = {"argv": sys.argv, "folder": os.getcwd(), "warm": "deepspeed" in sys.modules, "session": os.getsid(0)}
about |= {"environment": dict(os.environ)}
about |= {"files": [os.readlink(file) for file in pathlib.Path("/proc/self/fd").iterdir() if file.exists()]}
path = pathlib.Path(os.environ["LLAMA_DS_JOB"], f"about_{rank}")
path.with_suffix(".new").write_text(json.dumps(about))
path.with_suffix(".new").rename(path)
sys.exit(7) if "fail" in sys.argv and rank == "1" else time.sleep(600)
"""


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_ranks_of_a_warm_process_are_told_apart_killed_and_survive_it(tmp_path: Path) -> None:
    """Were they not found by their attempt's folder, two attempts would write at once after a failure."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    standbys = Standbys(tmp_path, Events(tmp_path / "events.jsonl", print), TRAIN, silence_s=60)

    def start(number: int, *arguments: str) -> tuple[Job, WarmRanks]:
        job = Job(str(tmp_path / f"attempt_{number:02d}"), {"localhost": 2}, "pdsh", ("127.0.0.1", 0), 5, 60)
        prepare(job, [])
        own_devices = {"LLAMA_DS_DEVICES": "0-1:4+5"} if number == 1 else {}
        ranks = standbys.ranks_of(job, command_of(job, own_devices))
        assert ranks, (tmp_path / "events.jsonl").read_text()
        ranks._request = {**ranks._request, "argv": [str(script), *arguments]}
        assert ranks.begin() == {"warm": True}
        wait_for(lambda: all(Path(job.folder, f"about_{rank}").exists() for rank in (0, 1)))
        return job, ranks

    try:
        job, ranks = start(1, "one", "two")
        found = agent.processes(VARIABLE, job.folder)
        assert sorted(one["rank"] for one in found.values()) == ["0", "1"]
        for pid, one in found.items():
            about = json.loads(Path(job.folder, f"about_{one['rank']}").read_text())
            assert about["warm"] and about["argv"] == [str(script), "one", "two"]
            assert about["folder"] == os.path.realpath(os.getcwd())
            assert about["session"] == one["group"] == pid, "a group of its own, to be killed alone"
            assert one["command"].startswith(f"{sys.executable} -u {script} one two")
            assert not [file for file in about["files"] if file.startswith("pipe:")], "it would keep the process alive"
            shown = about["environment"]
            assert (shown["RANK"], shown["LOCAL_RANK"], shown["WORLD_SIZE"]) == (one["rank"], one["rank"], "2")
            assert (shown["MASTER_ADDR"], shown["MASTER_PORT"]) == ("127.0.0.1", "4711")
            assert (shown[VARIABLE], shown["NCCL_DEBUG"]) == (job.folder, "WARN")
            assert not {"LLAMA_DS_ROOM", "PYTORCH_NVML_BASED_CUDA_CHECK"} & (shown.keys() - os.environ.keys())
            whole = Path(f"/proc/{pid}/environ").read_bytes().rstrip(b"\0").split(b"\0")
            assert {os.fsencode(f"{name}={value}") for name, value in shown.items()} == set(whole)
        assert sorted(job.launcher_log.read_text().split("\n")) == ["", "rank 0", "rank 1"]
        assert ranks.poll() is None and not ranks.has_exited(0)
        assert set(agent.kill(VARIABLE, job.folder)["killed"]) == set(found), "not the warm process"
        wait_for(lambda: ranks.has_exited(0) and ranks.has_exited(1))
        assert ranks.poll() == -signal.SIGKILL

        job, ranks = start(2, "fail")
        wait_for(lambda: ranks.poll() is not None)
        assert ranks.poll() == 7
        about = json.loads(Path(job.folder, "about_0").read_text())
        assert "LLAMA_DS_DEVICES" not in about["environment"], "devices are by rank, and the host may be another"
        (own,) = agent.processes(VARIABLE, standbys.own_folder)
        os.kill(own, signal.SIGKILL)
        wait_for(lambda: not standbys._is_usable("localhost"))
        (left,) = agent.processes(VARIABLE, job.folder).values()
        assert left["rank"] == "0", "the rank goes on without the warm process"
        agent.kill(VARIABLE, job.folder)
    finally:
        standbys.close()
        agent.kill(VARIABLE, str(tmp_path))


FAKE = """
import json, sys
def say(**values): print(json.dumps(values), flush=True)
say(what="ready", seconds=0, mib=0)
for line in sys.stdin:
    if json.loads(line)["do"] == "start":
        say(what="exited", pid=1, code=-9)
        say(what="started", ranks={"0": 2, "1": 3})
        say(what="exited", pid=1, code=-9)
        say(what="exited", pid=2, code=0)
"""


def fake_standbys(folder: Path) -> tuple[Standbys, Job]:
    package = folder / "package"
    package.mkdir()
    (package / "standby.py").write_text(FAKE)
    standbys = Standbys(folder, Events(folder / "events.jsonl", print), str(package / "train.py"), silence_s=60)
    job = Job(str(folder / "attempt_02"), {"localhost": 2}, "pdsh", ("127.0.0.1", 0), 5, 60)
    prepare(job, [])
    return standbys, job


def test_a_killed_rank_of_an_earlier_start_counts_for_none_of_the_next(tmp_path: Path) -> None:
    """Its exit may be seen late; it would end the next attempt, or make it done."""
    standbys, job = fake_standbys(tmp_path)
    try:
        ranks = standbys.ranks_of(job, command_of(job))
        assert ranks
        ranks.begin()
        wait_for(lambda: ranks.has_exited(0))
        assert ranks.poll() is None and not ranks.has_exited(1)
    finally:
        standbys.close()


def test_code_that_changes_during_a_job_is_imported_anew(tmp_path: Path) -> None:
    """Else ranks would run the old code, and those of a host that joins later the new one."""
    standbys, job = fake_standbys(tmp_path)
    try:
        standbys.wanted = job.hosts
        standbys.prepare(command_of(job))
        assert standbys.ranks_of(job, command_of(job))
        standbys.prepare(command_of(job))
        (tmp_path / "package" / "new.py").write_text("")
        assert standbys.ranks_of(job, command_of(job)) is None
        assert not agent.processes(VARIABLE, standbys.own_folder), "the old one has been killed"
        standbys.prepare(command_of(job))
        assert standbys._is_usable("localhost") and standbys.ranks_of(job, command_of(job))
    finally:
        standbys.close()


def test_a_host_that_comes_back_gets_one_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the restart that takes it in would wait for its imports."""
    monkeypatch.setattr("llama_ds.launch.supervise.standbys.AGAIN_S", 0.2)
    standbys, job = fake_standbys(tmp_path)
    script = tmp_path / "package" / "standby.py"
    script.write_text("raise SystemExit(255)")
    standbys.wanted = job.hosts

    def events() -> list[dict[str, Any]]:
        standbys.prepare(command_of(job))
        return [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]

    try:
        wait_for(events)
        first = standbys._by_host["localhost"]
        wait_for(lambda: events() and standbys._by_host["localhost"] is not first)
        (event,) = events()  # the same problem is told once
        assert "code 255" in event["text"] and not event["ready"]
        script.write_text(FAKE)
        wait_for(lambda: len(events()) == 2)
        assert list(events()[1]["ready"]) == ["localhost"] and not events()[1]["problems"]
    finally:
        standbys.close()


def command_of(job: Job, more: Mapping[str, str] | None = None) -> Command:
    return build(
        launcher="pdsh",
        hostfile=job.path("hostfile"),
        hosts=job.hosts,
        script=TRAIN,
        arguments_file=job.path("arguments"),
        master_addr="127.0.0.1",
        master_port=4711,
        exports={"NCCL_DEBUG": "WARN", "DS_ACCELERATOR": "cpu", VARIABLE: job.folder, **(more or {})},
        env_file=job.path("environment"),
        python=sys.executable,
        working_folder=os.path.realpath(os.getcwd()),
    )


def test_launchers_that_place_ranks_themselves_restart_without_warm_processes() -> None:
    assert reason_against("pdsh", {"node1": 8}) == ""
    assert "--launcher openmpi" in reason_against("openmpi", {"node1": 8})
