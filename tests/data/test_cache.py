"""Many processes share one download, the disk holds what it was told to hold, and no half or damaged shard is read."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flaky_server import FlakyServer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ds.data.source import cache as cache_module
from llama_ds.data.source.cache import Cache, key_of
from llama_ds.data.source.store import BadFile, RetryPolicy, Store, open_store
from llama_ds.errors import UserError

REPO = Path(__file__).resolve().parent.parent.parent
QUICK = RetryPolicy(deadline_s=60, first_wait_s=0.01, longest_wait_s=0.05, stall_s=15)
SIZE = 100_000
SHARDS = {f"{i}.tar": random.Random(i).randbytes(SIZE) for i in range(8)}

# A process that fetches `count` of the shards in an order of its own, in two threads, and reads each as a loader does.
READER = """
import hashlib, random, sys
from concurrent.futures import ThreadPoolExecutor
from llama_ds.data.source.cache import Cache
from llama_ds.data.source.store import RetryPolicy, open_store
place, folder, limit, count, seed = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
digests = dict(pair.split("=") for pair in sys.argv[6:])
store = open_store(place, Cache(folder, limit), RetryPolicy(60, 0.01, 0.05, 15))
def read(name):
    for _ in range(100):
        try:
            with open(store.fetch(name, 100_000, digests[name]), "rb") as file:
                assert hashlib.sha256(file.read()).hexdigest() == digests[name]
            return
        except FileNotFoundError:
            pass  # evicted before it was opened
    raise SystemExit("evicted each time")
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(2) as pool:
    list(pool.map(read, random.Random(seed).choices(sorted(digests), k=count)))
