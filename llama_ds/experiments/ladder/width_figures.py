"""Figures and tables of a coordinate check and of a sweep of learning rates over widths, from their plain data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_ds.experiments.ladder.figures import draw_panels, gradation

TITLES = {"standard": "without muP", "mup": "with muP"}


def coordinates_figure(found: dict[str, Any]) -> str:
    """Return the SVG of a coordinate check: a panel for each kind of activation, a curve over widths for each step."""
    kinds = list(found["mean_abs"]["mup"])
    colors = gradation(found["steps"] + 1)

    def painter(how: str, kind: str) -> Callable[[Any], None]:
        def paint(axes: Any) -> None:
            for step, (color, values) in enumerate(
                zip(colors, zip(*found["mean_abs"][how][kind], strict=True), strict=True)
            ):
                shown = step in (0, 1, found["steps"])
                axes.plot(
                    found["widths"], values, "o-", color=color, ms=3, label=f"after {step} steps" if shown else None
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set(title=f"{kind}, {TITLES[how]}", xlabel="width", ylabel="mean |x|")

        return paint

    return draw_panels([[painter(how, kind) for kind in kinds] for how in TITLES], share="col")


def coordinates_text(found: dict[str, Any]) -> str:
    """Return the table of the slopes of log |x| over log width: before the first step, and after each."""
    steps = [f"{step:>7}" for step in range(found["steps"] + 1)]
    lines = ["slope of log mean |x| over log width, after steps", f"{'':34}{''.join(steps)}"]
    for how, title in TITLES.items():
        for kind, slopes in found["slopes"][how].items():
            lines.append(f"{title:13}{kind:21}" + "".join(f"{slope:7.2f}" for slope in slopes))
    return "\n".join(lines)


def sweep_figure(found: dict[str, Any]) -> str:
    """Return the SVG of a sweep: the loss over the learning rate, a curve for each width, its best rate marked."""
    colors = gradation(len(found["widths"]))

    def painter(how: str) -> Callable[[Any], None]:
        def paint(axes: Any) -> None:
            for width, color, losses, best in zip(
                found["widths"], colors, found["losses"][how], found["best"][how], strict=True
            ):
                points = [(rate, loss) for rate, loss in zip(found["rates"], losses, strict=True) if loss is not None]
                if not points:  # all have diverged
                    continue
                axes.plot(*zip(*points, strict=True), "o-", color=color, ms=3, label=f"width {width}")
                axes.plot([best], [dict(points)[best]], "*", color=color, ms=12)
            axes.set_xscale("log", base=2)
            axes.set(title=TITLES[how], xlabel="learning rate", ylabel="training loss (nats per token)")

        return paint

    return draw_panels([[painter(how) for how in TITLES]], (4.6, 3.8), "row")


def sweep_text(found: dict[str, Any]) -> str:
    """Return the table of losses, with the best of each width in brackets."""
    lines = [f"{'':13}{'width':>6}" + "".join(f"{rate:>10.3g}" for rate in found["rates"])]
    for how, title in TITLES.items():
        for width, losses, best in zip(found["widths"], found["losses"][how], found["best"][how], strict=True):
            cells = (
                f"{'-' if loss is None else f'[{loss:.4f}]' if rate == best else f'{loss:.4f} ':>10}"
                for rate, loss in zip(found["rates"], losses, strict=True)
            )
            lines.append(f"{title:13}{width:>6}" + "".join(cells))
    return "\n".join(lines)
