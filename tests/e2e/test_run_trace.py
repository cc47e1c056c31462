"""logging.trace_step leaves a record of one step that `profile_run.py analyse` reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, TRAIN, forked, succeed
from tiny_run import SEQ_LEN, Run

from llama_ds.perf.trace.read import read_rank
from tests import warm


@pytest.mark.slow
def test_recompute_does_not_wait_for_the_gradient(make_run: Callable[..., Run]) -> None:
    """The last layer of a stage recomputes its forward before the wait for its gradient ends."""
    run = make_run("recomputed", {"parallel.pp": 2, "parallel.recompute": "full", "logging.trace_step": 2})
    succeed(forked(2, TRAIN, run.file), run.log)
    events = read_rank(run.dir / "trace" / "rank00000.json").events
    for micro_batch in range(4):
        (again,) = [e for e in events if e.what == "recompute" and e.micro_batch == micro_batch]
        (wait,) = [e for e in events if e.what == "wait grad" and e.micro_batch == micro_batch]
        assert again.end <= wait.begin <= wait.end
    # The stage's other layer is recomputed within the backward; both recomputes are recorded separately.
    backwards = [e for e in events if e.what == "BW"]
    within = [
        e for e in events if e.what == "recompute" and any(b.begin <= e.begin and e.end <= b.end for b in backwards)
    ]
    assert len(within) == 4


@pytest.mark.slow
@pytest.mark.parametrize("schedule, virtual_stages, tp", [("zb_h1", 1, 2), ("dualpipe_v", 2, 1)])
def test_traced_step_is_analysed(
    schedule: str, virtual_stages: int, tp: int, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    changes = {"parallel.pp": 2, "parallel.schedule": schedule, "parallel.virtual_stages": virtual_stages}
    changes |= {"parallel.tp": tp, "parallel.sequence_parallel": tp > 1}
    run = make_run(f"traced_{schedule}", {**changes, "logging.trace_step": 2, "parallel.recompute": "auto"})
    output = succeed(forked(2 * tp, TRAIN, run.file), run.log)
    assert "kept activations" in output, "recompute: auto prints its table"
    command = ("analyse", run.dir / "trace", "--json", "--svg", tmp_path / "step.svg")
    done = warm.run(ROOT / "tools" / "profile_run.py", *command)
    assert done.returncode == 0, done.stderr
    (step,) = json.loads(done.stdout).values()
    assert step["ranks"] == 2 * tp and 0 < step["metrics"]["compute"] < 100
    recorded = read_rank(run.dir / "trace" / "rank00001.json")
    forwards = [event for event in recorded.events if event.what == "F"]
    assert len(forwards) == 4 * virtual_stages  # a global batch of 8 rows, 2 in a micro-batch
    sent = [event.size for event in recorded.events if event.what.startswith("send")]
    # One message for each, of hidden states alone, and of 1 / tp of them under sequence parallelism.
    assert sent == [2 * SEQ_LEN // tp * 32 * 4] * 4 * virtual_stages
    assert (tmp_path / "step.svg").read_text().startswith("<svg")
