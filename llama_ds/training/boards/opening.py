"""Opens the boards that a run file lists. To add one: its class, its line here, its options in `config/boards.py`."""

from __future__ import annotations

import os
from collections.abc import Callable

from llama_ds.config.boards import BoardConfig, check_packages
from llama_ds.config.run_file import resolved
from llama_ds.config.schema import RunConfig
from llama_ds.training.boards.background import BackgroundBoard, Board
from llama_ds.training.boards.files import CsvFile, TensorBoardFiles
from llama_ds.training.boards.prometheus import PrometheusMetrics
from llama_ds.training.boards.services import MlflowRun, ServiceRun, WandbRun

FOLDER = "boards"  # in the run's folder: which runs of services belong to it


def open_boards(run: RunConfig, first_step: int) -> list[BackgroundBoard]:
    """Return the boards of a run that starts or resumes at `first_step`; they are opened in the background.

    Raises:
        UserError: the package of a board is not installed.
    """
    check_packages(run.path, run.logging.boards)
    return [BackgroundBoard(one.name, _opener(one, run, first_step)) for one in run.logging.boards]


def _opener(options: BoardConfig, run: RunConfig, first_step: int) -> Callable[[], Board]:
    def service() -> ServiceRun:
        folder = os.path.join(run.run_dir, FOLDER)
        os.makedirs(folder, exist_ok=True)
        return ServiceRun(os.path.join(folder, f"{options.name}.json"), first_step)

    openers: dict[str, Callable[[], Board]] = {
        "tensorboard": lambda: TensorBoardFiles(os.path.join(run.run_dir, "tensorboard"), first_step),
        "csv": lambda: CsvFile(os.path.join(run.run_dir, "metrics.csv"), first_step),
        "wandb": lambda: WandbRun(options, run.run_dir, run.name, resolved(run), service()),
        "mlflow": lambda: MlflowRun(options, run.run_dir, run.name, resolved(run), service()),
        "prometheus": lambda: PrometheusMetrics(run.name, options.address, options.port, options.textfile),
    }
    return openers[options.name]
