"""Races between the ranks of one attempt, and with late processes of an earlier attempt.

A late process is stopped before each of its operations in the folder. Meanwhile the next attempt begins and saves.
Then the process continues, and none of its further operations may have a visible effect.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from commit_contents import (
    ONE,
    SMALL,
    THREE,
    Rank,
    begin,
    check_checkpoint,
    check_folder,
    linked,
    names,
    ranks,
    save,
    settle,
)
from commit_holds import held, points_of
from test_commit import mounted

from llama_ds.checkpoint import store
from llama_ds.checkpoint.attempt import SaveAttempt
from llama_ds.checkpoint.store import Retention
from llama_ds.errors import UserError

OLD = 16 * "0"  # id of the late attempt, fixed so that its points have the same names every time
OWN = f"{store.ATTEMPT}{OLD}"
KEEP = Retention(last=2)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints")


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which life 1 has saved steps 1 to 4; `latest` was then set to step 3."""
    folder = tmp_path_factory.mktemp("base") / "checkpoints"
    run = ranks(str(folder), ONE)
    for step in (1, 2, 3, 4):
        save(run, 1, step)
    run[0].attempt.point_to(store.tag_of(3))
    run[0].attempt.end()
    return folder


def late(folder: str) -> SaveAttempt:
    attempt = SaveAttempt(folder, OLD)
    attempt.begin()
    return attempt


def write(rank: Rank, life: int, step: int) -> None:
    """Save this rank's share, and commit on rank 0."""
    rank.start(life, step)
    rank.writer.wait_written()
    if error := rank.writer.wait_committed():
        raise error


def content(folder: str) -> dict[str, int]:
    """Return the inodes of all files and folders in a folder by path."""
    return {str(path): path.stat().st_ino for path in Path(folder).rglob("*")}


def test_a_rank_does_not_need_its_folder_after_its_record(folder: str) -> None:
    """Otherwise a rank that is slow after its record would report a committed save as lost.

    Its error would be a FileNotFoundError for the folder that rank 0 has just renamed.
    """
    run = ranks(folder)
    record = f"rename {os.path.basename(run[0].attempt.path)}/{store.tag_of(4)}/rank_00001.json.tmp"
    seen: list[str] = []

    def after_its_record(point: str) -> bool:
        seen.append(point)
        return record in seen[:-1] and not os.path.exists(os.path.join(folder, store.LATEST))

    with held(folder, lambda: write(run[1], 1, 4), after_its_record) as slow:
        others = [run[0], run[2]]
        for rank in others:
            rank.start(1, 4)
        assert settle(others) == ([None] * 2, [None] * 2)
        assert slow.release()
    assert check_folder(folder) == [(1, 4)]


def test_a_late_record_is_not_taken_for_a_new_one(folder: str) -> None:
    """Otherwise a checkpoint could hold files of two attempts, or incomplete files with an earlier record."""
    old = Rank(late(folder), 1, SMALL, THREE, "", KEEP)
    record = f"rename {OWN}/{store.tag_of(4)}/rank_00001.json.tmp"
    with held(folder, lambda: write(old, 1, 4), record.__eq__) as straggler:
        new = ranks(folder)
        for rank in (new[0], new[2]):
            rank.start(2, 4)
            assert rank.writer.wait_written() is None
        assert not straggler.release()
        assert store.tags(folder) == [] and new[0].writer.in_flight and not new[0].writer.ended
        new[1].start(2, 4)
        assert settle(new) == ([None] * 3, [None] * 3)
    assert check_folder(folder) == [(2, 4)] and names(new[0].attempt) == {store.LATEST, store.tag_of(4)}


def commits(folder: str) -> None:
    """Save step 4, which replaces a checkpoint and deletes two: every change that a save can make."""
    write(Rank(SaveAttempt(folder, OLD), 0, SMALL, ONE, "", KEEP), 2, 4)


def rewinds(folder: str) -> None:
    SaveAttempt(folder, OLD).go_back(store.tag_of(2), [store.tag_of(4), store.tag_of(3)])


def sets_aside(folder: str) -> None:
    SaveAttempt(folder, OLD).set_aside_damaged(store.tag_of(3))


