"""The protocol of ranks and supervisor: only peers with the token are served, and garbage ends only its connection."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ds.errors import UserError
from llama_ds.job import wire
from llama_ds.job.folder import Job
from llama_ds.job.heartbeat import STACKS_SIGNAL, HeartbeatConnection, Progress
from llama_ds.job.wire import Beat, Kind, Phase
from llama_ds.launch.job_files import prepare
from llama_ds.launch.supervise.server import Server

TOKEN = bytes(range(32))


@given(st.integers(0, 2**32 - 1), st.sampled_from(Phase), st.booleans(), st.text(max_size=200))
def test_a_beat_survives_the_wire(step: int, phase: Phase, waits: bool, doing: str) -> None:
    sent = Beat(step, phase, waits, doing.encode("utf-8", "replace").decode())
    got = wire.unpack_beat(wire.pack_beat(sent))
    assert got[:3] == sent[:3]
    assert sent.doing.startswith(got.doing.rstrip("\ufffd"))


@given(st.binary(max_size=400))
def test_no_bytes_do_more_than_break_the_protocol(data: bytes) -> None:
    buffer = bytearray(data)
    try:
        for kind, payload in wire.frames(buffer):
            if kind is Kind.BEAT:
                wire.unpack_beat(payload)
            elif kind is Kind.HELLO:
                wire.read_hello(TOKEN, bytes(16), payload)
            else:
                wire.from_json(payload)
    except wire.ProtocolError:
        pass


def test_hello_is_bound_to_token_and_nonce() -> None:
    """A recorded HELLO is invalid on another connection, and so is a modified one."""
    server_nonce, own_nonce = wire.new_nonce(), wire.new_nonce()
    payload = wire.hello(TOKEN, server_nonce, own_nonce, {"rank": 1})
    assert wire.read_hello(TOKEN, server_nonce, payload) == (own_nonce, {"rank": 1})
    changed = payload.replace(b'"rank": 1', b'"rank": 2')
    for token, nonce, received in (
        (TOKEN, wire.new_nonce(), payload),
        (bytes(32), server_nonce, payload),
        (TOKEN, server_nonce, changed),
    ):
        with pytest.raises(wire.ProtocolError):
            wire.read_hello(token, nonce, received)


def test_welcome_is_bound_to_token_and_both_nonces() -> None:
    """Ranks would obey a stranger on the launcher's port that repeats a welcome that it overheard."""
    theirs, own = wire.new_nonce(), wire.new_nonce()
    payload = wire.welcome(TOKEN, theirs, own)
    assert wire.is_welcome(TOKEN, theirs, own, payload)
    assert not wire.is_welcome(bytes(32), theirs, own, payload)
    assert not wire.is_welcome(TOKEN, wire.new_nonce(), own, payload)
    assert not wire.is_welcome(TOKEN, theirs, wire.new_nonce(), payload)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server("127.0.0.1")
    yield server
    server.close()


@pytest.fixture
def job(server: Server, tmp_path: Path) -> Job:
    job = Job(str(tmp_path / "attempt_01"), {"localhost": 2}, "pdsh", server.address, 0.05, 30.0)
    prepare(job, ["run.yaml"])
    server.expect(job.token(), job.world)
    return job


