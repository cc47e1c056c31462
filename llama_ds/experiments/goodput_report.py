"""The accounts of a run's time as text, as plain data, and as a timeline picture (SVG)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from html import escape
from typing import Any

import numpy as np

from llama_ds.experiments.attempts import RecordedAttempt
from llama_ds.experiments.goodput import PHASES, TRAINING, Goodput, TimeSpan

COLOURS = dict(
    zip(
        PHASES,
        (
            *("#2e8b57", "#a6d96a", "#4575b4", "#74add1", "#abd9e9", "#cccccc", "#d73027"),
            *("#f46d43", "#d6604d", "#fdae61", "#b2182b", "#fee090", "#8073ac", "#a03fc0", "#b2abd2"),
        ),
        strict=True,
    )
)
_WIDTH, _LEFT, _ROW, _TOP = 1000, 150, 22, 70  # pixels
_ROW_LENGTHS = (60, 300, 900, 3600, 6 * 3600, 86400, 7 * 86400)  # seconds
_MAX_ROWS = 62


def as_data(run: Goodput, window_s: float) -> dict[str, Any]:
    """Return the accounts as plain data; times in seconds."""
    return {
        "run": run.name,
        "jobs": run.jobs,
        "attempts": run.attempts,
        "wall_s": round(run.wall_s, 3),
        "effective_share": run.effective,
        "effective_share_sliding": run.sliding(window_s),
        "window_s": window_s,
        "phases_s": {name: round(seconds, 3) for name, seconds in run.phases.items()},
        "causes": {
            name: {"count": cause.count, "lost_steps": cause.lost_steps, "seconds": round(cause.seconds, 3)}
            for name, cause in run.causes.items()
        },
        "lost_steps": run.lost_steps,
        "failures": run.failures,
        "mtbf_s": run.mtbf_s,
        "failures_per_gpu_day": run.failures / run.gpu_days if run.gpu_days else None,
        "median_recovery_s": run.median_recovery_s,
        "strikes": {host: round(count, 3) for host, count in run.strikes.items()},
        "step_time_s": round(run.step_time_s, 3),
        "attempts_without_progress_events": run.unmarked,
        "damaged_lines": dict(run.damaged),
    }


def as_metrics(run: Goodput, window_s: float) -> dict[str, float]:
    """Return the accounts as metrics of the run."""
    found = {
        "effective_share": run.effective,
        "effective_share_sliding": run.sliding(window_s),
        "failures": float(run.failures),
        "lost_steps": float(run.lost_steps),
    }
    return found if run.mtbf_s is None else found | {"mtbf_s": run.mtbf_s}


def as_text(run: Goodput, window_s: float) -> str:
    """Return the accounts as text."""
    lines = [
        f"{run.name}: {run.attempts} attempts in {run.jobs} jobs, {duration(run.wall_s)}",
        f"effective training time: {run.effective:.1%}; {run.sliding(window_s):.1%} of the last "
        f"{duration(min(window_s, run.wall_s))}",
        f"lost steps: {run.lost_steps}",
        "",
        *(f"{name:12} {duration(s):>12} {s / run.wall_s:7.2%}   {PHASES[name]}" for name, s in run.phases.items()),
    ]
    if run.causes:
        lines += ["", "cause        count   lost steps         time"]
        lines += [
            f"{name:12} {cause.count:>5} {cause.lost_steps:>12} {duration(cause.seconds):>12}"
            for name, cause in run.causes.items()
        ]
    if run.mtbf_s is not None:
        recovery = run.median_recovery_s
        lines += [
            "",
            f"time between failures: {duration(run.mtbf_s)} on average"
            + (f", {run.failures / run.gpu_days:.3g} failures a rank and day" if run.gpu_days else ""),
            *([f"from a failure to the first step after it: {duration(recovery)} (median)"] if recovery else []),
        ]
    if run.strikes:
        named = ", ".join(f"{host} {count:.2f}" for host, count in itertools.islice(run.strikes.items(), 16))
        lines.append(f"strikes: {named}")
    return "\n".join(lines)


def remarks(run: Goodput) -> list[str]:
    """Return what the accounts leave out."""
    found = [f"{path}: {count} damaged lines are left out" for path, count in run.damaged.items()]
    if run.unmarked:
        found.append(
            f"{run.unmarked} attempts have no progress events: their launcher was older; their time counts as restore"
        )
    return found


def in_a_word(attempt: RecordedAttempt) -> str:
    """Return how an attempt ended, at which step and on which hosts."""
    return f"{attempt.kind} at step {attempt.step}" + (f": {', '.join(attempt.hosts)}" if attempt.hosts else "")


def duration(seconds: float) -> str:
    """Return a time in its largest units: "54 d 02 h", "3 h 05 min", "12.0 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, whole = divmod(hours, 24)
    if days:
        return f"{days} d {whole:02d} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def timeline(run: Goodput, window_s: float, background: str = "#ffffff") -> str:
    """Return the timeline of a run as an SVG: a row for each stretch of time, and a mark for each failure.

    Without a `background` it takes that of the page around it, whose text colour it has in either case.

    Each pixel shows the phase that takes most of its time, so that the size of the picture is bounded.
    """
    spans = run.spans
    begin, end = (spans[0].start, spans[-1].end) if spans else (0.0, 1.0)
    fitting = (n for n in _ROW_LENGTHS if (end - begin) / n <= _MAX_ROWS)
    length = min(float(next(fitting, _ROW_LENGTHS[-1])), max(end - begin, 1.0))
    rows = int(np.ceil((end - begin) / length)) if end > begin else 1
    shown = _dominant(spans, begin, length / _WIDTH, rows * _WIDTH).reshape(rows, _WIDTH)
    height = _TOP + rows * _ROW + 50 + 18 * len(run.phases)
    title = (
        f"{run.name}: effective training time {run.effective:.1%} of {duration(run.wall_s)}; "
        f"{run.sliding(window_s):.1%} of the last {duration(min(window_s, run.wall_s))}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + _LEFT + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="currentColor">',
        *([f'<rect width="100%" height="100%" fill="{background}"/>'] if background else []),
        f'<text x="10" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="10" y="44">{escape(_facts(run))}; a row is {duration(length)}; ▼ failure (point at it)</text>',
    ]
    for number, pixels in enumerate(shown):
        y = _TOP + number * _ROW
        at = datetime.fromtimestamp(begin + number * length, timezone.utc).isoformat(" ", "seconds")[:19]
        parts.append(f'<text x="10" y="{y + 14}">{at}</text>')
        parts += _row(pixels, y)
    for attempt in run.incidents:
        row, x = divmod((attempt.stopped - begin) / length * _WIDTH, _WIDTH)
        y = int(_TOP + min(row, rows - 1) * _ROW)
        words = in_a_word(attempt)
        parts.append(f'<text x="{_LEFT + x - 5:.1f}" y="{y + 2}" font-size="10">▼<title>{escape(words)}</title></text>')
    return "\n".join([*parts, *_legend(run, _TOP + rows * _ROW + 24), "</svg>\n"])


