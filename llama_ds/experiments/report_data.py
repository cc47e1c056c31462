"""The data of a report on runs: panels of curves, facts, events and differences, as plain JSON."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from statistics import median
from typing import Any

from llama_ds.config.differences import differences, shown
from llama_ds.experiments.goodput import PHASES, TRAINING, Goodput, goodput
from llama_ds.experiments.goodput_report import in_a_word, remarks, timeline
from llama_ds.experiments.norm_map import heat_map
from llama_ds.experiments.records import Curve, Records, training_hours
from llama_ds.launch.supervise.norm_rises import first_rise, in_words, spikes
from llama_ds.perf.plan.cost import CARBON, OVERHEAD

HOURS = "training hours"
PANELS = (  # title, unit, factor, names; a name that ends in / stands for all that begin with it, one line each
    ("Loss", "nats per token", 1, ("loss", "val_loss", "val_loss/")),
    ("Bits per byte", "validation", 1, ("bits_per_byte", "bits_per_byte/")),
    ("Learning rate", "", 1, ("lr",)),
    ("Gradient norm", "before clipping", 1, ("grad_norm",)),
    ("Throughput", "tokens/s/GPU", 1, ("tokens_per_s_per_gpu",)),
    ("Utilisation", "percent of peak", 100, ("mfu", "hfu")),
    ("Wait for data", "seconds per step", 1, ("data_wait_s",)),
    ("Imbalance of a ring", "attention of the slowest rank over the mean", 1, ("cp_imbalance",)),
    ("Peak memory", "GiB, fullest rank", 1, ("peak_mem_gib",)),
    ("Tokens read by source", "", 1, ("tokens/",)),
    ("Epochs by source", "", 1, ("epochs/",)),
)
# In other form on the page: axes, or the same as another curve.
NO_PANEL = {"tokens", "tokens_per_s", "step_s", "val_perplexity", "val_tokens", "tasks_tokens", HOURS}
NO_PANEL_OF = ("tasks_stderr/", "tasks_share/", "tasks_truncated/", "val_tokens/")
TASK = "tasks/"
NORM_KINDS = ("gradient", "update", "weight", "activation")
WINDOW_S, HALF_LIFE_S = 86400.0, 7 * 86400.0  # as in `tools/launch.py report`
MAX_EVENTS = 1000  # largest number of a run on the page
MAX_SAMPLES = 400  # lines of samples on the page, evenly over the run


def page_data(runs: Sequence[Records], power_w: float | None = None) -> dict[str, Any]:
    """Return all that the page shows; `power_w` is the power of a GPU in watts, for the energy."""
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    accounts = [(run, _accounts(run)) for run in runs]
    return {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "notes": list(notes(runs)),
        "panels": list(panels(names)),
        "runs": [_run(run, power_w, found) for run, found in accounts],
        "tasks": _tasks(runs),
        "samples": [row for run in runs for row in _samples(run)],
        "goodput": [_goodput(run, found) for run, found in accounts if found],
        "differences": setting_differences(runs),
        "norms": [_norms(run) for run in runs if run.norms],
        "events": [row for run in runs for row in _events(run)],
    }


def notes(runs: Sequence[Records]) -> Iterator[str]:
    """Yield what a reader of the curves must know: damaged lines, and why losses of these runs cannot be compared."""
    for run in runs:
        for path, count in run.damaged.items():
            yield f"{path}: {count} damaged line{'s' if count > 1 else ''} left out"
        if not run.config:
            yield f"{run.name}: no run.yaml, so its settings are unknown"
    known = [run for run in runs if run.config]
    for label, key in (("tokenizer", "tokenizer"), ("data sources", "sources"), ("row length", "seq_len")):
        values = [(run.name, run.config.get("data", {}).get(key)) for run in known]
        if any(value != values[0][1] for _, value in values):
            yield f"these runs differ in their {label}: losses per token of different data cannot be compared"


def panels(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the panels of these curves; curves that no panel names have one by the text before their first /."""
    rest = [name for name in names if name not in NO_PANEL and not name.startswith(NO_PANEL_OF)]
    for title, unit, factor, wanted in PANELS:
        found = [n for n in rest if any(n == w or (w.endswith("/") and n.startswith(w)) for w in wanted)]
        rest = [name for name in rest if name not in found]
        if found:
            yield {"title": title, "unit": unit, "factor": factor, "names": found}
    for name in (name for name in rest if name.startswith(TASK)):
        yield {"title": name.removeprefix(TASK), "unit": "accuracy, percent", "factor": 100, "names": [name]}
    others: dict[str, list[str]] = {}
    for name in (name for name in rest if not name.startswith(TASK)):
        others.setdefault(name.split("/")[0], []).append(name)
    for title, found in others.items():
        yield {"title": title, "unit": "", "factor": 1, "names": found}


