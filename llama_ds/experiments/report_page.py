"""The report on runs as one self-contained HTML page: tables in HTML, curves drawn by report.js, no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llama_ds.config.text import dump_yaml

_HERE = Path(__file__).parent


def page(data: Mapping[str, Any], live_s: int = 0) -> str:
    """Return the page of `report_data.page_data`; one that is served asks for new data every `live_s` seconds."""
    names = [run["name"] for run in data["runs"]]
    title = " / ".join(names)
    summary = [f"<p>made {escape(data['made'])}</p>"]
    summary += [f'<p class="note">{escape(note)}</p>' for note in data["notes"]]
    summary.append(_facts(data["runs"]))
    live = f' data-live="{live_s}"' if live_s else ""
    curves = {
        "panels": data["panels"],
        "runs": [{k: run[k] for k in ("name", "axes", "curves", "marks")} for run in data["runs"]],
    }
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{(_HERE / "report.css").read_text()}</style></head>'
        f"<body{live}>\n<h1>{escape(title)}</h1>\n"
        f'<div id="summary">{"".join(summary)}</div>\n{_CONTROLS}\n<div class="panels"></div>\n'
        f'<div id="rest">{"".join(_rest(data, names))}</div>\n'
        f'<script type="application/json" id="data">{_script(curves)}</script>\n'
        f"<script>{(_HERE / 'report.js').read_text()}</script>\n</body></html>\n"
    )


_CONTROLS = (
    '<div class="bar"><label>over <select id="axis"><option value="step">steps</option>'
    '<option value="tokens">tokens</option><option value="hours">hours of steps</option></select></label>'
    '<label>smooth <input type="range" id="smooth" min="0" max="0.99" step="0.01" value="0"></label>'
    '<label><input type="checkbox" id="log"> logarithmic losses and norms</label>'
    '<button id="reset">whole range</button>'
    "<label>drag to zoom, double-click for the whole range</label></div>"
    "<noscript><p>The curves need JavaScript.</p></noscript>"
)


def _rest(data: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    parts = []
    if data["tasks"]:
        parts += ["<h2>Benchmarks, last results</h2>", _tasks(data["tasks"], names)]
    if data["samples"]:
        parts += ["<h2>Samples</h2>", '<div class="scroll">', _samples(data["samples"]), "</div>"]
    for found in data["norms"]:
        parts.append(f"<h2>Norms of layers of {escape(found['run'])}</h2>")
        parts += [f'<p class="note">{escape(text)}</p>' for text in found["spikes"]]
        parts += [f'<div class="scroll">{svg}</div>' for svg in found["maps"]]
    for found in data["goodput"]:
        parts.append(f"<h2>Where the time of {escape(found['run'])} went</h2>")
        parts += [f'<p class="note">{escape(text)}</p>' for text in found["remarks"]]
        parts.append(_plain_table(("phase", "time", "share", ""), found["phases"]))
        if found["causes"]:
            parts.append(_plain_table(("failure", "count", "lost steps", "time"), found["causes"]))
        parts.append(f'<div class="scroll">{found["timeline"]}</div>')
    if data["events"]:
        parts += ["<h2>Events and warnings</h2>", '<div class="scroll">', _events(data["events"]), "</div>"]
    if data["differences"]:
        rows = [[escape(cell) for cell in row] for row in data["differences"]]
        parts += ["<h2>Settings that differ</h2>", _table(["", *map(escape, names)], rows)]
    for run in data["runs"]:
        if run["config"]:
            text = escape(dump_yaml(run["config"]))
            parts.append(f"<h2>Settings of {escape(run['name'])}</h2><details><summary>run.yaml</summary>")
            parts.append(f"<pre>{text}</pre></details>")
    return parts


def _facts(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a column for each run and a row for each fact that any run has."""
    known = [dict(run["facts"]) for run in runs]
    labels = dict.fromkeys(label for facts in known for label in facts)
    rows = [[f"<b>{escape(label)}</b>", *(escape(facts.get(label, "")) for facts in known)] for label in labels]
    return _table(["", *(f"{escape(run['name'])}<br>{escape(run['folder'])}" for run in runs)], rows)


def _tasks(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    cells = {(row["task"], row["run"]): row for row in results}
    rows = []
    for task in dict.fromkeys(row["task"] for row in results):
        shown = []
        for name in names:
            row = cells.get((task, name))
            error = "" if row is None or row["stderr"] is None else f" ± {100 * row['stderr']:.1f}"
            shown.append("" if row is None else f"{100 * row['accuracy']:.1f}{error} at step {row['step']:,}")
        rows.append([escape(task), *shown])
    return _table(["", *map(escape, names)], rows)


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of continuations; the prompt is dimmed, and white space is kept."""
    rows = [
        [
            escape(row["run"]),
            f"{row['step']:,}",
            f'<span class="text"><i>{escape(row["prompt"])}</i>{escape(row["text"])}</span>',
        ]
        for row in samples
    ]
    return _table(("run", "step", "prompt and continuation"), rows)


def _plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _table(head, [[escape(cell) for cell in row] for row in rows])


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    keys = ("at", "run", "job", "event", "step", "text")
    rows = [[escape("" if event[key] is None else str(event[key])) for key in keys] for event in events]
    return _table(list(keys), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>" + "\n".join(lines) + "</table>"


def _script(value: object) -> str:
    """Return JSON that cannot end the script element that it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