"""


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    with FlakyServer({f"/{name}": content for name, content in SHARDS.items()}) as server:
        yield server


def fetch(store: Store, name: str) -> Path:
    path = Path(store.fetch(name, SIZE, digest(name)))
    assert path.read_bytes() == SHARDS[name]
    return path


def digest(name: str) -> str:
    return hashlib.sha256(SHARDS[name]).hexdigest()


def shards_in(folder: Path) -> set[str]:
    return {name[17:] for name in os.listdir(folder) if not name.startswith(".")}


def parts_in(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".part")]


def reader(url: str, folder: Path, limit: int, count: int, seed: int, names: list[str]) -> subprocess.Popen[str]:
    pairs = [f"{name}={digest(name)}" for name in names]
    arguments = [url, str(folder), str(limit), str(count), str(seed), *pairs]
    process = subprocess.Popen(
        [sys.executable, "-c", READER, *arguments], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def finish(readers: list[subprocess.Popen[str]]) -> None:
    for process in readers:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60) and process.returncode for process in readers] == [0] * len(readers)


def test_the_processes_of_a_host_share_one_download(server: FlakyServer, tmp_path: Path) -> None:
    """Eight ranks that each fetched the same shard would take eight times the bandwidth."""
    finish([reader(server.url, tmp_path, 10 * SIZE, 4, seed, ["0.tar"]) for seed in range(4)])
    assert len(server.requests) == 1


def test_the_bound_holds_while_many_fetch(server: FlakyServer, tmp_path: Path) -> None:
    limit = int(3.5 * SIZE)  # below what the 6 threads fetch at once: they must wait for each other
    readers = [reader(server.url, tmp_path, limit, 30, seed, list(SHARDS)) for seed in range(3)]
    most, done, watcher = [0], threading.Event(), Cache(str(tmp_path), limit)

    def watch() -> None:
        ended = False
        while not ended:
            ended = done.wait(0.002)
            with watcher._room(time.monotonic() + 60):  # else it would count files of two instants
                files = [os.stat(entry.path) for entry in os.scandir(tmp_path)]
            most[0] = max(most[0], sum(file.st_size for file in files))

    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(watch)
        try:
            finish(readers)
        finally:
            done.set()
        watched.result()
    assert 2 * SIZE < most[0] <= limit
    assert parts_in(tmp_path) == [] and len(server.requests) > len(SHARDS)
    names = {name.removeprefix(".lock-") for name in os.listdir(tmp_path)} - {".lock"}
    assert len(names) <= 3  # no locks of shards that are gone: a source may have 100,000


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    limit=st.integers(60, 150),
    uses=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=15),
)
def test_the_shard_last_used_longest_ago_goes_first(sizes: list[int], limit: int, uses: list[tuple[int, bool]]) -> None:
    with tempfile.TemporaryDirectory() as top:
        source, folder = Path(top) / "source", Path(top) / "cache"
        source.mkdir()
        for i, size in enumerate(sizes):
            (source / f"{i}.tar").write_bytes(bytes([i]) * size)
        store = open_store(f"local://{source}", Cache(str(folder), limit), QUICK)
        held: list[int] = []  # last used longest ago first
        for use, new_process in uses:
            use %= len(sizes)
            if new_process:  # which has checked no entry yet
                store = open_store(f"local://{source}", Cache(str(folder), limit), QUICK)
            content = bytes([use]) * sizes[use]
            path = store.fetch(f"{use}.tar", len(content), hashlib.sha256(content).hexdigest())
            assert Path(path).read_bytes() == content
            if use in held:
                held.remove(use)
            else:
                while sum(sizes[i] for i in held) + sizes[use] > limit:
                    held.pop(0)
            held.append(use)
            assert shards_in(folder) == {f"{i}.tar" for i in held}


def test_an_evicted_shard_stays_readable_where_it_is_mapped(server: FlakyServer, tmp_path: Path) -> None:
    """Otherwise another run on the host could kill a loader with SIGBUS."""
    store = open_store(server.url, Cache(str(tmp_path), SIZE), QUICK)
    with open(fetch(store, "0.tar"), "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    finish([reader(server.url, tmp_path, SIZE, 2, 0, ["1.tar"])])
    assert shards_in(tmp_path) == {"1.tar"}
    assert mapped[:] == SHARDS["0.tar"]
    fetch(store, "0.tar")
    assert shards_in(tmp_path) == {"0.tar"}


def test_a_process_killed_while_it_fetches_leaves_no_shard(server: FlakyServer, tmp_path: Path) -> None:
    server.faults["/0.tar"] = iter(["stall"])
    process = reader(server.url, tmp_path, SIZE, 1, 0, ["0.tar"])
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert server.reached.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert shards_in(tmp_path) == set() and len(parts_in(tmp_path)) == 1
    fetch(open_store(server.url, Cache(str(tmp_path), SIZE), QUICK), "0.tar")
    assert shards_in(tmp_path) == {"0.tar"} and parts_in(tmp_path) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "rebuilt"])
def test_a_damaged_entry_is_replaced(server: FlakyServer, tmp_path: Path, damage: str) -> None:
    """A bad disk, or a source built anew at the same place."""
    path = fetch(open_store(server.url, Cache(str(tmp_path), SIZE), QUICK), "0.tar")
    content = SHARDS["0.tar"]
    spoilt = {"flip": b"x" + content[1:], "cut": content[:-1], "rebuilt": SHARDS["1.tar"]}[damage]
    path.write_bytes(spoilt)
    store = open_store(server.url, Cache(str(tmp_path), SIZE), QUICK)
    for _ in range(2):
        fetch(store, "0.tar")
    assert len(server.requests) == 2


def test_a_source_built_anew_is_not_read_from_what_was_checked_before(server: FlakyServer, tmp_path: Path) -> None:
    store = open_store(server.url, Cache(str(tmp_path), SIZE), QUICK)
    fetch(store, "0.tar")
    server.files["/0.tar"] = SHARDS["1.tar"]
    assert Path(store.fetch("0.tar", SIZE, digest("1.tar"))).read_bytes() == SHARDS["1.tar"]


def test_a_lock_has_one_holder_though_its_file_comes_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two would now and then fetch one shard, or one would evict what the other checks."""
    monkeypatch.setattr(cache_module, "POLL_S", 0.0)  # to meet as often as can be
    inside: list[int] = []

    def enter(me: int) -> int:
        cache, most = Cache(str(tmp_path), SIZE), 0
        for _ in range(500):
            with cache.lock("f" * 16 + "-a", time.monotonic() + 60):
                inside.append(me)
                os.sched_yield()
                most = max(most, len(inside))
                inside.remove(me)
        return most

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(enter, range(4))) == [1] * 4


