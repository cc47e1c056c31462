"""A remote that is temporarily slow, truncated, corrupt or down costs no row; a permanent failure is reported soon."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import random
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from flaky_server import FlakyServer

from llama_ds.data.source import store as store_module
from llama_ds.data.source.cache import Cache
from llama_ds.data.source.store import BadFile, RetryPolicy, Store, open_store
from llama_ds.errors import UserError
from llama_ds.log import logger
from tools import shards

SHARD = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(SHARD).hexdigest()
QUICK = RetryPolicy(deadline_s=30, first_wait_s=0.01, max_wait_s=0.05, stall_s=15)
SHORT = RetryPolicy(deadline_s=1, first_wait_s=0.01, max_wait_s=0.05, stall_s=15)
STALLS = RetryPolicy(deadline_s=60, first_wait_s=0.01, max_wait_s=0.05, stall_s=3)  # the server itself is never so slow


def store_of(location: str, tmp_path: Path, policy: RetryPolicy = QUICK) -> Store:
    return open_store(location, Cache(str(tmp_path / "cache"), 1 << 20), policy)


def served(
    tmp_path: Path, faults: Iterable[int | str | None], ranges: bool = True, policy: RetryPolicy = QUICK
) -> list:
    """Fetch a shard from a server with `faults`; return the ranges that it was asked for. Raises BadFile."""
    with FlakyServer({"/c4/a.tar": SHARD}, ranges) as server:
        server.faults["/c4/a.tar"] = iter(faults)
        try:
            path = store_of(f"{server.url}/c4", tmp_path, policy).fetch("a.tar", len(SHARD), SHA256)
            assert Path(path).read_bytes() == SHARD
        finally:
            assert [name for name in os.listdir(tmp_path / "cache") if name.startswith(".part")] == []
        return server.ranges_of("/c4/a.tar")


@pytest.mark.parametrize("fault", [500, 503, 429, "hang", "corrupt", "short", "long"])
def test_a_remote_that_fails_for_a_while_costs_no_row(tmp_path: Path, fault: int | str) -> None:
    faults = [fault] if fault in ("corrupt", "short", "long", "hang") else [fault] * 3
    assert served(tmp_path, faults, policy=STALLS) == [None] * (len(faults) + 1)


@pytest.mark.parametrize("fault", ["stall", "cut"])
def test_a_broken_download_resumes(tmp_path: Path, fault: str) -> None:
    """Otherwise a shard that outlasts every connection would never arrive."""
    half, quarter = len(SHARD) // 2, len(SHARD) // 4
    asked = served(tmp_path, [fault, fault], policy=STALLS)
    assert asked == [None, f"bytes={half}-", f"bytes={half + quarter}-"]


def test_a_server_without_ranges_sends_the_whole_file_again(tmp_path: Path) -> None:
    half = f"bytes={len(SHARD) // 2}-"
    assert served(tmp_path, ["cut", "cut"], ranges=False) == [None, half, half]


@pytest.mark.parametrize("fault", ["lie", 416])
def test_a_wrong_range_is_not_used(tmp_path: Path, fault: int | str) -> None:
    assert served(tmp_path, ["cut", fault]) == [None, f"bytes={len(SHARD) // 2}-", None]


def test_a_corrupt_resumed_download_starts_over(tmp_path: Path) -> None:
    assert served(tmp_path, ["cut", "corrupt"]) == [None, f"bytes={len(SHARD) // 2}-", None]


@pytest.mark.parametrize(
    ("fault", "words", "offset"),
    [
        ("corrupt", "sha256 .* not " + SHA256[:12], None),
        ("short", f"{len(SHARD) - 7} bytes, not the {len(SHARD)}", len(SHARD) - 7),
        ("long", f"more than the {len(SHARD)} bytes", len(SHARD)),
    ],
)
def test_a_shard_damaged_at_the_source_is_reported_without_waiting(
    tmp_path: Path, fault: str, words: str, offset: int | None
) -> None:
    with FlakyServer({"/a.tar": SHARD}) as server:
        server.faults["/a.tar"] = itertools.repeat(fault)
        with pytest.raises(BadFile, match=words) as caught:
            store_of(server.url, tmp_path).fetch("a.tar", len(SHARD), SHA256)
        assert caught.value.offset == offset
        assert len(server.requests) == 2  # the first corruption might come from the network


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_missing_file_is_reported_after_three_tries(tmp_path: Path, status: int) -> None:
    with FlakyServer({}) as server:
        server.faults["/a.tar"] = itertools.repeat(status)
        store = store_of(server.url, tmp_path)
        with pytest.raises(BadFile, match=f"{server.url}/a.tar: HTTP {status}"):
            store.fetch("a.tar", 1, SHA256)
        with pytest.raises(BadFile, match=f"HTTP {status}"):
            store.read("a.tar")
        assert len(server.requests) == 6
        assert os.listdir(tmp_path / "cache") == [".lock"]  # missing shards leave no files behind


def test_a_new_file_may_appear_late(tmp_path: Path) -> None:
    assert served(tmp_path, [404, 404]) == [None] * 3


def test_the_manifest_is_retried(tmp_path: Path) -> None:
    with FlakyServer({"/manifest.json": SHARD}) as server:
        server.faults["/manifest.json"] = iter([500, "cut", 503])
        assert store_of(server.url, tmp_path).read("manifest.json") == SHARD
        assert server.ranges_of("/manifest.json") == [None] * 4


def test_retries_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A slow remote must be distinguishable from a slow GPU."""
    caplog.set_level(logging.WARNING, logger.name)
    served(tmp_path, [503, "cut"])
    first, second = caplog.messages
    assert "/c4/a.tar: try 1 failed: HTTP 503" in first and "next in 0.0" in first
    assert f"try 2 failed: cut short at byte {len(SHARD) // 2} of {len(SHARD)}" in second


