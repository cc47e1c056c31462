"""What a run has recorded in its folder: metrics.jsonl, tasks.jsonl, samples.jsonl, warnings.jsonl, run.yaml,
machines.jsonl and the event logs of its jobs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_ds.config.run_files import MACHINES, METRICS, RUN_FILE, SAMPLES, WARNINGS
from llama_ds.config.text import read_yaml
from llama_ds.errors import UserError

FOLLOWED = "tasks.jsonl"  # results of tools/evaluate.py --follow, which other hosts write


@dataclass(frozen=True)
class Curve:
    """One metric over the steps of a run; a value that was not finite is NaN or infinite."""

    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Records:
    """The records of one run."""

    name: str
    folder: str
    config: Mapping[str, Any]  # the resolved run file; {} if the folder has none
    curves: Mapping[str, Curve]  # by the name that metrics.jsonl gives them
    machines: Sequence[Mapping[str, Any]]  # a line for each start
    events: Sequence[Mapping[str, Any]]  # all jobs' events by time, each with its job's number
    warnings: Sequence[Mapping[str, Any]]  # what the first rank warned of: step, time, text
    samples: Sequence[Mapping[str, Any]]  # continuations of prompts: step, prompt, text
    norms: Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl that have norms of weights
    damaged: Mapping[str, int]  # lines that could not be read, by file; a last line without its end is no damage


def read_runs(folders: Sequence[str]) -> list[Records]:
    """Return the records of run folders, with distinct names.

    Raises:
        UserError: a folder is not that of a run, is named twice, or holds a file that cannot be read.
    """
    found: dict[str, Records] = {}
    for folder in folders:
        key = os.path.realpath(folder)
        if key in found:
            raise UserError(f"{folder}: named twice; give each run once")
        found[key] = read_run(folder)
    names = [records.name for records in found.values()]
    if len(set(names)) == len(names):
        return list(found.values())
    return [replace(records, name=records.folder) for records in found.values()]


def read_run(folder: str) -> Records:
    """Return the records of a run's folder.

    Raises:
        UserError: the folder has no metrics.jsonl, or a file cannot be read.
    """
    root, damaged = Path(folder), dict[str, int]()
    if not (root / METRICS).exists():
        raise UserError(f"{folder}: has no {METRICS}; give the folder of a run that has started, such as runs/NAME")
    config = read_yaml(str(root / RUN_FILE)) if (root / RUN_FILE).is_file() else {}
    events = []
    for path in sorted(root.glob("jobs/*/events.jsonl")):
        lines = _lines(path, "time", damaged)
        events += [{**line, "job": path.parent.name} for line in lines]
    norms: list[Mapping[str, Any]] = []
    steps = _with_norms_kept(_lines(root / METRICS, "step", damaged), norms)
    machines, samples, warnings = (
        list(_lines(root / name, "step", damaged)) if (root / name).is_file() else []
        for name in (MACHINES, SAMPLES, WARNINGS)
    )
    return Records(
        name=os.path.basename(os.path.realpath(folder)),
        folder=folder,
        config=config,
        curves=_with_followed(curves_of(steps), root / FOLLOWED, damaged),
        machines=machines,
        events=sorted(events, key=lambda event: event["time"]),
        warnings=[line for line in warnings if _is_number(line.get("time"))],
        samples=[line for line in samples if all(isinstance(line.get(key), str) for key in ("prompt", "text"))],
        norms=norms,
        damaged=damaged,
    )


def _with_norms_kept(lines: Iterator[dict[str, Any]], norms: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield all lines, and append to `norms` those that have norms of weights."""
    for line in lines:
        if _are_norms(line.get("norms")):
            norms.append(line)
        yield line


def _are_norms(value: object) -> bool:
    """Return whether a value has, by kind and role, a number or null for each layer."""
    return isinstance(value, dict) and all(
        isinstance(rows, dict)
        and all(isinstance(row, list) and all(x is None or _is_number(x) for x in row) for row in rows.values())
        for rows in (value.get("gradient"), *value.values())
    )


def curves_of(lines: Iterator[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return a curve for each name that has numbers."""
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps.setdefault(name, []).append(line["step"])
                values.setdefault(name, []).append(value)
    return {name: Curve(steps[name], values[name]) for name in steps}


def _with_followed(curves: dict[str, Curve], path: Path, damaged: dict[str, int]) -> dict[str, Curve]:
    """Return curves with the results of tasks in `path`; those of the run itself come first, then the latest."""
    if not path.is_file():
        return curves
    for name, found in curves_of(_lines(path, "step", damaged)).items():
        if name.startswith("tasks"):
            own = curves.get(name, Curve((), ()))
            points = dict(zip([*found.steps, *own.steps], [*found.values, *own.values], strict=True))
            curves[name] = Curve(sorted(points), [points[step] for step in sorted(points)])
    return curves


def training_hours(curves: Mapping[str, Curve]) -> Curve:
    """Return the hours that steps have taken up to each report: without starts, saves, evaluations and lost steps."""
    times = curves.get("step_s", Curve((), ()))
    total, before, found = 0.0, 0, []
    for step, seconds in zip(times.steps, times.values, strict=True):
        total, before = total + max(step - before, 0) * seconds / 3600, step
        found.append(total)
    return Curve(times.steps, found)


def _lines(path: Path, number: str, damaged: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file that have this number; count the other lines."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for text in file:
                line = _object(text)
                if line is not None and _is_number(line.get(number)):
                    yield line
                elif text.endswith("\n") and text.strip():
                    damaged[str(path)] = damaged.get(str(path), 0) + 1
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable for this user") from None


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