def facts(run: Records, power_w: float | None = None, accounts: Goodput | None = None) -> Iterator[tuple[str, str]]:
    """Yield what a table says of a run: (name, value)."""
    total = run.config.get("training", {}).get("steps")
    last = max((curve.steps[-1] for curve in run.curves.values() if curve.steps), default=0)
    yield "Steps", f"{last:,}" + (f" of {total:,}" if isinstance(total, int) else "")
    for label, name, text in (
        ("Tokens", "tokens", "{:,.0f}"),
        ("Loss", "loss", "{:.4f}"),
        ("Validation loss", "val_loss", "{:.4f}"),
    ):
        if last_of := run.curves.get(name):
            yield label, text.format(last_of.values[-1]) + f" at step {last_of.steps[-1]:,}"
    yield from _validation(run)
    if curve := run.curves.get("val_loss"):
        best = min(range(len(curve.values)), key=lambda i: curve.values[i])
        yield "Lowest validation loss", f"{curve.values[best]:.4f} at step {curve.steps[best]:,}"
    for label, name, text in (
        ("Throughput, median", "tokens_per_s", "{:,.0f} tokens/s"),
        ("of one GPU", "tokens_per_s_per_gpu", "{:,.1f} tokens/s"),
        ("MFU, median", "mfu", "{:.1%}"),
    ):
        if rates := run.curves.get(name):
            yield label, text.format(median(rates.values))
    hours = training_hours(run.curves).values
    if hours:
        yield "Time of steps", _duration(hours[-1])
    yield from _jobs(run, hours[-1] if hours else 0.0, accounts)
    yield from _machines(run, hours[-1] if hours else 0.0, power_w)


def _validation(run: Records) -> Iterator[tuple[str, str]]:
    """Yield the last validation loss of each source, in bits per byte too, and the tokens that it counts."""
    for name in [name.partition("/")[2] for name in run.curves if name.startswith("val_loss/")]:
        texts = [
            text.format(curve.values[-1])
            for kind, text in (
                ("val_loss", "{:.4f}"),
                ("bits_per_byte", "{:.4f} bits per byte"),
                ("val_tokens", "{:,.0f} tokens"),
            )
            if (curve := run.curves.get(f"{kind}/{name}"))
        ]
        yield f"Validation loss of {name}", ", ".join(texts)


def _jobs(run: Records, hours: float, accounts: Goodput | None) -> Iterator[tuple[str, str]]:
    """Yield the time of supervised jobs and the share of it that went into steps that count."""
    if not run.events:
        return
    times: dict[str, list[float]] = {}
    for event in run.events:
        times.setdefault(event["job"], []).append(event["time"])
    wall = sum(max(found) - min(found) for found in times.values()) / 3600
    yield "Time of jobs", f"{_duration(wall)} in {len(times)}"
    if accounts:
        yield "Effective training time", f"{accounts.effective:.1%} of it"
        yield "Lost steps", f"{accounts.lost_steps:,}"
    elif 0 < hours <= wall:
        yield "Share of it in steps that count", f"{hours / wall:.1%}"
    yield "Restarts", str(sum(event.get("event") == "restart" for event in run.events))


def _machines(run: Records, hours: float, power_w: float | None) -> Iterator[tuple[str, str]]:
    if not run.machines:
        return
    for label, found in (
        ("Ranks", [f"{line.get('ranks', '?')} x {line.get('device', '?')}" for line in run.machines]),
        ("Software", [_versions(line.get("versions")) for line in run.machines]),
        ("Code", [_code(line.get("code")) for line in run.machines]),
        ("Command", [" ".join(line["command"]) for line in run.machines if line.get("command")]),
    ):
        if texts := [text for text in dict.fromkeys(found) if text]:
            yield label, "; ".join(texts)
    ranks = {line.get("ranks") for line in run.machines}
    if power_w is not None and len(ranks) == 1 and isinstance(count := ranks.pop(), int):
        kwh = hours * count * power_w / 1000 * OVERHEAD
        text = f"{kwh:,.3g} kWh, {kwh * CARBON:,.3g} kg CO2eq"
        yield "Energy of steps", f"{text} (GPU-hours x {power_w:g} W x PUE {OVERHEAD:g}; {CARBON:g} kg/kWh)"


def _versions(versions: object) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items()) if isinstance(versions, dict) else ""


def _code(code: object) -> str:
    if not isinstance(code, dict) or not code.get("commit"):
        return ""
    return f"commit {str(code['commit'])[:12]}" + (
        f" with the changes in {changes}" if (changes := code.get("changes")) else ""
    )


def _run(run: Records, power_w: float | None, accounts: Goodput | None) -> dict[str, Any]:
    curves = {**run.curves, HOURS: training_hours(run.curves)}
    axes: dict[tuple[int, ...], int] = {}
    encoded = {}
    for name, curve in curves.items():
        axis = axes.setdefault(tuple(curve.steps), len(axes))
        # Tokens exceed float32's whole numbers: they are an axis.
        encoded[name] = {"x": axis, "y": _encoded("d" if name in ("tokens", HOURS) else "f", curve.values)}
    return {
        "name": run.name,
        "folder": run.folder,
        "facts": list(facts(run, power_w, accounts)),
        "marks": [[one.step, in_a_word(one)] for one in accounts.incidents] if accounts else [],
        "axes": [_encoded("d", axis) for axis in axes],
        "curves": encoded,
        "config": run.config,
    }


