"""Which ranks stay in their processes after a fault, and that all others are killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_ds import train
from llama_ds.job.folder import VARIABLE, Job
from llama_ds.job.wire import Kind, frames, from_json
from llama_ds.launch.supervise import agent, kept
from llama_ds.launch.supervise.events import Events
from llama_ds.launch.supervise.kept import KeptRank, KeptRanks, reasons_against
from llama_ds.launch.supervise.server import Member, Server
from llama_ds.parallel import leaving
from tools import launch

HOSTS = {"localhost": 4}


def member(rank: int, **about: object) -> Member:
    return Member(rank, "localhost", {"pid": rank, "can_leave": True}, **about)  # type: ignore[arg-type]


def test_a_rank_that_failed_ended_or_is_not_heard_is_not_kept() -> None:
    """Its process may hold what made it fail. The log says of each why it is started anew."""
    members = {
        0: member(0),
        1: member(1),  # named as the cause
        2: member(2, connected=False),
        3: member(3, left=True),
        4: member(4, failed=True),  # by itself
        5: member(5, failed=True, waits=True),  # its connection to another rank broke
        6: member(6),  # DeepSpeed's launcher has started it
    }
    against = reasons_against(members, [1], lambda _, pid: pid != 6)
    assert against == {
        1: "the fault is its own",
        2: "it has ended or is not heard",
        3: "it has ended or is not heard",
        4: "it has failed by itself",
        6: kept.NOT_FORKED,
    }
    assert kept._in_words(against).startswith("rank 1: the fault is its own; ranks 2, 3: it has ended or is not heard;")
    everyone = reasons_against(members, [], lambda *_: True)
    assert everyone == dict.fromkeys(members, "the fault may be any rank's"), "a hang of which nobody knows the cause"


@pytest.fixture
def sockets() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    pairs = [socket.socketpair() for _ in range(4)]
    yield pairs
    for pair in pairs:
        for one in pair:
            one.close()


def test_a_kept_rank_keeps_its_host_and_number_there(
    sockets: list[tuple[socket.socket, socket.socket]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rank may change, with the hosts before its own. One without a place, or that has died since, is ended."""
    killed = []
    monkeypatch.setattr(kept.processes, "kill", lambda *arguments: killed.append(arguments))
    places = [("node1", 0), ("node1", 1), ("node2", 0), ("node2", 1)]
    ranks = [KeptRank(r, host, number, 100 + r, sockets[r][0]) for r, (host, number) in enumerate(places)]
    left = KeptRanks("/job/attempt_02", ranks)
    following = Job("/job/attempt_03", {"node3": 2, "node2": 2}, "pdsh", ("", 0), 1, 1)
    taken = left.take(following, lambda one: one.pid != 103)
    assert {rank: one.pid for rank, one in taken.items()} == {2: 102}
    left.release()
    (arguments,) = killed
    assert (sorted(arguments[0]), arguments[1]) == (["node1", "node2"], "/job/attempt_02")
    assert arguments[3] == {2: 102}, "the one that has been taken, by the rank in its environment"
    for rank in (0, 1, 3):
        assert sockets[rank][1].recv(1) == b"", "it ends as soon as its connection does"

    taken[2].join({"argv": ["train.py"], "environment": {"RANK": "2"}, "folder": "/"})
    (message,) = (
        from_json(payload) for kind, payload in frames(bytearray(sockets[2][1].recv(4096))) if kind is Kind.ASK
    )
    assert (message["do"], message["environment"]) == ("join", {"RANK": "2"})
    sockets[2][1].send(b"a heartbeat")
    assert not taken[2].has_joined()
    sockets[2][1].close()
    assert taken[2].has_joined()
    killed.clear()
    left.stop()
    assert not killed


def test_ranks_on_cuda_are_started_anew_and_the_log_says_so(tmp_path: Path) -> None:
    ranks = {0: Member(0, "localhost", {"pid": 1, "can_leave": False}), 1: member(1)}
    events = Events(tmp_path / "events.jsonl", print)
    server = Server("127.0.0.1")
    try:
        server.members = ranks
        against = reasons_against(ranks, [1], lambda *_: True)
        assert kept.leave(Job(str(tmp_path), HOSTS, "pdsh", ("", 0), 1, 1), server, against, 60.0, events) is None
    finally:
        server.close()
    (event,) = map(json.loads, events.path.read_text().splitlines())
    assert event["event"] == "not kept" and "no rank on CUDA is kept" in event["text"]


def test_the_end_of_an_attempt_spares_the_ranks_that_stay_and_no_others(tmp_path: Path) -> None:
    """A host may have the process id of another host's rank, and a child the environment of its rank."""
    sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
    started = [
        subprocess.Popen(
            sleep, env=os.environ | {VARIABLE: str(tmp_path), "RANK": str(rank)}, stdout=-1, start_new_session=True
        )
        for rank in (0, 1, 2)
    ]
    try:
        for process in started:
            assert process.stdout and process.stdout.readline()
        pids = [process.pid for process in started]
        answer = agent.kill(VARIABLE, str(tmp_path), {"1": pids[1], "0": pids[2]})
        assert sorted(answer["killed"]) == sorted([pids[0], pids[2]]) and not answer["left"]
        assert [process.poll() for process in started] == [-signal.SIGKILL, None, -signal.SIGKILL]
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()


@pytest.mark.parametrize("keeps", [False, True])
def test_only_ranks_that_may_be_kept_import_deepspeed_before_they_connect(
    keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imports take seconds, more from a network's disk, in which the launcher would not hear of a rank."""
    done = []
    monkeypatch.setattr(leaving, "state_of_process", lambda: done.append("state"))
    monkeypatch.setattr(train, "take_part", lambda _: done.append("part") or 0)
    monkeypatch.setattr(train, "REQUESTS", SimpleNamespace(listen=lambda: None))
    monkeypatch.setattr(sys, "argv", ["train.py", "ds_configs/quickstart.yaml"])
    job = Job(str(tmp_path), HOSTS, "pdsh", ("", 0), 1, 1, keeps_ranks=keeps)
    (tmp_path / "job.json").write_text(json.dumps(asdict(job)))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert train.main() == 0
    assert done == (["state", "part"] if keeps else ["part"])


@pytest.mark.parametrize(
    "options", [[], ["--supervise", "--no-warm-processes"], ["--supervise", "--launcher", "slurm"]]
)
def test_ranks_that_no_warm_process_has_forked_cannot_be_kept(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ds_configs/quickstart.yaml", "--hostfile", "hostfiles/local", "--keep-ranks", *options]
    assert launch.main(words) == 2
    assert "--keep-ranks: keeps ranks that a restart would fork from warm processes" in capsys.readouterr().err


def test_a_bound_for_leaving_without_ranks_that_leave_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """It would be ignored, and the user would believe that ranks are kept."""
    assert launch.main(["ds_configs/quickstart.yaml", "--hostfile", "hostfiles/local", "--leave-s", "30"]) == 2
    assert capsys.readouterr().err.startswith("error: --leave-s 30: ")
