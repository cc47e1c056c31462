"""When the results of steps are read and reported, and what a diverged run reports."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from llama_ds.config.run_file import load_run
from llama_ds.errors import Divergence
from llama_ds.job.heartbeat import Progress
from llama_ds.job.run_end import RunEnd
from llama_ds.layout.layout import resolve_layout
from llama_ds.log import logger
from llama_ds.training import line_file, run_log
from llama_ds.training.meter import Meter
from llama_ds.training.reporter import Reporter
from llama_ds.training.run_log import RunLog, open_run_log

QUICKSTART = str(Path(__file__).resolve().parents[2] / "ds_configs" / "quickstart.yaml")


def open_log(folder: Path, *overrides: str, first: int = 0) -> tuple[Any, RunLog]:
    run = load_run(QUICKSTART, [f"output_dir={folder}", "name=reported", "logging.interval=1", *overrides])
    return run, open_run_log(run, first)


@pytest.mark.parametrize("error", ["EPIPE", "EIO", "ENOSPC"])
def test_a_console_that_is_gone_ends_no_run(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher that read it may have been killed, and the run has not saved yet; mpirun's terminal gives EIO."""
    log, saved = open_log(tmp_path)[1], os.dup(1)

    class Gone:
        def write(self, text: str) -> None:
            raise OSError(getattr(errno, error), "gone")

    monkeypatch.setattr(sys, "stdout", Gone())
    try:
        log.print_line("step 1")
        assert (os.fstat(1).st_rdev == os.stat(os.devnull).st_rdev) == (error != "ENOSPC")
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        log.close(RunEnd.FINISHED)


def report(folder: Path, device: str, *overrides: str) -> Reporter:
    """Return a reporter for a device type whose step results are plain losses."""
    run, log = open_log(folder, *overrides)
    engine: Any = SimpleNamespace(read=lambda loss: (loss, 1.0), deepspeed=None)
    feed: Any = SimpleNamespace(wait_s=0.0, balance=None)
    meter = Meter(run, resolve_layout(run, 4), feed, "fp32", torch.device("cpu"), 0)
    return Reporter(run, engine, meter, log, Progress(), torch.device(device))


