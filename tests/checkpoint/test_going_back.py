"""Going back to an earlier checkpoint: a kill at any moment leaves a run that has gone back, or one that has not."""

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

FIXED = 16 * "0"  # an attempt's id, so that points have the same names each time
OLD, NEW = 1, 2  # lives: before and after going back
TO = store.tag_of(4)
NEWER = [store.tag_of(8), store.tag_of(6)]


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which steps 2, 4, 6 and 8 were saved."""
    folder = tmp_path_factory.mktemp("eight") / "checkpoints"
    run = ranks(str(folder), ONE)
    for step in (2, 4, 6, 8):
        save(run, OLD, step)
    return folder


def go_back(attempt: SaveAttempt, tag: str, newer: list[str], fatal: str | None, log: Path) -> int:
    """Go back in a process that dies at a point; return how it ended."""
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
    """A run would go on from the middle of nowhere: without a newest checkpoint, or from one that it was to leave."""
    log = tmp_path / "points"
    counted = shutil.copytree(eight, tmp_path / "counted")
    first = SaveAttempt(str(counted), FIXED)
    first.begin()
    assert go_back(first, TO, NEWER, None, log) == 0
    points = [point for point in log.read_text().splitlines() if not point.startswith("synced")]
    own = os.path.basename(first.path)
    renames = [f"rename {own}/latest", *(f"rename {x}" for tag in NEWER for x in (tag, f"{own}/{tag}.rewound"))]
    assert [p for p in points if p.startswith("rename")] == renames and points[-1].startswith("fsync .")
    meant = []
    for point in [*points, *(p.replace("write", "torn") for p in points if p.startswith("write"))]:
        folder = shutil.copytree(eight, tmp_path / "killed")
        killed = SaveAttempt(str(folder), FIXED)
        killed.begin()
        assert go_back(killed, TO, NEWER, point, log) == -signal.SIGKILL, point
        newest = store.newest(str(folder))
        whole = check_folder(str(folder), ONE)
        assert newest in (NEWER[0], TO) and whole[0] == (OLD, store.step_of(newest))
        if newest == NEWER[0]:
            assert store.tags(str(folder)) == [*NEWER, TO, store.tag_of(2)]  # as if nothing had been asked
        meant.append(newest)
        # The same command once more ends where the first would have.
        left = [tag for tag in store.tags(str(folder)) if tag > TO]
        again = begin(str(folder))
        again.go_back(TO, left)
        assert names(again) == names(first)
        assert check_folder(str(folder), ONE) == [(OLD, 4), (OLD, 2)]
        shutil.rmtree(folder)
    assert NEWER[0] in meant and TO in meant


def test_what_was_set_aside_is_whole_and_no_candidate(eight: Path, tmp_path: Path) -> None:
    """Somebody may want to look into the spike, or to take the step back."""
    folder = str(shutil.copytree(eight, tmp_path / "c"))
    attempt = begin(folder)
    attempt.go_back(TO, NEWER)
    assert store.candidates(folder) == [TO, store.tag_of(2)] and store.newest(folder) == TO
    attempt.end()
    assert SaveAttempt(folder, new_id()).begin() == []
    for tag in NEWER:
        os.rename(os.path.join(folder, tag + store.REWOUND), os.path.join(folder, tag))
        assert check_checkpoint(folder, tag, ONE) == (OLD, store.step_of(tag))


def test_what_was_set_aside_goes_when_the_run_is_past_it(eight: Path, tmp_path: Path) -> None:
    """A disk would fill with what nobody goes on from; or what led to the spike be gone before the run is past it."""
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


def test_a_run_that_keeps_all_keeps_them_too(eight: Path, tmp_path: Path) -> None:
    folder = str(shutil.copytree(eight, tmp_path / "c"))
    begin(folder).go_back(TO, NEWER)
    save(ranks(folder, ONE), NEW, 9)
    assert {tag + store.REWOUND for tag in NEWER} <= set(os.listdir(folder))


def test_going_back_twice_keeps_both(tmp_path: Path) -> None:
    """The second spike's checkpoint must not hide the first's; and only folders of ours are removed."""
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
