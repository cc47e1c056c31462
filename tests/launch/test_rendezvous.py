"""Where the launcher listens and rank 0 is found, also where the launcher runs on the first host; causes come first."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_ds.job.folder import Job
from llama_ds.launch import rendezvous
from llama_ds.launch.command import Command
from llama_ds.launch.job_files import prepare
from llama_ds.launch.preflight.examine import _addresses
from llama_ds.launch.remote import HostAnswer, on_hosts
from llama_ds.launch.rendezvous import UnreachableHost, arrange
from llama_ds.launch.supervise import attempt as outcomes
from llama_ds.launch.supervise.attempt import Attempt, Outcome, Watch
from llama_ds.launch.supervise.events import Events
from llama_ds.launch.supervise.server import Member, Server

LAPTOP, LOGIN = "203.0.113.9", "198.51.100.1"  # the user's own, and this machine's on the network of logins
INSIDE, NODE2 = "10.1.0.1", "10.1.0.2"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """This machine has INSIDE; node2 answers by ssh. What node2 says, or None, may be changed."""
    said: dict[str, Any] = {"node2": {"ssh": [INSIDE, "50000", NODE2, "22"]}}

    def answer(hosts: Sequence[str], argv: Sequence[str], **options: Any) -> dict[str, HostAnswer]:
        (host,) = hosts
        if host not in said:
            return on_hosts(hosts, argv, **options)
        if said[host] is None:
            return {host: HostAnswer(host, 255, "", "ssh: no route", 0.0)}
        values = {"nic": None, "towards": None, "port": 4711} | said[host]
        return {host: HostAnswer(host, 0, json.dumps(values), "", 0.0)}

    addresses = {"eth0": [SimpleNamespace(address=INSIDE)], "eth1": [SimpleNamespace(address=LOGIN)]}
    monkeypatch.setattr(rendezvous.remote, "on_hosts", answer)
    monkeypatch.setattr(rendezvous.psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(rendezvous, "own_address_towards", {NODE2: INSIDE}.get)
    monkeypatch.setenv("SSH_CONNECTION", f"{LAPTOP} 50000 {LOGIN} 22")
    return said


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("first", ["localhost", socket.gethostname()])
def test_the_first_host_listens_towards_the_others(first: str) -> None:
    """Not at an address of its user's login, which it does not have or the hosts do not reach."""
    found = arrange([first, "node2"])
    assert (found.listen, found.master) == (INSIDE, INSIDE)
    assert 20_000 <= found.port < 32_000, "a connection could be given it before rank 0 listens"


@pytest.mark.usefixtures("cluster")
def test_a_job_on_this_machine_alone_listens_on_loopback() -> None:
    found = arrange(["localhost"])
    assert (found.listen, found.master) == ("127.0.0.1", "127.0.0.1")


def test_another_first_host_sees_this_machine(cluster: dict[str, Any]) -> None:
    assert arrange(["node2", "node3"]) == rendezvous.Rendezvous(NODE2, 4711, INSIDE)
    cluster["node2"] = {"ssh": [LAPTOP, "50000", NODE2, "22"]}  # the address of a jump host
    assert arrange(["node2", "node3"]).listen == INSIDE
    cluster["here"] = {"ssh": ["127.0.0.1", "50000", "127.0.1.1", "22"]}  # Debian's name of this machine
    cluster["node2"] = {"ssh": [INSIDE, "50000", NODE2, "22"]}
    assert arrange(["here", "node2"]) == rendezvous.Rendezvous(INSIDE, 4711, INSIDE)


def test_a_next_host_that_does_not_answer_is_the_one_that_is_named(cluster: dict[str, Any]) -> None:
    cluster["node2"] = None
    with pytest.raises(UnreachableHost, match=r"node2: the next host does not answer \(ssh: no route\)") as lost:
        arrange(["localhost", "node2"])
    assert lost.value.host == "node2"


def test_preflight_gives_hosts_an_address_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[_addresses.__module__]  # the package exports a function of the same name
    monkeypatch.setattr(module, "own_address_towards", {NODE2: INSIDE}.get)
    assert _addresses({"localhost": "127.0.0.1", "node2": NODE2}) == {"localhost": INSIDE, "node2": NODE2}
    assert _addresses({"localhost": "127.0.0.1"}) == {"localhost": "127.0.0.1"}


@pytest.fixture
def start(tmp_path: Path) -> Callable[[], Attempt]:
    """Return an attempt on two hosts, of whose ranks only rank 0 has connected and then lost its connection."""

    def made() -> Attempt:
        job = Job(str(tmp_path / "attempt_01"), {"node1": 1, "node2": 1}, "pdsh", ("127.0.0.1", 0), 5.0, 60.0)
        prepare(job, [])
        server = Server("127.0.0.1")
        server.expect(b"", 2)
        server.members[0] = Member(0, "node1", {"pid": 4})
        command = Command([], {}, "", "", str(tmp_path))
        return Attempt(job, command, server, Watch(), Events(tmp_path / "events.jsonl", lambda _: None), print)

    return made


def test_the_error_of_a_rank_that_never_connected_comes_first(start: Callable[[], Attempt]) -> None:
    """Its end made the launcher end the others, so that the first news was `RANK DIED ... for lack of memory`."""
    this = start()
    died = this._died(this.server.members[0])
    assert this._with_cause(died) is died, "it may still be starting"
    cause = "error: rank 1 on node2 cannot reach the launcher at 127.0.0.1:4711 (refused)"
    this.job.log(1).write_text(f"loading\n{cause}\n")
    found = this._with_cause(died)
    assert found.text.startswith(f"rank 1 on node2 did not join: {cause}\nRANK DIED: rank 0 on node1")
    assert (found.kind, found.ranks, found.hosts) == (outcomes.DEATH, [1], ["node2"])
    mistake = Outcome(outcomes.MISTAKE, "model.hidden_size ...")
    assert this._with_cause(mistake) is mistake, "a report of a rank says more"
    this.server.close()


def test_ranks_that_have_not_connected_are_named(start: Callable[[], Attempt]) -> None:
    this = start()
    this._said -= outcomes.WAITING_S + 1
    assert this._judge() is None and this._judge() is None
    (line,) = [json.loads(line) for line in this.events.path.read_text().splitlines()]
    assert line["text"] == "waiting for 1 of 2 ranks, on node2, the first is rank 1" and line["ranks"] == [1]
    this.server.close()