def reported(folder: Path) -> list[int]:
    """Return the steps in metrics.jsonl."""
    lines = (folder / "reported" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def step_done(reporter: Reporter, step: int, last: bool = False) -> None:
    reporter.step_done(step, 0.1, step / 2, last)  # type: ignore[arg-type]


def test_on_cuda_a_result_is_read_while_the_next_step_runs(tmp_path: Path) -> None:
    """It is read at once if training pauses, and after the last step."""
    reporter = report(tmp_path, "cuda")
    step_done(reporter, 1)
    assert reported(tmp_path) == []
    step_done(reporter, 2)
    assert reported(tmp_path) == [1]
    reporter.flush()
    reporter.flush()
    assert reported(tmp_path) == [1, 2]
    step_done(reporter, 3, last=True)
    assert reported(tmp_path) == [1, 2, 3]


def test_on_a_cpu_a_result_is_read_at_once(tmp_path: Path) -> None:
    reporter = report(tmp_path, "cpu")
    for step in (1, 2):
        step_done(reporter, step)
        assert reported(tmp_path)[-1] == step


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_interval_and_the_last_step_are_reported(device: str, tmp_path: Path) -> None:
    reporter = report(tmp_path, device, "logging.interval=3")
    for step in range(1, 8):
        step_done(reporter, step, last=step == 7)
    assert reported(tmp_path) == [3, 6, 7]


class MeasuredNorms:
    """Stands for the norms of an engine whose weights are an embedding, two matrices and a head."""

    def __init__(self, engine: Any, model: Any) -> None:
        self.measured = 0

    def measure(self) -> None:
        self.measured += 1

    def sums(self) -> Any:
        keys = ((0, "weight"), (1, "mlp.down_proj.weight"), (2, "mlp.down_proj.weight"), (4, "lm_head.weight"))
        norms = [1 / 3, math.nan, float(self.measured), 2.0]
        return SimpleNamespace(wait=lambda norm: {"gradient": dict(zip(keys, norms, strict=True))})


class LossAndNorm(float):
    """A step's result whose loss is the number itself."""

    norm = 1.0


def test_norms_are_read_a_step_later_and_before_the_loss_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On boards each number is a curve of its own; what is not finite has no point."""
    monkeypatch.setattr("llama_ds.training.norm_lines.LayerNorms", MeasuredNorms)
    reporter = report(tmp_path, "cuda", "logging.norms=2", "logging.interval=4")
    points: list[Any] = []
    assert reporter._log is not None
    reporter._log._boards = [SimpleNamespace(add=lambda *point: points.append(point), close=lambda: None)]
    found = []
    for step in range(1, 5):
        reporter.before_step(step)
        result: Any = LossAndNorm("nan")
        reporter.step_done(step, 0.1, result, last=False)
        found.append(reported(tmp_path))
    assert found == [[], [], [2], [2]]
    with pytest.raises(Divergence):
        reporter.flush()
    lines = [json.loads(line) for line in (tmp_path / "reported" / "metrics.jsonl").read_text().splitlines()]
    rows = {"embedding": [0.3333333], "down_proj": [None, 2.0], "head": [2.0]}
    assert lines[1] == {"step": 4, "norms": {"gradient": rows}}
    names = {"norms/gradient/embedding": 0.3333333, "norms/gradient/down_proj/2": 2.0, "norms/gradient/head": 2.0}
    assert points[1] == (4, names)


def test_a_run_that_diverges_reports_the_step_and_ends(tmp_path: Path) -> None:
    reporter = report(tmp_path, "cuda")
    reporter.step_done(1, 0.1, math.nan, last=False)  # type: ignore[arg-type]
    with pytest.raises(Divergence, match="loss is nan at step 1, the run has diverged"):
        step_done(reporter, 2)
    assert reported(tmp_path) == [1]


def test_warnings_are_kept_with_their_step(tmp_path: Path) -> None:
    """Bad shards, stragglers, lost values: a report shows them after the console is gone."""
    reporter = report(tmp_path, "cpu")
    step_done(reporter, 1)
    logger.warning("shard %s is damaged", "x")
    logger.info("no warning")
    step_done(reporter, 2)
    reporter.warnings(["SLOW: rank 3"])
    reporter.close(RunEnd.FINISHED)
    logger.warning("of another run")
    lines = [json.loads(line) for line in (tmp_path / "reported" / "warnings.jsonl").read_text().splitlines()]
    assert [(line["step"], line["text"]) for line in lines] == [(1, "shard x is damaged"), (2, "SLOW: rank 3")]


def test_a_resumed_run_writes_later_steps_anew(tmp_path: Path) -> None:
    reporter = report(tmp_path, "cpu")
    for step in (1, 2, 3):
        step_done(reporter, step)
    reporter.close(RunEnd.FINISHED)
    _, log = open_log(tmp_path, first=2)
    log.close(RunEnd.FINISHED)
    assert reported(tmp_path) == [1, 2]


def test_boards_get_accounts_of_time_with_a_step_that_is_new_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service may hold the step at which a restart begins, and takes nothing more for it."""
    accounts, points = {"effective_share": 0.9, "failures": 2.0}, []
    monkeypatch.setattr(run_log, "current", lambda _: SimpleNamespace(accounts=accounts))
    log = open_log(tmp_path, first=4)[1]
    board: Any = SimpleNamespace(add=lambda *point: points.append(point), end=lambda _: False)
    log._boards = [board]
    for step in (5, 6):
        log.record({"step": step, "loss": 1.0})
    log.close(RunEnd.FINISHED)
    assert points == [(5, accounts | {"loss": 1.0}), (6, {"loss": 1.0})]
    first = (tmp_path / "reported" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"step": 4, **accounts}


def test_lines_of_metrics_wait_for_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None is lost or written twice, however long the disk is full and wherever a write stops; one warning says it."""
    log, room = open_log(tmp_path)[1], 0
    metrics = tmp_path / "reported" / "metrics.jsonl"

    def write_until_full(file: int, content: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(file, content[:room])
        room -= written
        return written

    monkeypatch.setattr(line_file, "os", SimpleNamespace(write=write_until_full, close=os.close))
    for step in range(1, 500):
        room = 37 if step == 100 else room
        log.record({"step": step, "loss": 1 / step})
    assert metrics.stat().st_size == 37
    room = 10**6
    log.record({"step": 500, "loss": 0.5})
    log.close(RunEnd.FINISHED)
    assert reported(tmp_path) == list(range(1, 501))
    (said,) = [text for text in caplog.messages if "METRICS" in text]
    assert "METRICS DELAYED: step 1: " in said and "No space left" in said


def test_metrics_that_wait_take_limited_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk may stay full for weeks: the first lines are kept, and it is said how many others are lost."""
    log = open_log(tmp_path)[1]
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(line_file, "os", SimpleNamespace(write=full, close=os.close))
    monkeypatch.setattr(line_file, "MAX_WAITING", 40)
    for step in range(1, 10):
        log.record({"step": step, "loss": 0.5})  # 24 bytes
    full.side_effect = os.write
    log.record({"step": 10, "loss": 0.5})
    log.close(RunEnd.FINISHED)
    assert reported(tmp_path) == [1, 2, 10]
    assert "METRICS LOST: 7 lines before step 10: too many waited" in caplog.messages