@pytest.mark.slow
@pytest.mark.parametrize("act", [commits, rewinds, sets_aside])
def test_late_operations_of_an_earlier_attempt_have_no_effect(rewound: Path, tmp_path: Path, act: object) -> None:
    """Otherwise they could make `latest` name an old checkpoint, or replace, delete or set aside a good one."""
    assert callable(act)
    counted = str(shutil.copytree(rewound, tmp_path / "counted"))
    late(counted)
    points = points_of(counted, lambda: act(counted), tmp_path / "points")
    assert f"rename {OWN}/latest" in points or act is sets_aside
    taken = 0
    for point in points:
        folder = str(linked(rewound, tmp_path / "late"))
        late(folder)
        with held(folder, lambda folder=folder: act(folder), point.__eq__) as straggler:
            new = ranks(folder, ONE)
            before = {name for name in os.listdir(folder) if name.startswith("step_")}
            save(new, 3, 4)
            state = content(folder)
            taken += not straggler.release()
        assert content(folder) == state, point
        assert check_folder(folder, ONE)[0] == (3, 4)
        assert names(new[0].attempt) == {store.LATEST, store.tag_of(4), *before}, point
        assert act is commits or {store.step_of(name) for name in before} == {1, 2, 3, 4}  # kept, set aside or not
        shutil.rmtree(folder)
    assert taken >= len(points) // 2


def test_an_attempt_begins_beside_one_that_still_writes(rewound: Path, tmp_path: Path) -> None:
    """Otherwise a run could not restart, or would delete a checkpoint that an earlier start is committing.

    The new attempt is stopped before each operation of `begin`. Meanwhile the old one saves. One of its hosts, which
    still knows the folder by its old name as on a network file system, adds another file to it.
    """

    def unfinished(folder: str) -> Rank:
        old = Rank(late(folder), 0, SMALL, ONE, "", Retention())
        partial = Path(old.attempt.partial(7))
        partial.mkdir()
        (partial / "rank_00000.json").touch()
        return old

    new_id = 16 * "1"
    counted = str(shutil.copytree(rewound, tmp_path / "counted"))
    unfinished(counted)
    points = points_of(counted, lambda: SaveAttempt(counted, new_id).begin(), tmp_path / "points")
    assert f"rename {OWN}" in points and f"rmdir {store.ATTEMPT}{new_id}/{OWN}" in points
    saved = []
    for point in points:
        folder = str(linked(rewound, tmp_path / "racing"))
        old, new = unfinished(folder), SaveAttempt(folder, new_id)
        handle = os.open(old.attempt.partial(7), os.O_RDONLY)
        with held(folder, lambda new=new: new.begin(), point.__eq__) as starting:
            try:
                write(old, 2, 4)
                saved.append(point)
            except FileNotFoundError:
                with pytest.raises(
                    UserError, match="no longer exists, because another start of this run has taken over"
                ):
                    old.attempt.check()
            try:
                os.close(os.open("late", os.O_CREAT | os.O_WRONLY, dir_fd=handle))
            except FileNotFoundError:
                assert point.startswith("rmdir")  # deleted already
            assert starting.release(), point
        os.close(handle)
        assert check_folder(folder, ONE)[0] == ((2, 4) if point in saved else (1, 3))
        tags = {store.LATEST, *map(store.tag_of, (1, 2, 3, 4))}
        assert names(new) == tags
        save([Rank(new, 0, SMALL, ONE, "", Retention())], 3, 5)
        assert check_checkpoint(folder, store.tag_of(5), ONE) == (3, 5) and names(new) == {*tags, store.tag_of(5)}
        shutil.rmtree(folder)
    assert saved == points[: points.index(f"rename {OWN}") + 1]


def leave(folder: str) -> None:
    """Create the leftovers of an earlier version of this program that was killed during a save."""
    (Path(folder) / "step_00000004.partial").mkdir()
    (Path(folder) / "step_00000004.partial" / "rank_00000.json").touch()


