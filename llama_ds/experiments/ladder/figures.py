"""Figures of a ladder as SVG text: the only importer of matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np

matplotlib.use("svg")  # no display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llama_ds.experiments.ladder.execute import Measured
from llama_ds.experiments.ladder.law import Fit

STYLE = {"svg.hashsalt": "ladder", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
WINDOW = 0.02  # share of a run that one point of its smoothed curve averages


def draw(paint: Callable[[Axes], None], title: str, across: str, up: str) -> str:
    """Return the SVG of one panel; the same numbers give the same text."""

    def titled(axes: Axes) -> None:
        paint(axes)
        axes.set(title=title, xlabel=across, ylabel=up)

    return draw_panels([[titled]], (7.2, 4.4))


def draw_panels(
    rows: Sequence[Sequence[Callable[[Axes], None]]], size: tuple[float, float] = (3.6, 3.0), share: str = "none"
) -> str:
    """Return the SVG of a grid of panels of `size` inches; the same numbers give the same text.

    `share`: which panels have one y axis: those of a "row", those of a column ("col"), or "none".
    """
    columns = len(rows[0])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False, sharey=share)  # type: ignore[call-overload]
        for paint, axes in zip((paint for row in rows for paint in row), grid.flat, strict=True):
            paint(axes)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=9)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def gradation(count: int) -> list[str]:
    """Return colors of increasing darkness."""
    levels = np.linspace(0.35, 1.0, count)
    return [matplotlib.colors.to_hex(matplotlib.colormaps["Blues"](level)) for level in levels]


def size_name(parameters: float) -> str:
    """Return a size as in 6.7B, 363K."""
    for unit, word in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{word}"
    return f"{parameters:.0f}"


def training_loss(runs: Sequence[Measured]) -> str:
    """Return figure 1 of the LLaMA paper: training loss over tokens, the longest run of each size."""

    def paint(axes: Axes) -> None:
        for parameters, one in longest(runs):
            tokens = np.array(one.curve.steps) * one.rung.batch_tokens
            axes.plot(tokens, smoothed(np.array(one.curve.values)), label=size_name(parameters), linewidth=1.4)

    return draw(paint, "Training loss over tokens", "tokens", "training loss (nats per token)")


def benchmarks(runs: Sequence[Measured]) -> str:
    """Return figure 2 of the LLaMA paper: accuracies over tokens, of the longest run of each size."""
    chosen = longest(runs)

    def panel(task: str) -> Callable[[Axes], None]:
        def paint(axes: Axes) -> None:
            for parameters, one in chosen:
                if curve := one.tasks.get(task):
                    tokens = np.array(curve.steps) * one.rung.batch_tokens
                    percent = 100 * np.array(curve.values)
                    axes.plot(tokens, percent, ".-", label=size_name(parameters), linewidth=1.4)
            axes.set(title=task, xlabel="tokens", ylabel="accuracy (percent)")

        return paint

    panels = [panel(task) for task in dict.fromkeys(task for _, one in chosen for task in one.tasks)]
    width = min(3, len(panels))
    blank = [lambda axes: axes.set_axis_off()] * (-len(panels) % width)
    every = [*panels, *blank]
    return draw_panels([every[start : start + width] for start in range(0, len(every), width)])


def longest(runs: Sequence[Measured]) -> list[tuple[int, Measured]]:
    """Return the parameters and the longest run of each size, of several seeds the first, the smallest size first."""
    found: dict[int, Measured] = {}
    for one in sorted(runs, key=lambda one: -one.rung.run.training.tokens):
        found.setdefault(one.rung.parameters, one)
    return sorted(found.items())


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return trailing means over `WINDOW` of the run; the first points average what there is."""
    width = max(1, round(len(values) * WINDOW))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def loss_over_flops(runs: Sequence[Measured], fit: Fit | None) -> str:
    """Return final losses over FLOPs, with the law's best loss for each budget, and predicted sizes as crosses."""

    def paint(axes: Axes) -> None:
        for predicted, mark, label in ((False, "o", "measured"), (True, "x", "measured after its prediction")):
            found = [one for one in runs if one.rung.predicted is predicted]
            if found:
                axes.plot([one.rung.flops for one in found], [one.loss for one in found], mark, label=label)
        if fit:
            budgets = np.geomspace(min(one.rung.flops for one in runs), 2 * max(one.rung.flops for one in runs), 60)
            best = [fit.law.loss(*fit.law.optimal(budget)) for budget in budgets]
            axes.plot(budgets, best, "--", color="gray", label="the law's optimum for 6 N D FLOPs")
        axes.set_xscale("log")

    return draw(paint, "Loss over training compute", "FLOPs", "validation loss (nats per token)")


def iso_flop(runs: Sequence[Measured]) -> str:
    """Return the loss over parameters, a curve for each FLOP budget, with a parabola in log N where three sizes are."""

    def paint(axes: Axes) -> None:
        for budget in sorted({one.rung.budget for one in runs}):
            found = sorted((one.rung.parameters, one.loss) for one in runs if one.rung.budget == budget)
            sizes, losses = np.array(found).T
            (line,) = axes.plot(sizes, losses, "o", label=f"{budget:.2g} FLOPs")
            if len(sizes) >= 3:
                across = np.geomspace(sizes[0], sizes[-1], 60)
                parabola = np.polyfit(np.log(sizes), losses, 2)
                axes.plot(across, np.polyval(parabola, np.log(across)), color=line.get_color(), linewidth=1)
        axes.set_xscale("log")

    return draw(paint, "IsoFLOP curves", "parameters", "validation loss (nats per token)")


def sweep(runs: Sequence[Measured], key: str) -> str:
    """Return the loss over the swept option, a curve of the seeds' means for each size and budget."""

    def paint(axes: Axes) -> None:
        cells = sorted({(one.rung.parameters, one.rung.budget) for one in runs})
        for parameters, budget in cells:
            here = [one for one in runs if (one.rung.parameters, one.rung.budget) == (parameters, budget)]
            losses = {one.rung.value or 0.0: list[float]() for one in here}
            for one in here:  # each seed has a run of each value
                losses[one.rung.value or 0.0].append(one.loss)
            found = sorted((value, float(np.mean(each))) for value, each in losses.items())
            (line,) = axes.plot(*np.array(found).T, "-", label=f"{size_name(parameters)}, budget {budget:g}")
            points = [(value, loss) for value, each in losses.items() for loss in each]
            axes.plot(*np.array(points).T, "o", color=line.get_color())
        axes.set_xscale("log")

    return draw(paint, f"Sweep of {key}", key, "validation loss (nats per token)")
