"""After a kill at any moment or a full disk, the same command completes a build, byte for byte."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from built_sources import SEQ_LEN, Built
from source_files import content, finish, manifest_of, start_build, write_lines

from llama_ds.data.building import build_folder
from llama_ds.data.building.build import build_source
from llama_ds.data.building.host_workers import shared_file
from llama_ds.data.text.corpus import documents
from llama_ds.data.text.gather import gather_local_corpus
from llama_ds.errors import UserError

FRACTION, ROWS = 0.1, 1500


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return JSON lines of real text with duplicates, which make about 16 parts and 8 shards."""
    root = tmp_path_factory.mktemp("corpus")
    gather_local_corpus(str(root), 2.4)
    texts = [d.text for d in documents(str(root / "*.jsonl"))]
    return write_lines(root / "all", [*texts, *texts[::3]], 40_000).rename(root / "all.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(built: Built, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of an uninterrupted build."""
    root = tmp_path_factory.mktemp("uninterrupted")
    build_source("s", str(corpus), built.tokenizer, str(root), SEQ_LEN, FRACTION, ROWS, dedup=True)
    assert manifest_of(root / "s").splits["train"].shards > 4
    return content(root / "s")


def start(built: Built, corpus: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    return start_build(
        "--source", f"s={corpus}", "--tokenizer", built.tokenizer, "--seq-len", SEQ_LEN, "--out", out, "--dedup",
        "--validation-fraction", FRACTION, "--rows-per-shard", ROWS, "--workers", 2, *more,
    )  # fmt: skip


def wait_for(build: subprocess.Popen[str], is_there: Callable[[], bool]) -> None:
    while not is_there():
        assert build.poll() is None, f"the build ended too early: {build.communicate()}"
        time.sleep(0.001)


def kept(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the finished files, which must not be written again, with inode and mtime."""
    parts = list(folder.glob("build/part-*.json"))
    shards = [p for p in folder.glob("*.tar") if (folder / "build" / f"{p.stem}.json").exists()]
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in [*parts, *shards]}


@pytest.mark.slow
def test_a_killed_build_resumes(built: Built, corpus: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "s"
    before: dict[str, tuple[int, int]] = {}
    for moment in ("build/plan.json", "build/part-*.json", "train-000000.tar", "train-000003.tar"):
        build = start(built, corpus, tmp_path)
        wait_for(build, lambda moment=moment: bool(list(folder.glob(moment))))  # type: ignore[misc]
        os.killpg(build.pid, signal.SIGKILL)
        finish(build)
        assert not (folder / "manifest.json").exists()
        now = kept(folder)
        assert {p: v for p, v in now.items() if p in before} == before
        before = now
    build = start(built, corpus, tmp_path)
    shards = {p: v for p, v in before.items() if p.endswith(".tar")}
    assert finish(build)[0] == 0
    assert content(folder) == uninterrupted
    assert {p: (os.stat(p).st_ino, os.stat(p).st_mtime_ns) for p in shards} == shards


@pytest.mark.parametrize("moment", [1, 4, 9])
def test_an_interrupted_append_resumes(built: Built, corpus: Path, tmp_path: Path, moment: int) -> None:
    pieces = list(dict.fromkeys(d.text for d in documents(str(corpus), 3000)))
    patterns = [str(write_lines(tmp_path / f"{i}.jsonl", pieces[60 * i : 60 * i + 70], 150_000)) for i in (0, 1)]
    reports = 0

    def interrupt(*done: int) -> None:
        nonlocal reports
        reports += 1
        if reports == moment:
            raise KeyboardInterrupt

    def build(out: str, pattern: str, **more: object) -> None:
        arguments = "s", pattern, built.tokenizer, str(tmp_path / out), SEQ_LEN, 0.2, 100
        build_source(*arguments, dedup=True, **more)  # type: ignore[arg-type]

    for out in ("a", "b"):
        build(out, patterns[0])
    build("a", patterns[1], append=True)
    with pytest.raises(KeyboardInterrupt):
        build("b", patterns[1], append=True, progress=interrupt)
    assert len(manifest_of(tmp_path / "b" / "s").splits["train"].extents) == 1  # still readable
    with pytest.raises(UserError, match=r"\.jsonl .*, now .*delete .*/b/s/build to abandon that addition"):
        build("b", built.prose, append=True)
    for _ in range(2):  # the second time, nothing is left to do
        build("b", patterns[1], append=True)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def running(group: int) -> bool:
    """Whether processes of a group still exist after some time; killed processes take a moment to disappear."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.01)
    return True


def children(pid: int, word: bytes = b"spawn_main") -> list[int]:
    """Return the processes of a build with a word in their command line: its workers, or those that serve hosts."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in found if word in Path(f"/proc/{p}/cmdline").read_bytes()]


@pytest.mark.slow
def test_workers_end_with_their_build(
    built: Built, corpus: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    build = start(built, corpus, tmp_path)
    wait_for(build, lambda: bool(list(tmp_path.glob("s/*.tar"))))
    assert len(children(build.pid)) == 2
    os.kill(build.pid, signal.SIGKILL)
    finish(build)
    again = start(built, corpus, tmp_path)
    assert finish(again)[0] == 0
    assert content(tmp_path / "s") == uninterrupted
    assert not running(build.pid)


@pytest.mark.slow
def test_a_killed_worker_is_one_clear_error(
    built: Built, corpus: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    build = start(built, corpus, tmp_path)
    wait_for(build, lambda: bool(list(tmp_path.glob("s/*.tar"))))
    first, second = children(build.pid)
    os.kill(first, signal.SIGKILL)
    status, errors = finish(build)
    assert status == 2 and "signal 9" in errors and "same command again" in errors and "Traceback" not in errors
    assert not Path(f"/proc/{second}").exists()
    assert finish(start(built, corpus, tmp_path))[0] == 0
    assert content(tmp_path / "s") == uninterrupted


def test_concurrent_builds_and_other_flags_are_refused(
    built: Built, corpus: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    build = start(built, corpus, tmp_path)
    wait_for(build, lambda: bool(list(tmp_path.glob("s/build/part-*.json"))))
    os.killpg(build.pid, signal.SIGSTOP)
    arguments = "s", str(corpus), built.tokenizer, str(tmp_path)
    with pytest.raises(UserError, match="another build of this source is running"):
        build_source(*arguments, SEQ_LEN, FRACTION, ROWS, dedup=True)
    os.killpg(build.pid, signal.SIGKILL)
    finish(build)
    with pytest.raises(UserError, match=r"unfinished build.*seq_len 64, now 32.*delete .*/s/build to start again"):
        build_source(*arguments, 32, FRACTION, ROWS, dedup=True)
    plan = tmp_path / "s" / "build" / "plan.json"
    begun = json.loads(plan.read_text())
    plan.write_text(json.dumps({key: value for key, value in begun.items() if key != "separator"}))
    with pytest.raises(UserError, match=r"unfinished build of another version.*delete .*/s/build to start again"):
        build_source(*arguments, SEQ_LEN, FRACTION, ROWS, dedup=True)
    plan.write_text(json.dumps(begun))
    build_source(*arguments, SEQ_LEN, FRACTION, ROWS, workers=2, dedup=True)
    assert content(tmp_path / "s") == uninterrupted


def test_a_bad_document_ends_all_workers_at_once(built: Built, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"{\n" + corpus.read_bytes())
    build = start(built, tmp_path / "bad.jsonl", tmp_path)
    status, errors = finish(build)
    assert status == 2 and "bad.jsonl:1: not JSON" in errors and "Traceback" not in errors
    assert not running(build.pid)
    assert not list(tmp_path.glob("s/*.tar"))


@pytest.mark.parametrize("append", [False, True])
def test_a_build_killed_during_its_commit_is_completed(
    built: Built, corpus: Path, tmp_path: Path, append: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(out: str, pattern: str, append: bool) -> None:
        build_source("s", pattern, built.tokenizer, str(tmp_path / out), SEQ_LEN, 0.2, 500, append=append)

    more = str(write_lines(tmp_path / "more.jsonl", [d.text[:3000] for d in documents(str(corpus))][:40]))
    for out in ("a", "b"):
        if append:
            build(out, built.prose, False)
    build("a", more, append)
    broken = OSError(errno.EIO, "Input/output error", "manifest.json")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"manifest.json: cannot be written .*error"):
        patch.setattr(build_folder, "write_atomically", Mock(side_effect=broken))
        build("b", more, append)
    (tmp_path / "b" / "s" / "build.removed").mkdir()  # what a kill leaves at the end of the commit
    (tmp_path / "b" / "s" / "build.removed" / "part-000000.json").touch()
    tars = {p: p.stat().st_ino for p in tmp_path.glob("b/s/*.tar")}
    build("b", more, append)  # an addition is not added twice
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert {p: p.stat().st_ino for p in tmp_path.glob("b/s/*.tar")} == tars


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "llama_ds-test", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_clear_error(
    built: Built, corpus: Path, uninterrupted: dict[str, bytes], small_disk: Path, workers: int
) -> None:
    arguments = "s", str(corpus), built.tokenizer, str(small_disk), SEQ_LEN, FRACTION, ROWS
    filler = small_disk / "filler"
    filler.write_bytes(bytes(5_000_000))
    for _ in range(2):
        with pytest.raises(
            UserError, match=rf"{small_disk}/s.*full.* takes \d+ bytes, \d+ are free; make room"
        ) as error:
            build_source(*arguments, workers=workers, dedup=True)
        assert "\n" not in str(error.value)
        assert not (small_disk / "s" / "manifest.json").exists() and not list(small_disk.rglob("*.tmp*"))
        filler.write_bytes(bytes(3_000_000))
    finished = kept(small_disk / "s")
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    build_source(*arguments, workers=workers, dedup=True)
    assert content(small_disk / "s") == uninterrupted
    for path, stamp in finished.items():
        assert not path.endswith(".tar") or (os.stat(path).st_ino, os.stat(path).st_mtime_ns) == stamp


def test_a_disk_that_cannot_be_written_is_one_clear_error(built: Built, corpus: Path, small_disk: Path) -> None:
    def build(name: str, out: Path) -> None:
        build_source(name, str(corpus), built.tokenizer, str(out), SEQ_LEN)

    with pytest.raises(UserError, match=r"File name too long.*choose another --out"):
        build("s" * 300, small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"/s: cannot be written .*Read-only file system.*choose another --out"):
        build("s", small_disk)


@pytest.mark.slow
def test_hosts_give_the_same_bytes_and_a_lost_one_is_one_clear_error(
    built: Built, corpus: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """Two names of this machine, each with one process."""
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    arguments = built, corpus, tmp_path / "out", "--hostfile", tmp_path / "hosts", "--workers", 1
    build = start(*arguments)
    wait_for(build, lambda: bool(list(tmp_path.glob("out/s/*.tar"))))
    first, second = children(build.pid, b"serve")
    os.kill(first, signal.SIGKILL)
    status, errors = finish(build)
    assert status == 2 and "Traceback" not in errors
    assert "error: host localhost: the connection to its worker processes has ended" in errors
    assert not Path(f"/proc/{second}").exists()
    build = start(*arguments)
    status, errors = finish(build)
    assert status == 0 and "host 127.0.0.1 builds with 1 processes" in errors
    assert content(tmp_path / "out" / "s") == uninterrupted
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["s"]


@pytest.mark.slow
def test_an_interrupted_build_says_how_to_continue(
    built: Built, corpus: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    build = start(built, corpus, tmp_path)
    wait_for(build, lambda: bool(list(tmp_path.glob("s/*.tar"))))
    os.killpg(build.pid, signal.SIGINT)
    status, errors = finish(build)
    assert status == 130
    assert errors.splitlines()[1:] == ["interrupted; run the same command again to resume the build"]  # after the files
    assert not running(build.pid)
    assert finish(start(built, corpus, tmp_path))[0] == 0
    assert content(tmp_path / "s") == uninterrupted


def test_the_file_that_hosts_look_for_is_removed_after_a_kill(tmp_path: Path) -> None:
    """The rerun of a killed build removes it, and leaves that of a build which goes on."""
    left, new = tmp_path / "hosts-left", tmp_path / "hosts-new"
    for path in (left, new):
        path.touch()
    os.utime(left, (0, 0))
    with shared_file(str(tmp_path)) as own:
        assert sorted(tmp_path.iterdir()) == sorted((new, Path(own)))
        os.utime(own, (0, 0))
        with shared_file(str(tmp_path)):
            assert Path(own).exists()
    assert list(tmp_path.iterdir()) == [new]
