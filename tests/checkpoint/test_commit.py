"""A save that fails or is abandoned harms nothing else; retention deletes old checkpoints, and nothing else."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from commit_contents import (
    ONE,
    SMALL,
    THREE,
    Rank,
    Share,
    begin,
    check_checkpoint,
    check_folder,
    names,
    ranks,
    save,
    settle,
)
from file_limit import files_of_at_most

from llama_ds.checkpoint import store
from llama_ds.checkpoint.manifest import describe
from llama_ds.checkpoint.store import Retention
from llama_ds.checkpoint.writing import Abandoned

MIDDLING = replace(SMALL, vocab_size=512, hidden_size=16)
LIMIT = 80_000  # bytes; between MIDDLING's optimizer files on a rank with half of the states and with all of them


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints")


def content(folder: str) -> dict[str, tuple[int, int]]:
    """Return the inode and modification time of all files in a folder."""
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Retention(), {1: [1], 2: [1, 2], 7: [1, 2, 3, 4, 5, 6, 7]}),
        (Retention(last=1), {1: [1], 2: [2], 7: [7]}),
        (Retention(last=3), {2: [1, 2], 3: [1, 2, 3], 4: [2, 3, 4], 7: [5, 6, 7]}),
        (Retention(last=2, every=3), {3: [2, 3], 5: [3, 4, 5], 6: [3, 5, 6], 7: [3, 6, 7]}),
        (Retention(last=1, every=2), {3: [2, 3], 4: [2, 4], 7: [2, 4, 6, 7]}),
        (Retention(every=3), {7: [1, 2, 3, 4, 5, 6, 7]}),
    ],
)
def test_retention_deletes_old_checkpoints(folder: str, keep: Retention, kept: dict[int, list[int]]) -> None:
    """Otherwise the disk would fill up, or a checkpoint to be kept would be lost."""
    run = ranks(folder, ONE, keep=keep)
    for step in range(1, 8):
        save(run, 1, step)
        assert store.newest(folder) == store.tag_of(step)
        if step in kept:
            assert sorted(store.tags(folder)) == [store.tag_of(s) for s in kept[step]]
            assert names(run[0].attempt) == {store.LATEST, *store.tags(folder)}
    assert [s for _, s in check_folder(folder, ONE)] == kept[7][::-1]


def test_the_newest_stays_though_others_have_higher_steps(folder: str) -> None:
    """Otherwise a rewound run would delete the checkpoint that it has just saved."""
    save_all(ranks(folder, ONE), 1, range(1, 7))
    begin(folder).point_to(store.tag_of(2))
    save(ranks(folder, ONE, keep=Retention(last=1)), 2, 3)
    assert check_folder(folder, ONE) == [(2, 3)]


def number_of(error: Exception | None) -> int | None:
    """Return the errno of an error."""
    return error.errno if isinstance(error, OSError) else None


def save_all(run: list[Rank], life: int, steps: range) -> None:
    for step in steps:
        save(run, life, step)


def test_a_checkpoint_of_the_same_step_is_replaced(folder: str) -> None:
    """Otherwise a rewound run would fail at a step that it has saved before, or mix two checkpoints in one folder."""
    save_all(ranks(folder), 1, range(1, 4))
    Path(folder, store.tag_of(3), "old").touch()
    begin(folder).point_to(store.tag_of(2))
    run = ranks(folder)
    for life in (2, 3):
        save(run, life, 3)
        assert check_folder(folder) == [(life, 3), (1, 2), (1, 1)]
    assert names(run[0].attempt) == {store.LATEST, *store.tags(folder)}


def test_every_checkpoint_has_its_tokenizer(folder: str, tmp_path: Path) -> None:
    """Otherwise a checkpoint that was copied elsewhere could not generate text."""
    tokenizer = tmp_path / "pieces.model"
    tokenizer.write_bytes(os.urandom(1000))
    run = ranks(folder, THREE, str(tokenizer))
    save(run, 1, 1)
    saved = Path(folder, store.tag_of(1))
    assert (saved / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert describe(str(saved)).files["tokenizer.model"].size == 1000
    tokenizer.unlink()
    before = content(folder)
    for rank in run:
        rank.start(1, 2)
    written, outcomes = settle(run)
    assert isinstance(outcomes[0], FileNotFoundError) and outcomes[1:] == [None] * 2
    assert written[0] in (None, outcomes[0]) and written[1:] == [None] * 2  # a commit may fail before it is waited for
    assert content(folder) == before and names(run[0].attempt) == {store.LATEST, store.tag_of(1)}


@contextmanager
def mounted(path: Path, moved_to: Path | None = None) -> Iterator[None]:
    """Mount a file system of 1 MB at a folder; `moved_to` is its path at the end if a parent folder is moved."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "llama_ds-test", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(moved_to or path)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk):
        yield disk