def test_a_cache_serves_while_the_remote_is_down(server: FlakyServer, tmp_path: Path) -> None:
    fetch(open_store(server.url, Cache(str(tmp_path), SIZE), QUICK), "0.tar")
    server.faults["/0.tar"] = iter([500] * 100)
    store = open_store(server.url, Cache(str(tmp_path), SIZE), QUICK)
    for _ in range(2):
        fetch(store, "0.tar")
    assert len(server.requests) == 1


def test_one_who_waits_for_a_download_has_a_deadline_too(server: FlakyServer, tmp_path: Path) -> None:
    """A process that was stopped (SIGSTOP, a debugger) must not hold up the others for ever."""
    store = open_store(server.url, Cache(str(tmp_path), SIZE), RetryPolicy(deadline_s=0.2))
    with (
        Cache(str(tmp_path), SIZE).lock(key_of(server.url, "0.tar"), time.monotonic()),
        pytest.raises(BadFile, match=r"0\.tar: waited 0\.2 s: another"),
    ):
        fetch(store, "0.tar")
    other = Cache(str(tmp_path), SIZE)
    with (
        other.lock("f" * 16 + "-other", time.monotonic()),
        other.part("f" * 16 + "-other", SIZE, time.monotonic()),
        pytest.raises(BadFile, match=r"0\.tar: waited 0\.2 s: files under way .* data\.cache_gib"),
    ):
        fetch(store, "0.tar")
    fetch(store, "0.tar")


def test_only_files_of_the_cache_are_evicted(server: FlakyServer, tmp_path: Path) -> None:
    """A user may name a folder that holds other things."""
    for name in ("notes.txt", "model.tar"):
        (tmp_path / name).write_bytes(b"x" * SIZE)
    store = open_store(server.url, Cache(str(tmp_path), SIZE), QUICK)
    for name in ("0.tar", "1.tar"):
        fetch(store, name)
    assert {"notes.txt", "model.tar"} < set(os.listdir(tmp_path))


def test_two_places_with_the_same_names_do_not_meet(server: FlakyServer, tmp_path: Path) -> None:
    server.files["/other/0.tar"] = SHARDS["1.tar"]
    cache = Cache(str(tmp_path), 2 * SIZE)
    fetch(open_store(server.url, cache, QUICK), "0.tar")
    path = open_store(f"{server.url}/other/", cache, QUICK).fetch("0.tar", SIZE, digest("1.tar"))
    assert Path(path).read_bytes() == SHARDS["1.tar"]
    fetch(open_store(server.url + "/", cache, QUICK), "0.tar")
    assert len(server.requests) == 2


def test_a_cache_smaller_than_a_shard_is_refused(server: FlakyServer, tmp_path: Path) -> None:
    store = open_store(server.url, Cache(str(tmp_path), SIZE - 1), QUICK)
    with pytest.raises(UserError, match=rf"data\.cache_gib: {SIZE - 1} bytes .* {SIZE} bytes"):
        fetch(store, "0.tar")


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*/file/cache .*directory"):
        Cache(str(tmp_path / "file" / "cache"), SIZE)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for two shards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={2 * SIZE + 20_000}", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk wants root, to mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_holds_as_many_shards_as_it_can(server: FlakyServer, small_disk: Path) -> None:
    """data.cache_gib may promise more than the disk has left."""
    store = open_store(server.url, Cache(str(small_disk), 100 * SIZE), QUICK)
    for name in ("0.tar", "1.tar", "0.tar", "2.tar"):
        fetch(store, name)
    assert shards_in(small_disk) == {"0.tar", "2.tar"}
    assert len(server.requests) == 3  # what had come before the disk was full is kept


def test_a_disk_full_of_other_things_is_one_clear_error(server: FlakyServer, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(b"x" * (SIZE + 60_000))
    store = open_store(server.url, Cache(str(small_disk), 100 * SIZE), QUICK)
    with pytest.raises(UserError) as caught:
        fetch(store, "0.tar")
    message = str(caught.value)
    assert all(word in message for word in (str(small_disk), str(SIZE), "free", "data.cache_gib", "data.cache_dir"))
    assert "\n" not in message
    assert sorted(os.listdir(small_disk)) == [".lock", "other"]