def wait_until(server: Server, so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not so():
        assert time.monotonic() < deadline
        server.poll()
        time.sleep(0.01)


def test_a_rank_is_heard_asked_and_leaves(server: Server, job: Job) -> None:
    progress = Progress()
    # The rank waits for its WELCOME, so the server must poll meanwhile.
    heartbeat = attend(server, job, 0, progress)
    progress.enter(Phase.TRAINING, 7)
    progress.doing = lambda: ("a backward", True)
    progress.tell(what="loss", step=7, loss=1.5)
    wait_until(server, lambda: server.members[0].beat == Beat(7, Phase.TRAINING, True, "a backward"))
    wait_until(server, lambda: (server.members[0], {"what": "loss", "step": 7, "loss": 1.5}) in server.reports)
    server.ask("stacks")
    wait_until(server, lambda: server.members[0].stacks)
    assert "test_a_rank_is_heard_asked_and_leaves" in (server.members[0].stacks or "")
    heartbeat.close()
    wait_until(server, lambda: server.members[0].left)
    assert not server.disconnected
    assert server.members[0].about["pid"] == os.getpid()


def test_a_rank_that_joins_another_attempt_keeps_no_file_of_this_one(server: Server, job: Job) -> None:
    """One more would stay open in every attempt, and a late request for stacks would write to what has its number."""
    connection = attend(server, job, 0, Progress())
    wait_until(server, lambda: server.members)
    connection.end()
    wait_until(server, lambda: not server.members[0].connected)
    opened = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert os.path.realpath(job.stacks(0)) not in opened
    assert not faulthandler.unregister(STACKS_SIGNAL)


def test_a_phase_is_told_with_its_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hang in a save would be seen late, or never, if a save counted from the start of the run."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress()
    progress.is_reporter = True
    for phase, seconds in ((Phase.LOADING, 20.0), (Phase.TRAINING, 3.0), (Phase.SAVING, 500.0), (Phase.TRAINING, 7.0)):
        now[0] += seconds
        progress.enter(phase)
    assert [told["seconds"] for told in progress.queue] == [20.0, 3.0, 500.0, 7.0]


def test_strangers_and_nonsense_are_dropped(server: Server, job: Job) -> None:
    """Connections without a token or with garbage are closed; ranks stay connected."""
    heartbeat = attend(server, job, 1, Progress())
    for data in (
        b"GET / HTTP/1.0\r\n\r\n",
        wire.frame(Kind.BEAT, b"x"),
        b"\xff" * 5000,
        wire.frame(Kind.HELLO, bytes(80)),
    ):
        stranger = socket.create_connection(server.address)
        stranger.sendall(data)
        stranger.settimeout(0.01)
        wait_until(server, lambda s=stranger: closed(s))
    assert list(server.members) == [1]
    assert server.members[1].connected
    heartbeat.close()


def test_ranks_of_another_attempt_are_refused(server: Server, job: Job, tmp_path: Path) -> None:
    """A rank that still runs on a lost host must not join the new attempt."""
    stale = Job(str(tmp_path / "attempt_00"), job.hosts, "pdsh", server.address, 0.05, 30.0)
    prepare(stale, [])
    connection = socket.create_connection(server.address)
    buffer = bytearray()
    while not (got := list(wire.frames(buffer))):
        server.poll()
        buffer += connection.recv(1000)
    hello = wire.hello(stale.token(), got[0][1], wire.new_nonce(), {"rank": 0, "host": "localhost"})
    connection.sendall(wire.frame(Kind.HELLO, hello))
    wait_until(server, lambda: closed(connection))
    assert not server.members


def test_the_token_is_the_owners_alone_and_in_no_other_file(job: Job) -> None:
    assert os.stat(job.path("token")).st_mode & 0o777 == 0o600
    secret = Path(job.path("token")).read_text()
    others = [path for path in Path(job.folder).rglob("*") if path.is_file() and path.name != "token"]
    assert others
    assert not any(secret in path.read_text() for path in others)
    assert "token" not in json.loads(Path(job.path("job.json")).read_text())


def test_listens_on_the_given_address_only(server: Server) -> None:
    assert server.address[0] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.address[1]), 1)
    with pytest.raises(UserError, match=r"192\.0\.2\.1:0: cannot listen"):
        Server("192.0.2.1")


def attend(server: Server, job: Job, rank: int, progress: Progress) -> HeartbeatConnection:
    """Return a rank's connection; the server polls during the handshake."""
    import threading

    hearing = threading.Event()

    def hear() -> None:
        while not hearing.is_set():
            server.poll()
            time.sleep(0.005)

    thread = threading.Thread(target=hear)
    thread.start()
    try:
        return HeartbeatConnection(job, rank, progress)
    finally:
        hearing.set()
        thread.join()


def closed(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True