def test_a_full_disk_costs_one_save(small_disk: Path) -> None:
    """Otherwise a full disk would end the training, or the failed save would damage the last checkpoint.

    Each attempt has one page of disk space more than the one before, until the save succeeds.
    """
    folder = str(small_disk / "checkpoints")
    run = ranks(folder)
    save(run, 1, 1)
    before = content(folder)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    filler = small_disk / "filler"
    failures: Counter[tuple[int | None, ...]] = Counter()  # number of failed saves by the errno of every rank
    for step in range(2, 100):
        filler.write_bytes(bytes(free - (step - 2) * resource.getpagesize()))
        for rank in run:
            rank.start(1, step)
        written, outcomes = settle(run)
        if outcomes[0] is None:
            break
        failures[tuple(map(number_of, written))] += 1
        assert any(written) or number_of(outcomes[0]) == errno.ENOSPC
        assert {error and number_of(error) for error in written} <= {None, errno.ENOSPC}
        assert content(folder) == before and names(run[0].attempt) == {store.LATEST, store.tag_of(1)}
        assert check_folder(folder) == [(1, 1)]
    assert check_folder(folder) == [(1, step), (1, 1)]
    assert failures[None, None, None] > 1  # space for the files, but not for description and index
    assert len(failures) > 2


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("first", [True, False], ids=["it fails first", "it fails last"])
def test_one_rank_that_cannot_write_costs_one_save(folder: str, failing: int, first: bool) -> None:
    """Otherwise a checkpoint without one rank's files would count as complete, or its files would remain."""
    shares = [THREE[0], THREE[2]]
    shares.insert(failing, THREE[1])  # the optimizer file of this rank is larger than those of the others
    run = ranks(folder, shares, model=MIDDLING)
    save(run, 1, 1)
    before = content(folder)
    others = [rank for rank in run if rank is not run[failing]]
    with files_of_at_most(LIMIT):
        for rank in [run[failing], *others] if first else [*others, run[failing]]:
            rank.start(1, 2)
            rank.writer.wait_written()
        written, outcomes = settle(run)
    assert [number_of(error) for error in written] == [errno.EFBIG if rank == failing else None for rank in range(3)]
    assert outcomes[failing] is written[failing]
    assert failing == 0 or isinstance(outcomes[0], Abandoned)
    assert content(folder) == before and names(run[0].attempt) == {store.LATEST, store.tag_of(1)}
    save(run, 1, 3)
    assert check_folder(folder, shares) == [(1, 3), (1, 1)]


def test_ranks_wait_for_their_own_files_and_rank_0_for_all(folder: str) -> None:
    """Otherwise training would wait for the slowest rank, or rely on a checkpoint that is not committed yet."""
    run = ranks(folder)
    assert [(r.writer.in_flight, r.writer.wait_written(), r.writer.wait_committed()) for r in run] == [
        (False, None, None)
    ] * 3
    for rank in run[:2]:
        rank.start(1, 1)
        assert rank.writer.wait_written() is None and rank.writer.in_flight
    assert run[1].writer.wait_committed() is None and not run[1].writer.in_flight
    assert store.tags(folder) == []
    run[2].start(1, 1)
    assert run[0].writer.wait_committed() is None and not run[0].writer.in_flight
    assert store.newest(folder) == store.tag_of(1)
    assert run[2].writer.wait_committed() is None
    assert check_folder(folder) == [(1, 1)]


def test_one_save_at_a_time(folder: str) -> None:
    """Otherwise a second snapshot would overwrite the memory from which the first is still being written."""
    run = ranks(folder)
    run[0].start(1, 1)
    with pytest.raises(AssertionError, match="a save is in flight"):
        run[0].start(1, 2)
    run[0].writer.wait_committed(abandon=True)


@pytest.mark.parametrize("how", [{"abandon": True}, {"timeout_s": 0.1}], ids=["abandoned", "timeout"])
def test_an_abandoned_save_leaves_nothing_and_the_next_one_works(folder: str, how: dict[str, float]) -> None:
    """Otherwise rank 0 would wait forever for the files of a dead rank, or a later save would find old files."""
    run = ranks(folder)
    save(run, 1, 1)
    for rank in run[:2]:
        rank.start(1, 2)
        assert rank.writer.wait_written() is None
    assert isinstance(run[0].writer.wait_committed(**how), Abandoned)  # type: ignore[arg-type]
    assert run[1].writer.wait_committed(**how) is None  # type: ignore[arg-type]
    assert names(run[0].attempt) == {store.LATEST, store.tag_of(1)}
    save(run, 1, 2)
    assert check_folder(folder) == [(1, 2), (1, 1)]


def test_a_checkpoint_that_latest_does_not_name_is_not_loaded(folder: str) -> None:
    """Otherwise a run whose save was reported as lost would resume from it nevertheless."""
    run = ranks(folder)
    save(run, 1, 1)
    blocker = Path(run[0].attempt.path, store.LATEST)
    blocker.mkdir()
    for rank in run:
        rank.start(1, 2)
    assert isinstance(settle(run)[1][0], IsADirectoryError)
    assert check_folder(folder)[0] == (1, 1)
    blocker.rmdir()
    save(run, 2, 2)
    assert check_folder(folder) == [(2, 2), (1, 1)]


def test_an_old_checkpoint_that_cannot_be_removed_costs_nothing(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise training would report committed checkpoints as lost, and end with an error."""
    run = ranks(folder, ONE, keep=Retention(last=1))
    save(run, 1, 1)
    with mounted(Path(folder, store.tag_of(1))):  # a mount point is busy and cannot be renamed
        Path(folder, store.tag_of(1), "llama_ds.json").touch()
        save(run, 1, 2)
        assert store.newest(folder) == store.tag_of(2) and check_checkpoint(folder, store.tag_of(2), ONE) == (1, 2)
    assert "old checkpoints cannot be removed" in caplog.text
    save(run, 1, 3)
    assert check_folder(folder, ONE) == [(1, 3)]


def test_a_single_rank_writes_complete_checkpoints(folder: str) -> None:
    """Otherwise a run on one device would wait for other ranks."""
    save(ranks(folder, (Share(0, 0, 1),)), 1, 1)
    assert check_checkpoint(folder, store.tag_of(1), ONE) == (1, 1)
