"""Runs measurements in separate processes, interleaved so that load on the machine affects all of them alike."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ds.benchmarks.data import rivals
from llama_ds.errors import UserError

ROOT = Path(__file__).resolve().parents[3]  # folder from which `llama_ds` is imported
PROBE = (sys.executable, "-m", "llama_ds.benchmarks.data.probe")
ONE_CORE = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ERROR_CHARS = 2000  # length of the stderr tail in errors
USER_ERROR = f"{UserError.__module__}.{UserError.__qualname__}: "  # how a traceback ends with one
SLOW_S = 30.0  # slower contestants are measured once unless `repeat_slow`

Result = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """A program and its request."""

    command: Sequence[str]
    request: Mapping[str, Any]
    limit_s: float | None = None  # time after which the process is killed

    def measure(self) -> Result:
        """Run it in a fresh process and return what it measured.

        Raises:
            UserError: its interpreter cannot be started, or the user's input is at fault.
            RuntimeError: it failed, or gave no answer.
        """
        request = {**self.request, "began": time.monotonic()}
        environment = {**os.environ, **ONE_CORE, "PYTHONPATH": str(ROOT)}
        if self.command[0] != sys.executable:
            del environment["PYTHONPATH"]
        try:
            done = subprocess.run(
                [*self.command, json.dumps(request)],
                stdin=subprocess.DEVNULL, env=environment, capture_output=True, text=True, check=False,
                timeout=self.limit_s,
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"{self.command[0]}: cannot be started ({error.strerror}); give the path of a Python interpreter"
            ) from None
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{' '.join(self.command)}: gave no answer within {self.limit_s:g} s") from None
        *_, last = ["", *done.stderr.splitlines()]
        if done.returncode and last.startswith(USER_ERROR):
            raise UserError(last.removeprefix(USER_ERROR))
        if done.returncode:
            raise RuntimeError(f"{' '.join(self.command)}: exit code {done.returncode}\n{done.stderr[-ERROR_CHARS:]}")
        try:
            return dict(json.loads(done.stdout.splitlines()[-1]))
        except (ValueError, TypeError, IndexError):
            shown = done.stdout[-ERROR_CHARS:].strip() or "nothing"
            raise RuntimeError(f"{' '.join(self.command)}: printed no measurement\n{shown}") from None


def ours(task: str, **request: Any) -> Contestant:
    """Return a measurement of llama_ds (`probe.py`)."""
    return Contestant(PROBE, {"task": task, **request})


def rival(python: str, task: str, **request: Any) -> Contestant:
    """Return a measurement of another library (`rivals.py`) by an interpreter that has it."""
    return Contestant((python, str(Path(rivals.__file__).resolve())), {"task": task, **request})


def interleave(
    contestants: Mapping[str, Contestant], repeats: int, tick: Callable[[str], object], repeat_slow: bool = True
) -> dict[str, list[Result]]:
    """Measure every contestant `repeats` times in turns; `tick` is called with its name before each measurement.

    Unless `repeat_slow`, contestants whose process takes longer than SLOW_S are measured once.
    """
    results: dict[str, list[Result]] = {name: [] for name in contestants}
    slow: set[str] = set()
    for _ in range(repeats):
        for name, contestant in contestants.items():
            if name in slow and not repeat_slow:
                continue
            tick(name)
            start = time.monotonic()
            results[name].append(contestant.measure())
            if time.monotonic() - start > SLOW_S:
                slow.add(name)
    return results


def summary(values: Iterable[float], name: str) -> dict[str, float]:
    """Return the median, minimum and maximum of values, as plain data under `name`."""
    found = list(values)
    return {f"median_{name}": statistics.median(found), f"min_{name}": min(found), f"max_{name}": max(found)}


def median(results: Iterable[Result], *path: str) -> float:
    """Return the median of a number in all results."""
    return statistics.median(_at(result, path) for result in results)


def _at(result: Any, path: Sequence[str]) -> float:
    for key in path:
        result = result[key]
    return result
