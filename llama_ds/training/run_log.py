"""The first rank's outputs: the console, with a progress bar on terminals, metrics.jsonl and boards."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from llama_ds.atomic_files import atomic_file, write_atomically
from llama_ds.config.run_file import dump
from llama_ds.config.run_files import MACHINES, METRICS, RUN_FILE, SAMPLES, WARNINGS
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.job.folder import current
from llama_ds.job.run_end import RunEnd
from llama_ds.log import console_is_gone, logger
from llama_ds.training.boards.background import close_boards
from llama_ds.training.boards.opening import open_boards
from llama_ds.training.line_file import LineFile
from llama_ds.training.samples import Sample

DEEPSPEED = "deepspeed.json"  # the merged configuration, as the engine received it


class WarningsFile(logging.Handler):
    """Writes each warning as a line of warnings.jsonl: step, time in seconds since the epoch, text."""

    def __init__(self, path: str) -> None:
        super().__init__(logging.WARNING)
        self._path, self.step = path, 0

    def emit(self, record: logging.LogRecord) -> None:
        self.write(record.getMessage(), record.created)

    def write(self, text: str, at: float) -> None:
        with suppress(OSError), open(self._path, "a") as file:  # a full disk: the console has it
            file.write(json.dumps({"step": self.step, "time": round(at, 3), "text": text}) + "\n")


class RunLog:
    """The outputs of one run; a resumed run continues them after `first_step`."""

    def __init__(self, run: RunConfig, first_step: int) -> None:
        os.makedirs(run.run_dir, exist_ok=True)
        path = os.path.join(run.run_dir, METRICS)
        self._samples = os.path.join(run.run_dir, SAMPLES)
        for written in (path, self._samples):
            drop_steps_after(written, first_step)
        self._metrics = LineFile(path)
        self._full = False  # whether lines of metrics wait for room on the disk
        steps = run.training.steps
        self._bar = tqdm(total=steps, initial=first_step, unit="step", disable=not sys.stderr.isatty())
        self._warnings = WarningsFile(os.path.join(run.run_dir, WARNINGS))
        self._warnings.step = first_step
        logger.addHandler(self._warnings)
        self._boards = open_boards(run, first_step)
        self._accounts: Mapping[str, float] = {}  # metrics that boards do not have yet

    def record(self, values: dict[str, Any], plotted: Mapping[str, float] | None = None) -> None:
        """Write a line to metrics.jsonl, and its numbers or those of `plotted` to the boards.

        `values` includes the step.
        """
        step = self._warnings.step = values["step"]
        self._write(step, json.dumps(values))
        if plotted is None:
            plotted = {name: value for name, value in values.items() if name != "step" and value is not None}
        plotted, self._accounts = {**self._accounts, **plotted}, {}
        for board in self._boards:
            board.add(step, plotted)

    def record_accounts(self, step: int, accounts: Mapping[str, float]) -> None:
        """Write metrics of the run's time until `step` to metrics.jsonl, and with the next ones to the boards.

        A board may hold `step` from before a restart, and take nothing more for it.
        """
        self._write(step, json.dumps({"step": step, **accounts}))
        self._accounts = accounts

    def record_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write a line for each sample to samples.jsonl, and their texts to the boards."""
        try:
            with open(self._samples, "a") as file:
                file.writelines(json.dumps({"step": step, **asdict(one)}) + "\n" for one in samples)
        except OSError as error:
            logger.warning("SAMPLES LOST: step %s: %s (%s); the run continues", step, self._samples, error)
        texts = {f"samples/{number}": one.prompt + one.text for number, one in enumerate(samples, 1)}
        for board in self._boards:
            board.add(step, texts)

    def _write(self, step: int, line: str) -> None:
        """Write a line of metrics. A full disk does not stop the run: lines wait until there is room."""
        try:
            self._metrics.write(line)
        except OSError as error:
            if not self._full:
                self._full = True
                text = "METRICS DELAYED: step %s: %s (%s); the run continues, and writes them when it can"
                logger.warning(text, step, self._metrics.path, error)
            return
        if self._full:
            self._full = False
            logger.info("step %s | the delayed metrics are written", step)
            if self._metrics.lost:
                logger.warning("METRICS LOST: %d lines before step %s: too many waited", self._metrics.lost, step)

    def warn(self, lines: Iterable[str]) -> None:
        """Print lines on the console, and write them to warnings.jsonl."""
        for line in lines:
            self.print_line(line)
            self._warnings.write(line, time.time())

    def print_line(self, text: str) -> None:
        """Print a line on the console."""
        try:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            # If the launcher read it and is gone, the ranks will be asked to end: they must live to save.
            if not console_is_gone(error):  # the disk of a file is full, for example
                logger.warning("a line for the console is lost (%s); the run continues", error)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        self._bar.update(step - self._bar.n)

    def close(self, end: RunEnd) -> None:
        """Close the files and the bar, and the boards in the state `end`."""
        self._bar.close()
        try:
            self._metrics.close()
        except OSError as error:
            logger.warning("METRICS LOST: the last lines of %s (%s)", self._metrics.path, error)
        self.close_boards(end)
        logger.removeHandler(self._warnings)

    def close_boards(self, end: RunEnd) -> None:
        """Close the boards in the state `end`; from any thread, and once."""
        close_boards(self._boards, end)


def open_run_log(
    run: RunConfig,
    first_step: int,
    config: Mapping[str, Any] | None = None,
    machine: Mapping[str, Any] | None = None,
) -> RunLog:
    """Open the log of a run; next to it write the run file, DeepSpeed's `config` and a line on the `machine`.

    After a restart the first metrics are those of the run's time, by the supervisor.

    Raises:
        UserError: the folder is not writable, or the package of a board is not installed.
    """
    try:
        log = RunLog(run, first_step)
        write_atomically(os.path.join(run.run_dir, RUN_FILE), dump(run))
        if config is not None:
            write_atomically(os.path.join(run.run_dir, DEEPSPEED), json.dumps(config, indent=2))
        if machine is not None:
            path = os.path.join(run.run_dir, MACHINES)
            drop_steps_after(path, first_step)
            with open(path, "a") as file:
                file.write(json.dumps({"step": first_step, **machine}) + "\n")
    except OSError as error:
        raise UserError(
            f"{run.run_dir}: cannot write the run's files ({error}); set output_dir to a writable folder"
        ) from None
    job = current(os.environ)
    if job and job.accounts:
        log.record_accounts(first_step, job.accounts)
    return log


def drop_steps_after(path: str, step: int) -> None:
    """Drop the lines of steps after `step` from a JSON Lines file: a run resumed at `step` writes them again.

    A damaged line stays, for reports to count; the last one is dropped if a kill cut it off.
    """
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        lines = [line for line in file if line.endswith(b"\n") and _step(line, step) <= step]
    with atomic_file(path) as file:
        file.writelines(lines)


def _step(line: bytes, otherwise: int) -> int:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return otherwise
    return step if isinstance(step, int) else otherwise
