"""A source reads the same from every store, and a URL that cannot be read is reported before the run starts."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from flaky_server import FlakyServer

from llama_ds.data.source.cache import Cache
from llama_ds.data.source.remote import open_transport
from llama_ds.data.source.store import BadFile, RetryPolicy, open_store
from llama_ds.errors import UserError

QUICK = RetryPolicy(deadline_s=30, first_wait_s=0.01, max_wait_s=0.05, stall_s=15)
FILES = {
    "train-000000.tar": random.Random(0).randbytes(5_000_000),  # more than one chunk of each transport
    "index/train-0000.sha256": b"0123\n",
    "it's a 100% #1 shard?.tar": b"\x00\xff\r\n",  # a shell or a URL would misread this name
    "empty.tar": b"",
}
KINDS = ("folder", "file", "http", "memory", "local", "pipe-cat", "pipe-python")


@pytest.fixture(scope="module")
def locations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("my source")
    memory = fsspec.filesystem("memory")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        memory.pipe(f"/test_store/{name}", content)
    echo = "import sys, shutil; shutil.copyfileobj(open(sys.argv[1], 'rb'), sys.stdout.buffer)"
    with FlakyServer({f"/c4/{name}": content for name, content in FILES.items()}) as server:
        yield {
            "folder": str(folder),
            "file": folder.as_uri(),
            "http": f"{server.url}/c4/",
            "memory": "memory://test_store",
            "local": f"local://{folder}",
            "pipe-cat": f"pipe:cd '{folder}' && cat {{}}",
            "pipe-python": f"pipe:cd '{folder}' && {sys.executable} -c \"{echo}\" {{}}",
        }
    memory.rm("/test_store", recursive=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_transport_returns_the_same_bytes(kind: str, locations: dict[str, str], tmp_path: Path) -> None:
    store = open_store(locations[kind], Cache(str(tmp_path / "cache"), 6_000_000), QUICK)
    for name, content in FILES.items():
        assert store.read(name) == content
        for _ in range(2):  # downloaded, then cached
            path = store.fetch(name, len(content), hashlib.sha256(content).hexdigest())
            assert Path(path).read_bytes() == content


@pytest.mark.parametrize("kind", KINDS)
def test_every_transport_reports_missing_and_wrong_files(kind: str, locations: dict[str, str], tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "cache"), 6_000_000)
    store = open_store(locations[kind], cache, QUICK)
    hasty, tries = store, "tries: 3" if kind in ("http", "memory", "local") else ""
    if kind.startswith("pipe"):  # the exit status does not reveal whether the file is missing
        hasty = open_store(locations[kind], cache, RetryPolicy(deadline_s=0.3, first_wait_s=0.01, max_wait_s=0.05))
    name, size = "train-000000.tar", len(FILES["train-000000.tar"])
    right = hashlib.sha256(FILES[name]).hexdigest()
    for missing in ("nothing.tar", "index/nothing.sha256"):
        with pytest.raises(BadFile, match=f"{missing}.*{tries}"):
            hasty.read(missing)
    with pytest.raises(BadFile, match=rf"nothing\.tar.*{tries}"):
        hasty.fetch("nothing.tar", size, right)
    with pytest.raises(BadFile, match=f"sha256 {right[:12]}, not 000000000000"):
        store.fetch(name, size, "0" * 64)
    with pytest.raises(BadFile, match=f"{size} bytes, not the {size + 1}") as caught:
        store.fetch(name, size + 1, right)
    assert caught.value.offset == size
    with pytest.raises(BadFile) as caught:
        store.fetch(name, size - 1, right)
    assert caught.value.offset == size - 1


@pytest.mark.parametrize("kind", KINDS[2:])
def test_every_transport_resumes_or_starts_over(kind: str, locations: dict[str, str]) -> None:
    """Otherwise a shard would be assembled wrongly whenever a connection breaks."""
    name, start = "train-000000.tar", 4_500_000
    chunks = list(open_transport(locations[kind]).chunks(name, start, 15, time.monotonic() + 30))
    first = 0 if kind.startswith("pipe") else start
    offset = first
    for found, chunk in chunks:
        assert found == offset
        offset += len(chunk)
    assert b"".join(chunk for _, chunk in chunks) == FILES[name][first:]


def test_a_local_shard_is_used_in_place(locations: dict[str, str]) -> None:
    """Caching local files would double the disk usage of a source."""
    name, content = "train-000000.tar", FILES["train-000000.tar"]
    path = open_store(locations["file"]).fetch(name, len(content), hashlib.sha256(content).hexdigest())
    assert path == os.path.join(locations["folder"], name)


def test_a_forked_loader_can_fetch(locations: dict[str, str], tmp_path: Path) -> None:
    """fsspec and threads do not survive a fork by themselves."""
    for kind in ("memory", "http"):
        store = open_store(locations[kind], Cache(str(tmp_path / kind), 6_000_000), QUICK)
        assert store.read("empty.tar") == b""
        if (pid := os.fork()) == 0:
            content = FILES["train-000000.tar"]
            path = store.fetch("train-000000.tar", len(content), hashlib.sha256(content).hexdigest())
            os._exit(0 if Path(path).read_bytes() == content else 1)
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("s4://bucket/c4", ("s4://bucket/c4", "s3://", "pipe:COMMAND")),
        ("zip::s4://bucket/c4.zip", ("s4://",)),
        ("pipe:aws s3 cp s3://bucket/c4/a.tar -", ("pipe:aws s3 cp s3://bucket/c4/a.tar -", "{}")),
        ("http://host/c4", ("http://host/c4", "data.cache_dir", "data.cache_gib")),
        ("s3://key:secret@bucket/c4", ("s3://bucket/c4", "llama_ds[s3]")),
        ("gs://bucket/c4", ("gs://bucket/c4", "llama_ds[gs]")),
        ("az://container/c4", ("az://container/c4", "adlfs")),
    ],
)
def test_an_unreadable_url_is_one_clear_error(
    location: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    cache = None if location.startswith("http") else Cache(str(tmp_path), 1)
    with pytest.raises(UserError) as caught:
        open_store(location, cache)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message and "secret" not in message


def test_bad_file_can_be_pickled() -> None:
    bad = pickle.loads(pickle.dumps(BadFile("http://host/a.tar", "cut short", 12)))
    assert (bad.location, bad.reason, bad.offset, str(bad)) == (
        "http://host/a.tar",
        "cut short",
        12,
        "http://host/a.tar: cut short",
    )
