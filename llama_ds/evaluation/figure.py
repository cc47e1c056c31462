"""Benchmarks over the tokens of training, as figure 2 of the LLaMA paper: a self-contained SVG, one panel a task."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from llama_ds.config.run_files import METRICS
from llama_ds.errors import UserError, did_you_mean
from llama_ds.evaluation.follow import RESULTS, result_lines
from llama_ds.evaluation.suite import TASKS

COLOURS = ("#4e79a7", "#e15759", "#59a14f", "#f28e2b", "#b07aa1", "#76b7b2")
COLUMNS, WIDTH, HEIGHT = 3, 250.0, 150.0  # panels of a row, and the size of a panel's axes
LEFT, TOP, GAP_X, GAP_Y = 48.0, 56.0, 116.0, 62.0
UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))  # on the axis of tokens
LABEL = 10.0  # height of the label of a reference line

# Tables 3 to 9 of arXiv 2302.13971: NaturalQuestions and TriviaQA with 5 shots, MATH and GSM8k without voting, pass@1.
PAPER, PAPER_RESULTS = "paper", Path(__file__).with_name("paper_results.json")

Curves = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]  # task -> run -> (tokens, percent)
References = Mapping[str, Mapping[str, float]]  # task -> name -> percent


def read_curves(runs: Sequence[str]) -> Curves:
    """Return the accuracies in the metrics.jsonl of run folders, and in what was evaluated beside them.

    Raises:
        UserError: a run has no metrics, or none of tasks.
    """
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run in runs:
        path, name = os.path.join(run, METRICS), os.path.basename(os.path.normpath(run))
        beside = os.path.join(run, RESULTS)
        if not os.path.exists(path) and not os.path.exists(beside):
            raise UserError(f"{path}: missing; give the folder of a run, runs/NAME")
        every = (*result_lines(path), *result_lines(beside))
        lines = [line for line in every if isinstance(line.get("tasks_tokens"), int | float)]
        if not lines:
            raise UserError(f"{path}: has no results of tasks; set evaluation.tasks in the run file, and train")
        found: dict[str, dict[float, float]] = {}
        for line in lines:
            for key, value in line.items():
                if key.startswith("tasks/") and isinstance(value, int | float):
                    found.setdefault(key.removeprefix("tasks/"), {})[line["tasks_tokens"]] = 100 * value
        for task, points in found.items():
            curves.setdefault(task, {})[name] = sorted(points.items())
    return curves


def read_references(path: str) -> References:
    """Return the reference lines of a JSON file {"TASK": {"NAME": PERCENT}}; "paper": those of the LLaMA paper.

    Raises:
        UserError: the file is missing or not of this form, or a task is unknown.
    """
    try:
        with open(PAPER_RESULTS if path == PAPER else path, encoding="utf-8") as file:
            content = json.load(file)
        found = {task: {name: _percent(value) for name, value in lines.items()} for task, lines in content.items()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a JSON file, or the word {PAPER}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: not of the form {{"TASK": {{"NAME": PERCENT}}}} ({error})') from None
    for task in found:
        if task not in TASKS:
            raise UserError(f"{path}: task {task!r}: unknown{did_you_mean(task, list(TASKS))}; use names of tasks")
    return found


def _percent(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise ValueError(f"{value!r} is not a number from 0 to 100")
    return float(value)


def figure(curves: Curves, references: References) -> str:
    """Return the SVG: a panel for each task, a curve for each run, a dashed line for each reference."""
    runs = list(dict.fromkeys(run for panel in curves.values() for run in panel))
    colours = {run: COLOURS[i % len(COLOURS)] for i, run in enumerate(runs)}
    last = max((x for panel in curves.values() for points in panel.values() for x, _ in points), default=1.0)
    rows = -(-len(curves) // COLUMNS)
    width = LEFT + COLUMNS * (WIDTH + GAP_X)
    height = TOP + rows * (HEIGHT + GAP_Y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for i, run in enumerate(runs):
        x = LEFT + 160 * i
        parts.append(f'<line x1="{x}" x2="{x + 20}" y1="14" y2="14" stroke="{colours[run]}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 26}" y="18">{escape(run)}</text>')
    for i, (task, panel) in enumerate(curves.items()):
        origin = LEFT + i % COLUMNS * (WIDTH + GAP_X), TOP + i // COLUMNS * (HEIGHT + GAP_Y)
        parts += _panel(origin, task, panel, references.get(task, {}), last, colours)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    origin: tuple[float, float],
    task: str,
    panel: Mapping[str, Sequence[tuple[float, float]]],
    references: Mapping[str, float],
    last: float,
    colours: Mapping[str, str],
) -> list[str]:
    left, top = origin
    values = [*references.values(), *(y for points in panel.values() for _, y in points)]
    low = 10 * math.floor(min(values) / 10)
    high = max(10 * math.ceil(max(values) / 10), low + 10)

    def height_of(percent: float) -> float:
        return top + (high - percent) / (high - low) * HEIGHT

    parts = [f'<text x="{left + WIDTH / 2:.1f}" y="{top - 8:.1f}" text-anchor="middle">{escape(task)}</text>']
    for mark in range(low, high + 1, 10 if high - low <= 50 else 20):
        y = height_of(mark)
        parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{mark}</text>')
    for part in (0.0, 0.5, 1.0):
        x = left + part * WIDTH
        size, unit = next(((size, unit) for size, unit in UNITS if last >= size), (1.0, ""))
        tokens = f"{part * last / size:.3g}{unit}"
        parts.append(f'<text x="{x:.1f}" y="{top + HEIGHT + 16:.1f}" text-anchor="middle">{tokens}</text>')
    ordered = sorted(references.items(), key=lambda line: line[1])
    for (name, percent), label in zip(ordered, _apart([height_of(percent) for _, percent in ordered]), strict=True):
        y, right = height_of(percent), left + WIDTH
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#555" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{right + 4}" y="{label + 3:.1f}" font-size="9" fill="#555">{escape(name)}</text>')
    for run, points in panel.items():
        line = " ".join(f"{left + x / last * WIDTH:.1f},{height_of(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[run]}" stroke-width="1.5"/>')
        for x, y in points:
            where = f'cx="{left + x / last * WIDTH:.1f}" cy="{height_of(y):.1f}"'
            title = f"<title>{escape(run)}, {x:,.0f} tokens: {y:.1f}</title>"
            parts.append(f'<circle {where} r="2.5" fill="{colours[run]}">{title}</circle>')
    return parts


def _apart(heights: Sequence[float]) -> list[float]:
    """Return heights of labels, at least `LABEL` apart and around those of their lines, which go from low to high."""
    found: list[float] = []
    for y in heights:
        found.append(min(y, found[-1] - LABEL) if found else y)
    return [label + (heights[-1] - found[-1]) / 2 for label in found]
