"""Boards that are services, by their own clients: Weights & Biases and MLflow.

A resumed run continues its run there. Neither service can replace points, so a step that it holds is not sent again.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from llama_ds.atomic_files import write_atomically
from llama_ds.config.boards import BoardConfig
from llama_ds.job.run_end import RunEnd
from llama_ds.log import logger
from llama_ds.training.boards.background import CLOSE_S, Values, numbers

PROJECT = "llama_ds"
MAX_PARAMS = 100  # limit of one request to MLflow
MAX_PARAM_CHARS = 500  # limit of a value on its older servers
WANDB_EXIT_CODES = {RunEnd.FINISHED: 0, RunEnd.INTERRUPTED: 255, RunEnd.FAILED: 1}  # 255 is its own for Ctrl-C
MLFLOW_STATES = {RunEnd.FINISHED: "FINISHED", RunEnd.INTERRUPTED: "KILLED", RunEnd.FAILED: "FAILED"}


class ServiceRun:
    """Which run a service has for this one, and the last step that it holds, in a file of the run's folder."""

    def __init__(self, path: str, first_step: int) -> None:
        """Read the file of a run that resumes at `first_step`; one that starts at 0 is a new run there."""
        self.path = path
        self.id, self.held = "", 0
        if first_step and os.path.exists(path):
            with open(path) as file:
                found = json.load(file)
            self.id, self.held = found["id"], found["step"]
        if self.held > first_step:
            logger.warning(
                "%s: the board keeps the points of steps %d to %d from before the resume",
                path,
                first_step + 1,
                self.held,
            )

    def write(self, step: int) -> None:
        """Record that the service holds all steps up to `step`."""
        step = max(step, self.held)
        write_atomically(self.path, json.dumps({"id": self.id, "step": step}))


class WandbRun:
    """A run of Weights & Biases. Its key comes from WANDB_API_KEY or ~/.netrc."""

    def __init__(
        self, options: BoardConfig, run_dir: str, name: str, config: Mapping[str, Any], service: ServiceRun
    ) -> None:
        import wandb

        self._service, self._step = service, service.held
        service.id = service.id or secrets.token_hex(4)
        self._run = wandb.init(
            id=service.id,
            resume="allow",
            name=name,
            project=options.project or PROJECT,
            entity=options.entity or None,
            mode="offline" if options.offline else None,
            dir=run_dir,
            config=dict(config),
            # The console is the run's own; neither a login nor a server that is gone may hold up the end of the run.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                login_timeout=30,
                init_timeout=CLOSE_S,
                finish_timeout=CLOSE_S,
            ),
        )
        service.write(service.held)

    def add(self, step: int, values: Values) -> None:
        if step > self._service.held:
            if step > self._step:  # wandb sends the values of a step when the next one begins
                self._service.write(self._step)
                self._step = step
            self._run.log(dict(values), step=step)

    def close(self, end: RunEnd) -> None:
        self._run.finish(WANDB_EXIT_CODES[end])
        self._service.write(self._step)


class MlflowRun:
    """A run of MLflow: on a server, or in a database file."""

    def __init__(
        self, options: BoardConfig, run_dir: str, name: str, config: Mapping[str, Any], service: ServiceRun
    ) -> None:
        from mlflow import MlflowClient

        self._service = service
        file = os.path.join(os.path.abspath(run_dir), "mlflow.db")
        self._client = MlflowClient(options.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{file}")
        if service.id:
            self._client.update_run(service.id, status="RUNNING")
        else:
            service.id = self._new_run(options.project or PROJECT, name, config)
            service.write(0)

    def _new_run(self, project: str, name: str, config: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        run: str = self._client.create_run(experiment, run_name=name).info.run_id
        params = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in _flat(config)]
        for begin in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run, params=params[begin : begin + MAX_PARAMS])
        return run

    def add(self, step: int, values: Values) -> None:
        from mlflow.entities import Metric

        if step > self._service.held:
            now = int(time.time() * 1000)
            metrics = [Metric(key, float(value), now, step) for key, value in numbers(values).items()]
            if metrics:
                self._client.log_batch(self._service.id, metrics=metrics)
                self._service.write(step)

    def close(self, end: RunEnd) -> None:
        self._client.set_terminated(self._service.id, MLFLOW_STATES[end])


def _flat(data: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of plain data by dotted key."""
    items = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else None
    if items is None:
        yield at, data
        return
    for key, value in items:
        yield from _flat(value, f"{at}.{key}" if at else str(key))