def _facts(run: Goodput) -> str:
    mtbf = f"one every {duration(run.mtbf_s)}" if run.mtbf_s is not None else "none"
    return f"{run.attempts} attempts, {run.failures} failures ({mtbf}), {run.lost_steps} lost steps"


def _dominant(spans: Sequence[TimeSpan], begin: float, pixel: float, count: int) -> np.ndarray:
    """Return for each pixel the number of the phase with the most time in it, -1 for none."""
    names = list(PHASES)
    seconds = np.zeros((len(names), count + 1))
    for span in spans:
        first, last = (span.start - begin) / pixel, (span.end - begin) / pixel
        low, high = min(max(int(first), 0), count - 1), min(max(int(last), 0), count - 1)
        line = seconds[names.index(span.phase)]
        if low == high:
            line[low] += last - first
        else:
            line[low] += low + 1 - first
            line[low + 1 : high] += 1
            line[high] += min(last, count) - high
    seconds = seconds[:, :count]
    return np.where(seconds.max(0) > 0, seconds.argmax(0), -1)


def _row(row: np.ndarray, y: int) -> Iterator[str]:
    names = list(PHASES)
    x = 0
    for value, group in itertools.groupby(row.tolist()):
        width = len(list(group))
        if value >= 0:
            colour = COLOURS[names[value]]
            yield f'<rect x="{_LEFT + x}" y="{y + 3}" width="{width}" height="{_ROW - 6}" fill="{colour}"/>'
        x += width


def _legend(run: Goodput, y: int) -> Iterator[str]:
    for number, (name, seconds) in enumerate(run.phases.items()):
        at = y + 18 * number
        share = seconds / run.wall_s
        weight = ' font-weight="bold"' if name == TRAINING else ""
        yield f'<rect x="{_LEFT}" y="{at}" width="12" height="12" fill="{COLOURS[name]}"/>'
        yield (
            f'<text x="{_LEFT + 20}" y="{at + 10}"{weight}>{name} {share:.2%}, {duration(seconds)}: '
            f"{escape(PHASES[name])}</text>"
        )
