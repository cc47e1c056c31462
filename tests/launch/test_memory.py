"""States in the memory of hosts: whole or not there, copied only by those who know the token, freed with the job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llama_ds.job import memory_keeper
from llama_ds.job.memory_link import CHUNK_BYTES, MemoryServer, get, put
from llama_ds.job.memory_slots import HEADER_BYTES, MemorySlot, oldest, open_slots, remove_others, whole_slots
from llama_ds.layout.axes import Axes
from llama_ds.layout.peers import peer_ranks

TOKEN = b"t" * 32
SIZE = CHUNK_BYTES + 4096


def filled(path: Path, step: int, value: int = 7, nbytes: int = SIZE) -> MemorySlot:
    """A whole state of `step` in a new file."""
    slot = MemorySlot(path, nbytes)
    slot.payload[:] = bytes([value]) * nbytes
    slot.complete({"step": step, "checksum": slot.checksum()})
    return slot


@pytest.fixture
def server() -> Iterator[MemoryServer]:
    found = MemoryServer("127.0.0.1", TOKEN)
    yield found
    found.close()


def test_a_state_is_whole_or_not_there(tmp_path: Path) -> None:
    slot = filled(tmp_path / "rank_00003.a", 9)
    again = MemorySlot(slot.path)
    assert again.is_intact and again.step == 9
    again.payload[SIZE - 1] = 8
    assert slot.header and not slot.is_intact  # one changed byte
    slot.clear()
    assert again.header is None and again.step == -1
    (tmp_path / "rank_00004.a").write_bytes(b"")  # a process was killed before it had a size
    assert list(whole_slots(tmp_path)) == []


def test_the_oldest_state_is_overwritten(tmp_path: Path) -> None:
    slots = open_slots(tmp_path, 3, 64)
    for step in (4, 5, 6, 7):
        assert oldest(slots) is slots[step % 4 % 3]
        oldest(slots).complete({"step": step})
    assert [(rank, slot.step) for rank, slot in whole_slots(tmp_path)] == [(3, 7), (3, 5), (3, 6)]
    remove_others(tmp_path, {2})
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_size_is_made_anew(tmp_path: Path) -> None:
    filled(tmp_path / "rank_00000.a", 9)
    other = MemorySlot(tmp_path / "rank_00000.a", 128)
    assert other.header is None and len(other.payload) == 128
    assert other.path.stat().st_size == HEADER_BYTES + 128


def test_copies_travel_with_their_checksums(tmp_path: Path, server: MemoryServer) -> None:
    (tmp_path / "here").mkdir()
    own, kept = filled(tmp_path / "rank_00003.a", 9), open_slots(tmp_path / "here", 3, SIZE)
    server.keep({3: kept})
    put(server.address, TOKEN, 3, own)
    assert oldest(kept) is kept[1] and kept[0].header == own.header and kept[0].payload == own.payload
    begin = time.monotonic()
    put(server.address, TOKEN, 3, own, mib_per_s=20.0)
    assert time.monotonic() - begin >= SIZE / 2**20 / 20 and kept[1].is_intact

    server.offer({(3, 9): kept[0]})
    back = MemorySlot(tmp_path / "rank_00003.b", SIZE)
    get(server.address, TOKEN, 3, 9, back)
    assert back.header == own.header and back.payload == own.payload


def test_a_copy_that_changed_on_the_way_is_refused(tmp_path: Path, server: MemoryServer) -> None:
    (tmp_path / "here").mkdir()
    own, kept = filled(tmp_path / "rank_00003.a", 9), open_slots(tmp_path / "here", 3, SIZE)
    server.keep({3: kept})
    server.offer({(3, 9): own})
    own.payload[5] = 0
    with pytest.raises(OSError, match="another checksum"):
        put(server.address, TOKEN, 3, own)
    assert kept[0].header is None
    with pytest.raises(OSError, match="another checksum"):
        get(server.address, TOKEN, 3, 9, kept[1])
    assert kept[1].header is None


@pytest.mark.parametrize("token", [b"x" * 32, b""])
def test_without_the_token_nothing_is_read_or_stored(token: bytes, tmp_path: Path, server: MemoryServer) -> None:
    own, (kept, *_) = filled(tmp_path / "rank_00002.a", 9), open_slots(tmp_path, 3, SIZE)
    server.offer({(3, 9): own})
    server.keep({3: [kept]})
    for call in (lambda: put(server.address, token, 3, own), lambda: get(server.address, token, 3, 9, kept)):
        with pytest.raises(OSError):
            call()
    assert kept.header is None


def test_an_interrupted_transfer_leaves_no_state(tmp_path: Path, server: MemoryServer) -> None:
    own, kept = filled(tmp_path / "rank_00002.a", 9), open_slots(tmp_path, 3, SIZE)
    server.keep({3: kept})
    put(server.address, TOKEN, 3, own)
    listening = socket.create_server(("127.0.0.1", 0))

    def relay_some() -> None:
        """Pass on the handshake and some of the payload, then close, as a killed sender does."""
        (sender, _), receiver = listening.accept(), socket.create_connection(server.address)
        threading.Thread(target=_pass_on, args=(receiver, sender, SIZE), daemon=True).start()
        _pass_on(sender, receiver, SIZE // 2)
        receiver.close()
        sender.close()

    threading.Thread(target=relay_some, daemon=True).start()
    with pytest.raises(OSError):
        put(listening.getsockname()[:2], TOKEN, 3, own)
    listening.close()
    assert [slot.step for slot in kept] == [9, -1, -1]


def _pass_on(source: socket.socket, target: socket.socket, nbytes: int) -> None:
    passed = 0
    while passed < nbytes:
        try:
            chunk = source.recv(1 << 16)
            target.sendall(chunk)
        except OSError:
            return
        if not chunk:
            return
        passed += len(chunk)


def test_memory_is_freed_when_nobody_holds_the_run(tmp_path: Path) -> None:
    folder, lock = tmp_path / "memory" / "node1", tmp_path / "run" / "ranks.lock" / "a1"
    folder.mkdir(parents=True)
    lock.parent.mkdir(parents=True)
    lock.touch()
    filled(folder / "rank_00000.a", 3)
    command = [sys.executable, "-I", memory_keeper.__file__, str(folder), "3", str(lock.parent)]
    assert not memory_keeper.is_kept(str(folder))
    for _ in range(2):
        assert subprocess.run(command, timeout=60).returncode == 0
    until = time.monotonic() + 6
    while time.monotonic() < until:
        os.utime(lock)  # a heartbeat
        time.sleep(0.2)
    (keeper,) = [
        p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or ())
    ]  # one is enough
    assert keeper not in psutil.Process().children(recursive=True), "launchers kill the children of ranks"
    assert memory_keeper.is_kept(str(folder)), "a restart does not wait for another"
    lock.unlink()
    psutil.wait_procs([keeper], timeout=60)
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    ("axes", "slots", "apart"),
    [
        (Axes(pp=2, dp=2, tp=2), [4, 4], False),  # a host is a stage: its peer must be in the other one
        (Axes(pp=4, dp=4, tp=8), [8] * 16, True),
        (Axes(pp=8, dp=32, tp=8), [8] * 256, True),
        (Axes(dp=8, cp=2), [8, 8], False),
        (Axes(pp=2, dp=4, cp=2), [4] * 4, True),
    ],
)
def test_a_peer_is_on_another_host_pipeline_and_replica(axes: Axes, slots: list[int], apart: bool) -> None:
    hosts = [f"node{i}" for i, count in enumerate(slots) for _ in range(count)]
    peers = peer_ranks(axes, hosts)
    assert peers and sorted(peers) == list(range(axes.world))
    for rank, peer in enumerate(peers):
        assert hosts[rank] != hosts[peer]
        if apart:
            assert peer not in axes.group(rank, "pp") and peer not in axes.group(rank, "dp", "cp")


def test_hosts_of_unequal_sizes_have_peers_and_one_host_has_none() -> None:
    peers = peer_ranks(Axes(dp=4), ["a", "a", "a", "b"])
    assert peers == [3, 3, 3, 0]
    assert peer_ranks(Axes(dp=4), ["a"] * 4) is None
