"""Where the time of a run goes, by the events of its jobs: shares, lost steps, causes, strikes, damaged lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from llama_ds.experiments.goodput import Goodput, goodput
from llama_ds.experiments.goodput_report import as_text, remarks, timeline
from llama_ds.experiments.records import read_run
from llama_ds.job.wire import Phase
from llama_ds.launch.supervise.events import Events
from llama_ds.launch.supervise.progress_log import ProgressLog
from tools import launch

HALF_LIFE_S = 100.0


def event(time: float, name: str, **values: Any) -> dict[str, Any]:
    return {"time": time, "event": name, **values}


# Two hosts of two ranks. Steps take 1 s and a save 2 s; node2 dies in step 31, and the run resumes at step 20.
FAULT = [
    event(0, "job started"),
    event(1, "attempt started", world=4, hosts={"node1": 2, "node2": 2}),
    event(5, "ranks joined"),
    event(10, "progress", step=0, seconds={}),
    event(13, "progress", step=1, seconds={}),  # 2 s more than a step
    event(34, "progress", step=20, seconds={"saving": 2.0}),
    event(46.5, "progress", step=30, seconds={}),  # written when the failure was known
    event(46.5, "detected", kind="death", ranks=[2], hosts=["node2"], after_s=2.0),
    event(49, "left", ranks=[0, 1, 3], problems={}, seconds=1.5),
    event(52, "killed", processes={}, unclean=[], seconds=2.0),
    event(52, "death", step=30, hosts=["node2"], ranks=[2]),
    event(55, "restart", pause_s=1.0),
    event(57, "attempt started", world=4),
    event(60, "ranks joined"),
    event(64, "progress", step=20, seconds={}),
    event(66, "progress", step=21, seconds={}),
    event(75, "progress", step=30, seconds={}),
    event(76, "done", step=30, hosts=[], ranks=[]),
    event(76, "job ended"),
]


def written(folder: Path, events: list[Any], job: str = "0001") -> Path:
    (folder / "jobs" / job).mkdir(parents=True)
    lines = [one if isinstance(one, str) else json.dumps(one) for one in events]
    (folder / "jobs" / job / "events.jsonl").write_text("\n".join(lines) + "\n")
    metrics = [{"step": step, "step_s": 1.0, "data_wait_s": 0.1} for step in range(5, 31, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def accounts(folder: Path) -> Goodput:
    return goodput(read_run(str(folder)), HALF_LIFE_S)


def test_every_second_of_a_job_belongs_to_one_phase(tmp_path: Path) -> None:
    found = accounts(written(tmp_path / "run", FAULT))
    # Kept: steps 1 to 20 of the first attempt (20 s), 21 to 30 of the second (10 s); a tenth of it waits for data.
    assert found.phases == pytest.approx(
        {
            "training": 27.0,
            "data wait": 3.0,
            "saving": 2.0,
            "ending": 1.0,
            "lost steps": 10.5,  # 10 steps; what followed the last beat is part of their time
            "detect": 3.0,  # 44.5 to 47.5
            "leave": 2.5,
            "end": 2.0,
            "hosts": 3.0,
            "pause": 1.0,
            "rendezvous": 1 + 4 + 1 + 3,
            "restore": 5 + 4,
            "first step": 2 + 1,
        }
    )
    assert found.wall_s == pytest.approx(76.0) and found.effective == pytest.approx(27 / 76)
    assert found.lost_steps == 10 and found.causes["death"].lost_steps == 10
    assert found.causes["death"].seconds == pytest.approx(10.5 + 5.5 + 2 + 3 + 1 + 1 + 3 + 4 + 1)
    assert found.mtbf_s == pytest.approx(43.5 + 19) and found.gpu_days == pytest.approx(4 * 62.5 / 86400)
    assert found.step_time_s == 30.0
    assert found.sliding(11.0) == pytest.approx(9 / 11), "the last 11 s: 10 steps' time, a tenth waiting, then the end"


def test_a_later_rewind_takes_steps_of_earlier_attempts_and_jobs(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", FAULT)
    again = [event(100, "job started"), event(100, "attempt started", world=4), event(100, "ranks joined")]
    again += [event(100, "progress", step=10, seconds={}), event(101, "progress", step=11, seconds={})]
    written_again = folder / "jobs" / "0002"
    written_again.mkdir()
    (written_again / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in again))
    found = accounts(folder)
    assert (found.lost_steps, found.jobs) == (20 + 10, 2)
    assert found.wall_s == pytest.approx(77.0), "the time between jobs does not count"


def test_a_job_that_gave_up_has_not_recovered(tmp_path: Path) -> None:
    """The next job may start days later; its first step is not the end of that failure."""
    folder = written(tmp_path / "run", FAULT)
    one = [
        event(100, "attempt started", world=4),
        event(101, "ranks joined"),
        event(102, "progress", step=30, seconds={}),
    ]
    one += [event(103, "progress", step=31, seconds={}), event(105, "death", step=31, hosts=["node1"])]
    (folder / "jobs" / "0002").mkdir()
    for job, events in (
        ("0002", [*one, event(105, "gave up")]),
        ("0003", [{**e, "time": e["time"] + 900} for e in one[:4]]),
    ):
        (folder / "jobs" / job).mkdir(exist_ok=True)
        (folder / "jobs" / job / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    found = accounts(folder)
    assert found.failures == 2 and found.recoveries == pytest.approx([20.5])


def test_strikes_decay(tmp_path: Path) -> None:
    """A host that failed months ago is as good as any."""
    later = [*FAULT[:-2], event(152, "death", step=30, hosts=["node1"]), event(152, "gave up")]
    assert accounts(written(tmp_path / "run", later)).strikes == {"node1": 1.0, "node2": 0.5}


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    whole = accounts(written(tmp_path / "whole", FAULT))
    bad = ['{"time": 3, "eve', event(3, "progress", step="x", seconds={}), event(3, "progress", step=1, seconds=[1])]
    bad += [event(3, "death", hosts=7), event(3, "restart", pause_s=None), {"time": 3, "event": 5}]
    found = accounts(written(tmp_path / "bad", [*FAULT[:3], *bad, *FAULT[3:]]))
    assert found.phases == whole.phases
    assert [line.rpartition("/")[2] for line in remarks(found)] == [
        "events.jsonl: 1 damaged lines are left out",
        "events with values of a wrong type: 5 damaged lines are left out",
    ]


def test_a_job_without_progress_events_is_said_to_have_none(tmp_path: Path) -> None:
    """An older launcher wrote none: no share is invented."""
    found = accounts(written(tmp_path / "run", [one for one in FAULT if one["event"] != "progress"]))
    assert found.effective == 0 and found.wall_s == pytest.approx(76.0)
    assert remarks(found)[0].startswith("2 attempts have no progress events")


def test_the_picture_is_whole_and_bounded(tmp_path: Path) -> None:
    """A run of two months has 86,400 progress events: the picture must not have as many shapes."""
    folder = written(tmp_path / "run", [{**one, "time": one["time"] * 6e4} for one in FAULT])
    root = ElementTree.fromstring(timeline(accounts(folder), 86400.0))
    assert "death at step 30: node2" in [node.text for node in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) < 200


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, svg = written(tmp_path / "run", FAULT), tmp_path / "t.svg"
    assert launch.main(["report", str(folder), "--svg", str(svg), "--json", "--window-h", "0.003"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["effective_share"] == pytest.approx(27 / 76) and data["strikes"]["node2"] > 0.99
    assert data["median_recovery_s"] == pytest.approx(20.5) and svg.exists()
    assert launch.main(["report", str(folder)]) == 0
    assert "effective training time: 35.5%; 35.5% of the last 1 min 16 s" in capsys.readouterr().out
    (folder / "jobs" / "0001" / "events.jsonl").unlink()
    assert launch.main(["report", str(folder)]) == 2
    assert "has no events.jsonl; give a run that tools/launch.py has started" in capsys.readouterr().err
    assert as_text(accounts(written(tmp_path / "empty", [event(0, "job started")])), 60.0)


def test_progress_is_recorded_at_the_start_after_the_first_step_and_at_the_end(tmp_path: Path) -> None:
    """Not at every save: a run that saves at each step would flood the disk of the launcher."""
    log = Events(tmp_path / "events.jsonl", lambda _: None)
    progress = ProgressLog(log)
    progress.update(40)
    progress.take({"what": "phase", "phase": Phase.STARTING, "seconds": 3.0, "to": Phase.LOADING, "step": 0})
    progress.take({"what": "phase", "phase": Phase.LOADING, "seconds": 9.0, "to": Phase.TRAINING, "step": 40})
    for step in range(40, 60):
        progress.take({"what": "phase", "phase": Phase.SAVING, "seconds": 0.25, "to": Phase.TRAINING, "step": step})
        progress.update(step)
    progress.close(60)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(line["step"], line["seconds"]) for line in lines] == [
        *((40, {}), (41, {"saving": 0.5}), (60, {"saving": 4.5})),
    ]
    log.close()
