"""Ranks that DeepSpeed's launcher has started."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from typing import Any, Protocol

from llama_ds.job.folder import Job
from llama_ds.launch.command import Command, runner_environment


class StartedRanks(Protocol):
    """What has started the ranks of an attempt."""

    name: str

    def begin(self) -> dict[str, Any]:
        """Start the ranks; return what the event log says of it."""

    def poll(self) -> int | None:
        """Return its exit code, None while it runs; 0 if all ranks have exited cleanly."""

    def has_exited(self, rank: int) -> bool:
        """Return whether it knows that a rank has exited."""

    def stop(self) -> None:
        """Let no more ranks start, before those that have are killed."""

    def kill(self) -> None:
        """End what is left of it."""


class DeepSpeedRanks:
    """DeepSpeed's runner, with its output in the launcher's log."""

    name = "DeepSpeed's launcher"

    def __init__(self, job: Job, command: Command) -> None:
        self._job, self._command = job, command
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> dict[str, Any]:
        """Start the runner; return its process id."""
        with open(self._job.launcher_log, "wb") as log:
            self._process = subprocess.Popen(
                self._command.argv,
                env=runner_environment(self._command, os.environ, self._job.launcher),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._command.working_folder,
                start_new_session=True,
            )
        return {"pid": self._process.pid}

    def poll(self) -> int | None:
        """Return the runner's exit code, None while it runs."""
        return self._process.poll() if self._process else None

    def has_exited(self, rank: int) -> bool:
        """Return False: it does not say so."""
        return False

    def stop(self) -> None:
        """Do nothing: ranks are found and killed however far the start is."""

    def kill(self) -> None:
        """Kill the runner with its process group."""
        if self._process:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