@pytest.mark.parametrize("command", ["verify", "report"])
@pytest.mark.parametrize(
    ("program", "line"), [("false {}", "try 1 failed: exit status 1"), ("sleep 9; cat {}", "no byte in 0.1 s")]
)
def test_the_data_tools_show_that_they_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: str, program: str,
    line: str,
) -> None:  # fmt: skip
    """Otherwise an unreachable source would look like a hang for minutes."""
    monkeypatch.setattr(store_module, "DEFAULT_POLICY", SHORT)
    monkeypatch.setattr(store_module, "LATE_S", 0.1)
    logger.addHandler(caplog.handler)
    try:
        assert shards.main([command, f"pipe:{program}", "--cache-dir", str(tmp_path / "cache")]) == 2
    finally:
        logger.removeHandler(caplog.handler)
    assert line in caplog.text and logger.isEnabledFor(logging.WARNING)


def gives_up(store: Store) -> str:
    """Fetch a file that never arrives; return the error. The time limit exceeds the deadline, but not HANG_S."""
    start = time.monotonic()
    with pytest.raises(BadFile) as caught:
        store.fetch("a.tar", len(SHARD), SHA256)
    assert time.monotonic() - start < 12
    return str(caught.value)


@pytest.mark.parametrize("fault", [500, "hang", "stall"])
def test_the_deadline_holds(tmp_path: Path, fault: int | str) -> None:
    with FlakyServer({"/a.tar": SHARD}) as server:
        server.faults["/a.tar"] = itertools.repeat(fault)
        assert "gave up after" in gives_up(store_of(server.url, tmp_path, SHORT))


def test_the_deadline_holds_if_the_connection_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "refused" in gives_up(store_of(f"http://127.0.0.1:{port}", tmp_path, SHORT))


def test_the_deadline_holds_if_a_library_hangs(tmp_path: Path) -> None:
    """fsspec's ftp waits for a greeting that never comes, longer than the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "no byte in" in gives_up(store_of(f"ftp://me:secret@127.0.0.1:{port}/c4", tmp_path, SHORT))


def test_a_hanging_command_is_killed_with_its_children(tmp_path: Path) -> None:
    location = f"pipe:sleep 60 & echo $! >> {tmp_path}/pids; echo {{}} hangs >&2; wait"
    assert "a.tar hangs" in gives_up(store_of(location, tmp_path, SHORT))
    pids = (tmp_path / "pids").read_text().split()
    assert pids
    for _ in range(500):  # the kernel may take a moment to reap it
        if not any(is_alive(pid) for pid in pids):
            return
        time.sleep(0.01)
    raise AssertionError(f"{pids} still run")


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_failed_command_reports_its_stderr(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"exit status 3: no a\.tar here \("):
        policy = RetryPolicy(deadline_s=15, first_wait_s=60, max_wait_s=60)  # one try, which ends by itself
        store_of("pipe:echo trying >&2; echo no {} here >&2; exit 3", tmp_path, policy).read("a.tar")


def test_an_unknown_command_is_not_tried_until_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"exit status 127: .*not found.* tries: 3"):
        store_of("pipe:no-such-program {}", tmp_path).read("a.tar")


def test_a_command_that_fails_once_is_run_again(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(SHARD)
    (tmp_path / "once.sh").write_text(f"mkdir {tmp_path}/tried || exec cat $1\nhead -c 100000 $1; exit 1")
    store = store_of(f"pipe:sh {tmp_path}/once.sh {tmp_path}/{{}}", tmp_path)
    assert Path(store.fetch("a.tar", len(SHARD), SHA256)).read_bytes() == SHARD


def test_a_complete_file_is_used_although_the_command_fails(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(SHARD)
    store = store_of(f"pipe:cat {tmp_path}/{{}}; echo run >> {tmp_path}/runs; exit 1", tmp_path)
    assert Path(store.fetch("a.tar", len(SHARD), SHA256)).read_bytes() == SHARD
    assert (tmp_path / "runs").read_text() == "run\n"


def test_letters_outside_ascii_in_a_url_are_escaped(tmp_path: Path) -> None:
    with FlakyServer({"/données 1/a é.tar?clé=ü": SHARD}) as server:
        assert store_of(f"{server.url}/données%201/?clé=ü", tmp_path).read("a é.tar") == SHARD
    with pytest.raises(UserError, match=r"http://\.\.é: not a valid host name"):
        store_of("http://..é", tmp_path)


def test_a_password_is_sent_but_not_shown(tmp_path: Path) -> None:
    with FlakyServer({"/a.tar?key=k1": SHARD}) as server:
        location = server.url.replace("//", "//me:s%40cret@") + "/?key=k1"
        store = store_of(location, tmp_path)
        assert store.read("a.tar") == SHARD
        assert server.requests[0][2] == "Basic bWU6c0BjcmV0"
        with pytest.raises(BadFile) as caught:
            store.read("b.tar")
        assert "cret" not in str(caught.value) and "k1" not in str(caught.value)
