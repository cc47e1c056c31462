"""Ranks of one attempt that meet at the worst moment, and processes of an earlier attempt that are late.

A late process is stopped before each thing that it does in the folder; meanwhile the next attempt begins and saves;
then it goes on. Nothing that it does from then on may be seen.
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

OLD = 16 * "0"  # the late attempt's id: its points have the same names each time
OWN = f"{store.ATTEMPT}{OLD}"
KEEP = Retention(last=2)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints")


@pytest.fixture(scope="module")
def went_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which steps 1 to 4 were saved in life 1, and `latest` was then set to 3."""
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
    """Save this rank's part, and on rank 0 all."""
    rank.start(life, step)
    rank.writer.wait_written()
    if error := rank.writer.wait_committed():
        raise error


def content(folder: str) -> dict[str, int]:
    """Return all that is in a folder, and which files they are."""
    return {str(path): path.stat().st_ino for path in Path(folder).rglob("*")}


def test_a_rank_whose_record_is_there_needs_its_folder_no_more(folder: str) -> None:
    """A save that is there would be reported lost, by a rank that is slow between its record and rank 0's commit.

    This failed once in a while on a busy machine: FileNotFoundError for a folder that rank 0 had just renamed.
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
    """A checkpoint would hold files of two attempts, or half a file, under a record of what an earlier one wrote."""
    old = Rank(late(folder), 1, SMALL, THREE, "", KEEP)
    record = f"rename {OWN}/{store.tag_of(4)}/rank_00001.json.tmp"
    with held(folder, lambda: write(old, 1, 4), record.__eq__) as straggler:
        new = ranks(folder)
        for rank in (new[0], new[2]):
            rank.start(2, 4)
            assert rank.writer.wait_written() is None
        assert not straggler.release()
        assert store.tags(folder) == [] and new[0].writer.under_way and not new[0].writer.ended
        new[1].start(2, 4)
        assert settle(new) == ([None] * 3, [None] * 3)
    assert check_folder(folder) == [(2, 4)] and names(new[0].attempt) == {store.LATEST, store.tag_of(4)}


def commits(folder: str) -> None:
    """Save step 4, which replaces another of it and has two removed: every change that a save can make."""
    write(Rank(SaveAttempt(folder, OLD), 0, SMALL, ONE, "", KEEP), 2, 4)


def goes_back(folder: str) -> None:
    SaveAttempt(folder, OLD).go_back(store.tag_of(2), [store.tag_of(4), store.tag_of(3)])


def sets_aside(folder: str) -> None:
    SaveAttempt(folder, OLD).set_aside_damaged(store.tag_of(3))


@pytest.mark.parametrize("act", [commits, goes_back, sets_aside])
def test_whatever_an_earlier_attempt_does_late_is_not_seen(went_back: Path, tmp_path: Path, act: object) -> None:
    """It would name its own checkpoint the newest, replace or delete a newer one, or set aside one that is good."""
    assert callable(act)
    counted = str(shutil.copytree(went_back, tmp_path / "counted"))
    late(counted)
    points = points_of(counted, lambda: act(counted), tmp_path / "points")
    assert f"rename {OWN}/latest" in points or act is sets_aside
    taken = 0
    for point in points:
        folder = str(linked(went_back, tmp_path / "late"))
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


def test_an_attempt_begins_beside_one_that_still_writes(went_back: Path, tmp_path: Path) -> None:
    """A run could not start again, or would delete what an earlier start of it commits just then.

    The new attempt is stopped before each thing that it does to begin. Meanwhile the old one saves, and a host of it
    that still knows its folder by the old name, as on a network file system, puts one more file into it.
    """

    def unfinished(folder: str) -> Rank:
        old = Rank(late(folder), 0, SMALL, ONE, "", Retention())
        partial = Path(old.attempt.partial(7))
        partial.mkdir()
        (partial / "rank_00000.json").touch()
        return old

    new_id = 16 * "1"
    counted = str(shutil.copytree(went_back, tmp_path / "counted"))
    unfinished(counted)
    points = points_of(counted, lambda: SaveAttempt(counted, new_id).begin(), tmp_path / "points")
    assert f"rename {OWN}" in points and f"rmdir {store.ATTEMPT}{new_id}/{OWN}" in points
    saved = []
    for point in points:
        folder = str(linked(went_back, tmp_path / "racing"))
        old, new = unfinished(folder), SaveAttempt(folder, new_id)
        handle = os.open(old.attempt.partial(7), os.O_RDONLY)
        with held(folder, lambda new=new: new.begin(), point.__eq__) as starting:
            try:
                write(old, 2, 4)
                saved.append(point)
            except FileNotFoundError:
                with pytest.raises(UserError, match="is gone, because another start of this run has taken over"):
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
    """Leave what an earlier version of this program did that was killed."""
    (Path(folder) / "step_00000004.partial").mkdir()
    (Path(folder) / "step_00000004.partial" / "rank_00000.json").touch()


def test_of_two_attempts_that_begin_at_once_one_goes_on(went_back: Path, tmp_path: Path) -> None:
    """Both would save, each over what the other does; or neither would, and nobody would know why."""
    leave(counted := str(linked(went_back, tmp_path / "counted")))
    points = points_of(counted, lambda: late(counted), tmp_path / "points")
    outcomes = set()
    for point in points:
        leave(folder := str(linked(went_back, tmp_path / "racing")))
        with held(folder, lambda folder=folder: late(folder), point.__eq__) as first:
            second = begin(folder)
            begun = first.release()
        first_goes_on = os.path.isdir(os.path.join(folder, OWN))
        assert begun or not first_goes_on
        winner, loser = (SaveAttempt(folder, OLD), second) if first_goes_on else (second, SaveAttempt(folder, OLD))
        outcomes.add(first_goes_on)
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
    """Rank 0 would delete what a faster rank has begun to write, or take another attempt's folder for its own."""
    attempt = SaveAttempt(folder, OLD)
    run = [Rank(attempt, rank, SMALL, THREE, "", KEEP) for rank in range(3)]
    with pytest.raises(FileNotFoundError):
        write(run[1], 1, 1)
    assert not os.path.exists(folder)
    assert attempt.begin() == []
    save(run, 1, 1)
    assert check_folder(folder) == [(1, 1)]
    with pytest.raises(UserError, match=r"cannot be written \(File exists\)"):
        attempt.begin()


