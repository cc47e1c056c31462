"""Rewind to an earlier checkpoint: a kill at any moment leaves a run that is either rewound or unchanged."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from commit_contents import ONE, begin, check_checkpoint, check_folder, names, ranks, save
from commit_holds import note
from commit_points import Points
from test_tags import make

from llama_ds.checkpoint import store
from llama_ds.checkpoint.attempt import SaveAttempt, new_id
from llama_ds.checkpoint.store import Retention

FIXED = 16 * "0"  # id of an attempt, fixed so that points have the same names every time
OLD, NEW = 1, 2  # lives before and after the rewind
TO = store.tag_of(4)
NEWER = [store.tag_of(8), store.tag_of(6)]


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("eight") / "checkpoints"
    run = ranks(str(folder), ONE)
    for step in (2, 4, 6, 8):
        save(run, OLD, step)
    return folder


def go_back(attempt: SaveAttempt, tag: str, newer: list[str], fatal: str | None, log: Path) -> int:
    """Rewind in a process that dies at the point `fatal`; return its exit code."""
    child = os.fork()
    if not child:
        status = 1
        try:
            seen = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            Points(attempt.folder, lambda point, _: note(seen, point), fatal)
            attempt.go_back(tag, newer)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_at_any_point_leaves_one_or_the_other(eight: Path, tmp_path: Path) -> None:
    """Otherwise the killed run could have no newest checkpoint, or resume from one that was to be set aside."""
    log = tmp_path / "points"
    counted = shutil.copytree(eight, tmp_path / "counted")
    first = SaveAttempt(str(counted), FIXED)
    first.begin()
    assert go_back(first, TO, NEWER, None, log) == 0
    points = [point for point in log.read_text().splitlines() if not point.startswith("synced")]
    own = os.path.basename(first.path)
    renames = [f"rename {own}/latest", *(f"rename {x}" for tag in NEWER for x in (tag, f"{own}/{tag}.rewound"))]
    assert [p for p in points if p.startswith("rename")] == renames and points[-1].startswith("fsync .")
    outcomes = []
    for point in [*points, *(p.replace("write", "torn") for p in points if p.startswith("write"))]:
        folder = shutil.copytree(eight, tmp_path / "killed")
        killed = SaveAttempt(str(folder), FIXED)
        killed.begin()
        assert go_back(killed, TO, NEWER, point, log) == -signal.SIGKILL, point
        newest = store.newest(str(folder))
        complete = check_folder(str(folder), ONE)
        assert newest in (NEWER[0], TO) and complete[0] == (OLD, store.step_of(newest))
        if newest == NEWER[0]:
            assert store.tags(str(folder)) == [*NEWER, TO, store.tag_of(2)]  # nothing has changed
        outcomes.append(newest)
        # Repeating the command gives the result of an undisturbed rewind.
        left = [tag for tag in store.tags(str(folder)) if tag > TO]
        again = begin(str(folder))
        again.go_back(TO, left)
        assert names(again) == names(first)
        assert check_folder(str(folder), ONE) == [(OLD, 4), (OLD, 2)]
        shutil.rmtree(folder)
    assert NEWER[0] in outcomes and TO in outcomes


def test_rewound_checkpoints_are_complete_and_no_candidates(eight: Path, tmp_path: Path) -> None:
    """Otherwise nobody could analyse the loss spike, or undo the rewind."""
    folder = str(shutil.copytree(eight, tmp_path / "c"))
    attempt = begin(folder)
    attempt.go_back(TO, NEWER)
    assert store.candidates(folder) == [TO, store.tag_of(2)] and store.newest(folder) == TO
    attempt.end()
    assert SaveAttempt(folder, new_id()).begin() == []
    for tag in NEWER:
        os.rename(os.path.join(folder, tag + store.REWOUND), os.path.join(folder, tag))
        assert check_checkpoint(folder, tag, ONE) == (OLD, store.step_of(tag))


def test_rewound_checkpoints_are_deleted_after_a_later_save(eight: Path, tmp_path: Path) -> None:
    """Otherwise the disk would fill up, or the states before the spike would be lost before the run is past it."""
    folder = str(shutil.copytree(eight, tmp_path / "c"))
    begin(folder).go_back(TO, NEWER)
    run = ranks(folder, ONE, keep=Retention(last=2))
    rewound = {6: [6, 8], 7: [8], 8: [8], 9: []}
    for step, left in rewound.items():
        save(run, NEW, step)
        aside = sorted(name for name in os.listdir(folder) if name.endswith(store.REWOUND))
        assert aside == [store.tag_of(old) + store.REWOUND for old in left]
        assert store.candidates(folder)[0] == store.tag_of(step)
        assert check_checkpoint(folder, store.tag_of(step), ONE) == (NEW, step)
    assert names(run[0].attempt) == {store.LATEST, store.tag_of(8), store.tag_of(9)}


def test_a_run_that_retains_all_checkpoints_retains_rewound_ones(eight: Path, tmp_path: Path) -> None:
    folder = str(shutil.copytree(eight, tmp_path / "c"))
    begin(folder).go_back(TO, NEWER)
    save(ranks(folder, ONE), NEW, 9)
    assert {tag + store.REWOUND for tag in NEWER} <= set(os.listdir(folder))


def test_two_rewinds_set_both_checkpoints_aside(tmp_path: Path) -> None:
    """The checkpoint of a second spike must not replace that of the first, and foreign folders must stay."""
    folder = make(tmp_path, *map(store.tag_of, (4, 8)), "step_00000006.rewound.mine", "old.rewound")
    attempt = begin(folder)
    attempt.go_back(TO, NEWER[:1])
    make(tmp_path, store.tag_of(8))
    attempt.go_back(TO, NEWER[:1])
    twice = [NEWER[0] + ".rewound", NEWER[0] + ".rewound-2"]
    assert set(twice) <= set(os.listdir(folder)) and store.tags(folder) == [TO]
    make(tmp_path, store.tag_of(9))
    attempt.point_to(store.tag_of(9))
    attempt.remove_old(Retention(last=1))
    assert names(attempt) == {store.LATEST, store.tag_of(9), "old.rewound", "step_00000006.rewound.mine"}
