"""Boards: what they show of a run that resumes, and that none of them stops or slows the run."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llama_ds.config.run_file import load_run
from llama_ds.errors import UserError
from llama_ds.job.run_end import RunEnd
from llama_ds.log import logger
from llama_ds.training.boards import background
from llama_ds.training.boards.background import BackgroundBoard, close_boards
from llama_ds.training.boards.files import CsvFile, TensorBoardFiles
from llama_ds.training.boards.prometheus import PrometheusMetrics, exposition
from llama_ds.training.boards.services import ServiceRun
from llama_ds.training.run_log import open_run_log
from llama_ds.training.samples import Sample

QUICKSTART = str(Path(__file__).resolve().parents[2] / "ds_configs" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger.name)
    return lambda: [record.getMessage() for record in caplog.records]


def csv_points(path: Path) -> list[tuple[int, float]]:
    return [(int(row.split(",")[0]), float(row.split(",")[2])) for row in path.read_text().splitlines()[1:]]


def event_points(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


@pytest.mark.parametrize(("kind", "points"), [(CsvFile, csv_points), (TensorBoardFiles, event_points)])
def test_steps_after_a_resume_appear_once_with_their_new_values(kind: Any, points: Any, tmp_path: Path) -> None:
    path = tmp_path / "board"
    for first, values in ((0, [4.0, 3.0, 2.0]), (1, [2.5, 1.5])):
        board = kind(str(path), first)
        for step, value in enumerate(values, start=first + 1):
            board.add(step, {"loss": value})
        board.close(RunEnd.FINISHED)
        if kind is CsvFile and not first:
            with open(path, "a") as file:
                file.write("1,lo")  # cut off by a kill
    assert points(path) == [(1, 4.0), (2, 2.5), (3, 1.5)]


def test_texts_go_to_boards_that_take_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = f"[{{name: tensorboard}}, {{name: csv}}, {{name: prometheus, textfile: {tmp_path}/run.prom}}]"
    run = load_run(QUICKSTART, [f"output_dir={tmp_path}", "name=texts", f"logging.boards={boards}"])
    folder = tmp_path / "texts"
    log = open_run_log(run, 0)
    log.record_samples(2, [Sample("def f(x):\n", "    return x\n"), Sample("", "é")])
    log.record_samples(4, [Sample("def f(x):\n", "    pass\n")])
    log.close(RunEnd.FINISHED)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (text, _) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/1/text_summary"))
    assert text == "    def f(x):\n        return x"
    assert (folder / "metrics.csv").read_text().splitlines() == ["step,name,value"]
    open_run_log(run, 3).close(RunEnd.FINISHED)  # resumes before the last samples
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"], line["text"]) for line in lines] == [
        *((2, "def f(x):\n", "    return x\n"), (2, "", "é"))
    ]


def test_prometheus_serves_the_last_values(tmp_path: Path) -> None:
    file = tmp_path / "run.prom"
    board = PrometheusMetrics("7b", "127.0.0.1", 0, str(file))
    board._server = board._serve("127.0.0.1", 0)  # any free port
    try:
        board.add(1, {"loss": 3.0, "tokens": 8, "tokens/a b": 8})
        board.add(2, {"loss": 2.5})
        with urllib.request.urlopen(f"http://127.0.0.1:{board._server.server_address[1]}/metrics") as answer:
            served = answer.read().decode()
    finally:
        written = file.read_text()
        board.close(RunEnd.FINISHED)
    assert served == written and not file.exists()
    lines = served.splitlines()
    for line in (
        *(
            'llama_ds_loss{run="7b"} 2.5',
            'llama_ds_tokens_by_name{run="7b",name="a b"} 8.0',
            'llama_ds_step{run="7b"} 2.0',
        ),
        *("# TYPE llama_ds_loss gauge", 'llama_ds_tokens{run="7b"} 8.0'),
    ):
        assert lines.count(line) == 1, served
    assert exposition("a", {"loss": math.nan}).endswith(" NaN\n") and " -Inf\n" in exposition("a", {"x": -math.inf})


class Failing:
    """A board whose server is gone for the first `failures` reports."""

    def __init__(self, failures: int) -> None:
        self.failures, self.got = failures, list[int | RunEnd]()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if step <= self.failures:
            raise ConnectionError("refused")
        self.got.append(step)

    def close(self, end: RunEnd) -> None:
        self.got.append(end)


def test_a_board_that_fails_is_named_once_and_its_losses_are_counted(warnings: Callable[[], list[str]]) -> None:
    board = Failing(2)
    background = BackgroundBoard("mlflow", lambda: board)
    for step in (1, 2, 3):
        background.add(step, {"loss": 1.0, "lr": 0.1})
    close_boards([background], RunEnd.FAILED)
    close_boards([background], RunEnd.FINISHED)  # a run that has failed is not finished by what comes later
    assert board.got == [3, RunEnd.FAILED]
    assert warnings() == [
        "board mlflow: values are lost (ConnectionError: refused); the run continues",
        "board mlflow: 4 values were dropped; metrics.jsonl has them",
    ]


def test_a_board_that_hangs_holds_up_nothing(
    warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "MAX_WAITING", 2)
    monkeypatch.setattr(background, "CLOSE_S", 0.1)
    opening, free = threading.Event(), threading.Event()

    def hang() -> Any:
        opening.set()
        free.wait()
        return Failing(0)

    board = BackgroundBoard("wandb", hang)
    try:
        assert opening.wait(60)
        for step in range(1, 8):  # two of them can wait
            board.add(step, {"loss": 1.0})
        close_boards([board], RunEnd.FINISHED)
    finally:
        free.set()
    assert warnings() == [
        "board wandb: values are lost (2 reports wait for it); the run continues",
        "board wandb: did not take its last values within 0.1 s",
        "board wandb: at least 6 values were dropped; metrics.jsonl has them",
    ]


def test_a_service_keeps_its_run_and_is_sent_no_step_twice(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    path = str(tmp_path / "wandb.json")
    new = ServiceRun(path, 0)
    new.id = "abc"
    new.write(7)
    resumed = ServiceRun(path, 5)
    assert (resumed.id, resumed.held) == ("abc", 7)
    assert warnings() == [f"{path}: the board keeps the points of steps 6 to 7 from before the resume"]
    resumed.write(6)
    assert ServiceRun(path, 7).held == 7 and ServiceRun(path, 0).id == "", "a run from step 0 is a new one"


def test_a_run_writes_to_the_boards_of_its_file(tmp_path: Path) -> None:
    boards = f"logging.boards=[{{name: csv}}, {{name: prometheus, textfile: {tmp_path}/run.prom}}]"
    run = load_run(QUICKSTART, [f"output_dir={tmp_path}", "name=boards", boards])
    log = open_run_log(run, 0)
    log.record({"step": 1, "loss": 2.0, "mfu": None})
    log.close(RunEnd.FINISHED)
    assert (tmp_path / "boards" / "metrics.csv").read_text().splitlines() == ["step,name,value", "1,loss,2.0"]


@pytest.mark.parametrize(
    ("boards", "message"),
    [
        ("[{name: tensorbord}]", "logging.boards.0.name = 'tensorbord' is not"),
        ("[{name: csv}, {name: csv}]", "logging.boards has csv twice"),
        ("[{name: csv, port: 1}]", "logging.boards.0.port is no option of csv, which takes no options"),
        ("[{name: mlflow, uri: 'http://me:secret@host'}]", "MLFLOW_TRACKING_PASSWORD, in the environment"),
        ("[{name: prometheus, textfile: /tmp/a.txt}]", "does not end in .prom"),
        ("[{name: prometheus}]", "logging.boards.0.port and logging.boards.0.textfile are not set"),
    ],
)
def test_bad_boards_are_refused(boards: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_run(QUICKSTART, [f"logging.boards={boards}"])
    assert message in str(refused.value) and "secret" not in str(refused.value)


def test_a_board_whose_package_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = load_run(QUICKSTART, [f"output_dir={tmp_path}", "logging.boards=[{name: wandb}]"])
    with pytest.raises(UserError, match=r"wandb, which is not installed; pip install 'llama_ds\[wandb\]'"):
        open_run_log(run, 0)