def test_a_rank_that_still_writes_while_its_save_is_discarded_leaves_nothing(folder: str) -> None:
    """What it writes would be there when the same step is saved again, and be taken for a part of it."""
    run = ranks(folder)
    save(run, 1, 3)
    amid = f"write {os.path.basename(run[0].attempt.path)}/{store.tag_of(4)}/mp_rank_01_model_states.pt #3"
    with held(folder, lambda: write(run[1], 1, 4), amid.__eq__) as slow:
        run[0].start(1, 4)
        run[0].writer.wait_committed(timeout_s=0.01)
        assert not slow.release()
    assert names(run[0].attempt) == {store.LATEST, store.tag_of(3)}
    save(run, 2, 4)
    assert check_folder(folder) == [(2, 4), (1, 3)]


def test_what_cannot_be_taken_over_or_deleted_is_named(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    """A disk would fill without a word; or a run would save beside one that may still commit what it writes."""
    old = late(folder)
    save([Rank(old, 0, SMALL, ONE, "", KEEP)], 1, 1)
    stuck = Path(old.partial(2))
    stuck.mkdir()
    new = SaveAttempt(folder, 16 * "1")
    with mounted(stuck, Path(new.path, OWN, stuck.name)):  # the system refuses to delete it: it is busy
        assert new.begin() == [OWN]
        assert f"{new.path}/{OWN}: cannot be deleted" in caplog.text and "Device or resource busy" in caplog.text
        save([Rank(new, 0, SMALL, ONE, "", KEEP)], 2, 2)
        with mounted(Path(new.path)), pytest.raises(UserError, match=r"cannot be moved \(.*busy\).*or remove it$"):
            begin(folder)
    assert check_folder(folder, ONE) == [(2, 2), (1, 1)]