def _encoded(kind: str, values: Sequence[float]) -> str:
    """Return numbers as base64 of float32 ("f") or float64 ("d"), little-endian on every machine that trains."""
    return base64.b64encode(array(kind, values).tobytes()).decode()


def _tasks(runs: Sequence[Records]) -> list[dict[str, Any]]:
    """Return the last result of each task and run."""
    found = []
    for run in runs:
        for name, curve in run.curves.items():
            if name.startswith(TASK) and curve.steps:
                task = name.removeprefix(TASK)
                error = run.curves.get(f"tasks_stderr/{task}", Curve((), ()))
                stderr = dict(zip(error.steps, error.values, strict=True)).get(curve.steps[-1])
                row = {"run": run.name, "task": task, "step": curve.steps[-1], "accuracy": curve.values[-1]}
                found.append(row | {"stderr": stderr})
    return found


def _samples(run: Records) -> list[dict[str, Any]]:
    """Return the samples of a run, the newest first; of many steps, some that are evenly spread and the last."""
    steps = sorted({line["step"] for line in run.samples}, reverse=True)
    prompts = max(1, len({line["prompt"] for line in run.samples}))
    stride = max(1, -(-len(steps) * prompts // MAX_SAMPLES))
    chosen = set(steps[::stride])
    rows = [{"run": run.name, **{key: line[key] for key in ("step", "prompt", "text")}} for line in run.samples]
    return sorted((row for row in rows if row["step"] in chosen), key=lambda row: -row["step"])


def _accounts(run: Records) -> Goodput | None:
    """Return where the time of a supervised run went, None if its events do not say when it trained."""
    found = goodput(run, HALF_LIFE_S) if run.events else None
    return found if found and found.phases.get(TRAINING) else None


def _goodput(run: Records, found: Goodput) -> dict[str, Any]:
    return {
        "run": run.name,
        "phases": [
            [name, _duration(seconds / 3600), f"{seconds / found.wall_s:.1%}", PHASES[name]]
            for name, seconds in found.phases.items()
        ],
        "causes": [
            [name, str(cause.count), f"{cause.lost_steps:,}", _duration(cause.seconds / 3600)]
            for name, cause in found.causes.items()
        ],
        "remarks": [line for line in remarks(found) if line.partition(":")[0] not in run.damaged],
        "timeline": timeline(found, WINDOW_S, background=""),
    }


def _norms(run: Records) -> dict[str, Any]:
    """Return the heat maps of a run's norms, and what rose before each of its loss spikes."""
    losses = run.curves.get("loss", Curve((), ()))
    return {
        "run": run.name,
        "maps": [heat_map(run.norms, kind) for kind in NORM_KINDS if kind in run.norms[-1]["norms"]],
        "spikes": [
            f"loss spike at step {spike.step:,}, {spike.loss:.4f} after {spike.before:.4f}: "
            f"{in_words(first_rise(run.norms, spike.step))}"
            for spike in spikes(losses.steps, losses.values)
        ],
    }


def setting_differences(runs: Sequence[Records]) -> list[list[str]]:
    """Return a row for each key in which a run differs from the first: the key, and the value of each run."""
    changed = [{key: (first, own) for key, first, own in differences(runs[0].config, run.config)} for run in runs]
    rows = []
    for key in dict.fromkeys(key for one in changed for key in one):
        first = next(one[key][0] for one in changed if key in one)
        rows.append([key, *(shown(one[key][1] if key in one else first) for one in changed)])
    return rows


def _events(run: Records) -> list[dict[str, Any]]:
    """Return the events of a run's jobs and its warnings by time; of very many, the last ones."""
    found = [event for event in run.events if event.get("event") != "progress"]
    found += [{**line, "event": "warning", "job": ""} for line in run.warnings]
    found.sort(key=lambda event: event["time"])
    left = [{"time": 0, "at": "", "job": "", "text": f"{len(found) - MAX_EVENTS:,} earlier ones are left out"}]
    return [_event(run, event) for event in [*(left if len(found) > MAX_EVENTS else []), *found[-MAX_EVENTS:]]]


def _event(run: Records, event: Mapping[str, Any]) -> dict[str, Any]:
    try:
        time = datetime.fromtimestamp(event["time"], timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):  # no year has it
        time = str(event["time"])
    return {
        "run": run.name,
        "at": str(event.get("at", time)),
        "job": event["job"],
        "event": str(event.get("event", "")),
        "step": event.get("step"),
        "text": str(event.get("text", "")),
    }


def _duration(hours: float) -> str:
    minutes, seconds = divmod(round(hours * 3600), 60)
    whole, minutes = divmod(minutes, 60)
    days, rest = divmod(whole, 24)
    return f"{days} d {rest} h" if days else f"{rest} h {minutes:02d} min" if rest else f"{minutes} min {seconds:02d} s"
