"""A run with a rewind and skipped rows applies both once and keeps everything else."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, TIMEOUT_S, TRAIN, alone, forked, kill_all, run, start, succeed
from test_run_resume import assert_same_bits
from tiny_run import GLOBAL_BATCH, LAYOUTS, SEQ_LEN, Run

from llama_ds.config.run_file import dump, load_resolved
from tests import warm

STEPS, TO, WINDOW = 8, 4, 2
CHANGES = {"training.steps": STEPS, "checkpoint.interval": 2}
SKIP = f"data.skip=[{{at_step: {TO}, steps: {WINDOW}}}]"
BACK = [f"checkpoint.rewind_to={TO}", SKIP]

pytestmark = pytest.mark.slow


def shards(command: str, folder: Path, *arguments: object) -> Any:
    """Return the report of tools/shards.py on a run."""
    done = warm.run(ROOT / "tools/shards.py", command, folder, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def tags(this: Run) -> list[str]:
    return sorted(path.name for path in this.checkpoints.glob("step_*"))


def folder_of(this: Run) -> dict[str, float]:
    """Return every file of a run's checkpoints, and when it was written."""
    return {str(path): path.stat().st_mtime for path in this.checkpoints.rglob("*")}


@pytest.fixture(scope="module")
def spiked(make_run: Callable[..., Run]) -> Run:
    """A run of eight steps, with checkpoints at 2, 4, 6 and 8."""
    this = make_run("spiked", CHANGES)
    succeed(alone(TRAIN, this.file), this.log)
    return this


@pytest.fixture
def again(spiked: Run, make_run: Callable[..., Run], request: pytest.FixtureRequest) -> Run:
    """A copy of the trained run."""
    this = make_run(request.node.name, CHANGES)
    shutil.copytree(spiked.dir, this.dir)
    return this


@pytest.fixture(scope="module")
def reference(spiked: Run, make_run: Callable[..., Run]) -> Run:
    """A run that ended at step 4, resumed by a run that skips rows without a rewind."""
    this = make_run("reference", CHANGES)
    succeed(alone(TRAIN, this.file, f"checkpoint.stop_at={TO}"), this.log)
    assert this.losses == spiked.losses[:TO]
    succeed(alone(TRAIN, this.file, SKIP), this.log)
    return this


def test_a_run_goes_back_once_and_reads_on_behind_the_window(again: Run, spiked: Run, reference: Run) -> None:
    old, command = spiked.losses, alone(TRAIN, again.file, *BACK)
    process = start(command, again.log)  # it is killed right after the rewind, before its first save
    deadline = time.monotonic() + TIMEOUT_S
    while "REWOUND" not in again.log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, again.log.read_text()
        time.sleep(0.001)
    kill_all(process)
    assert again.newest.name == "step_00000004"
    aside = ["step_00000006.rewound", "step_00000008.rewound"]
    assert tags(again)[:2] == ["step_00000002", "step_00000004"] and {*aside} <= {*tags(again)}

    output = succeed(command.with_more("checkpoint.stop_at=6"), again.log)
    assert f"resumed at step {TO} of {STEPS}" in output
    assert again.losses[:TO] == old[:TO] and len(again.losses) == 6
    output = succeed(command, again.log)
    assert f"resumed at step 6 of {STEPS}" in output and "REWOUND" not in output
    assert f"resumed at step {STEPS} of {STEPS}" in succeed(command, again.log)
    assert tags(again) == sorted([f"step_{step:08d}" for step in (2, 4, 6, 8)] + aside)

    assert again.losses[TO:] == reference.losses[TO:] and again.losses[TO] != old[TO]
    assert again.validation_loss == reference.validation_loss != spiked.validation_loss
    assert_same_bits(again.newest, reference.newest)
    assert json.loads((again.newest / "llama_ds.json").read_text())["rewinds"] == [{"to": TO, "id": 0}]


def test_the_steps_after_a_skip_read_the_documents_that_come_behind_it(spiked: Run, reference: Run) -> None:
    """The tool's order without skips, at later steps, gives the expected rows."""
    longer = shutil.copytree(spiked.dir, spiked.dir.with_name("longer"), ignore=shutil.ignore_patterns("checkpoints"))
    whole = load_resolved(str(longer / "run.yaml"))
    training = replace(whole.training, steps=STEPS + WINDOW)
    (longer / "run.yaml").write_text(dump(replace(whole, training=training)))
    for step in range(STEPS):
        later = step + (WINDOW if step >= TO else 0)
        assert shards("audit", reference.dir, "--step", step) == shards("audit", longer, "--step", later)
    read = shards("consumed", reference.dir)
    assert sum(source["tokens"] for source in read.values()) == STEPS * GLOBAL_BATCH * SEQ_LEN
    (line,) = [line for line in reference.metrics if "tokens/code" in line and line["step"] == STEPS]
    assert line["tokens/code"] == read["code"]["tokens"] and line["epochs/code"] == read["code"]["epochs"]


def test_another_layout_goes_back_to_the_same_numbers(again: Run, reference: Run) -> None:
    ranks, layout = LAYOUTS["dp2_zero2"]
    changes = [f"{key}={value}" for key, value in layout.items()]
    output = succeed(forked(ranks, TRAIN, again.file, *BACK, *changes, "checkpoint.keep_last=1"), again.log)
    assert "REWOUND to step_00000004: set aside as .rewound: step_00000008, step_00000006" in output
    assert again.losses == pytest.approx(reference.losses, rel=1e-5)
    # Retention: the run has saved a later step than 6, and none than 8.
    assert tags(again) == ["step_00000008", "step_00000008.rewound"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([SKIP], "is at step 8 and has skipped nothing at step 4, where data.skip requests 2; go back there with "
         "checkpoint.rewind_to=4, or skip at step 8 or later"),
        (["checkpoint.rewind_to=4", "data.skip=[{at_step: 3, steps: 1}]"], "step_00000004: is at step 4 and has "
         "skipped nothing at step 3"),
        (["checkpoint.rewind_to=1"], "no checkpoint at or before checkpoint.rewind_to = 1, the first is step_00000002"),
    ],
    ids=["skip of what was read", "skip before the step", "no checkpoint"],
)  # fmt: skip
def test_what_is_refused_changes_nothing(spiked: Run, overrides: list[str], message: str) -> None:
    """A mistake in the command would cost the run the checkpoints that it has."""
    before = folder_of(spiked)
    refused = run(alone(TRAIN, spiked.file, *overrides), spiked.log)
    assert refused.code == 2
    (error,) = refused.errors
    assert message in error
    assert folder_of(spiked) == before and os.listdir(spiked.checkpoints)