def test_of_two_attempts_that_begin_at_once_one_continues(rewound: Path, tmp_path: Path) -> None:
    """Otherwise both would save over each other, or both would fail."""
    leave(counted := str(linked(rewound, tmp_path / "counted")))
    points = points_of(counted, lambda: late(counted), tmp_path / "points")
    outcomes = set()
    for point in points:
        leave(folder := str(linked(rewound, tmp_path / "racing")))
        with held(folder, lambda folder=folder: late(folder), point.__eq__) as first:
            second = begin(folder)
            begun = first.release()
        first_wins = os.path.isdir(os.path.join(folder, OWN))
        assert begun or not first_wins
        winner, loser = (SaveAttempt(folder, OLD), second) if first_wins else (second, SaveAttempt(folder, OLD))
        outcomes.add(first_wins)
        with pytest.raises(UserError, match="let only one of them run"):
            loser.check()
        with pytest.raises(FileNotFoundError):
            write(Rank(loser, 0, SMALL, ONE, "", KEEP), 2, 4)
        write(Rank(winner, 0, SMALL, ONE, "", KEEP), 3, 5)
        assert check_folder(folder, ONE)[0] == (3, 5) and names(winner) == {store.LATEST, *store.tags(folder)}
        shutil.rmtree(folder)
    assert outcomes == {True, False}


def test_an_attempt_that_loses_its_folder_while_it_begins_does_not_start(folder: str) -> None:
    """It would train up to its first save, which fails."""
    loser, winner = late(folder), SaveAttempt(folder, 16 * "1")
    assert winner.begin() == [OWN]
    with pytest.raises(UserError, match="let only one of them run"):
        loser._take_over("step_00000004.partial")  # as the loser saw it before the winner deleted it


def test_a_rank_cannot_save_before_its_attempt_has_begun(folder: str) -> None:
    """Otherwise rank 0 would delete files of a faster rank, or take another attempt's folder for its own."""
    attempt = SaveAttempt(folder, OLD)
    run = [Rank(attempt, rank, SMALL, THREE, "", KEEP) for rank in range(3)]
    with pytest.raises(FileNotFoundError):
        write(run[1], 1, 1)
    assert not os.path.exists(folder)
    assert attempt.begin() == []
    save(run, 1, 1)
    assert check_folder(folder) == [(1, 1)]
    with pytest.raises(UserError, match=r"cannot write checkpoints there \(File exists\)"):
        attempt.begin()


def test_a_rank_that_still_writes_while_its_save_is_discarded_leaves_nothing(folder: str) -> None:
    """Otherwise its files would exist when the same step is saved again, and be mistaken for parts of that save."""
    run = ranks(folder)
    save(run, 1, 3)
    middle = f"write {os.path.basename(run[0].attempt.path)}/{store.tag_of(4)}/mp_rank_01_model_states.pt #3"
    with held(folder, lambda: write(run[1], 1, 4), middle.__eq__) as slow:
        run[0].start(1, 4)
        run[0].writer.wait_committed(timeout_s=0.01)
        assert not slow.release()
    assert names(run[0].attempt) == {store.LATEST, store.tag_of(3)}
    save(run, 2, 4)
    assert check_folder(folder) == [(2, 4), (1, 3)]


def test_leftovers_that_cannot_be_moved_or_deleted_are_named(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise a disk would fill up silently, or a run would save beside one that can still commit."""
    old = late(folder)
    save([Rank(old, 0, SMALL, ONE, "", KEEP)], 1, 1)
    stuck = Path(old.partial(2))
    stuck.mkdir()
    new = SaveAttempt(folder, 16 * "1")
    with mounted(stuck, Path(new.path, OWN, stuck.name)):  # a mount point is busy and cannot be deleted
        assert new.begin() == [OWN]
        assert f"{new.path}/{OWN}: cannot be deleted" in caplog.text and "Device or resource busy" in caplog.text
        save([Rank(new, 0, SMALL, ONE, "", KEEP)], 2, 2)
        with mounted(Path(new.path)), pytest.raises(UserError, match=r"cannot be moved \(.*busy\).*or remove it$"):
            begin(folder)
    assert check_folder(folder, ONE) == [(2, 2), (1, 1)]
