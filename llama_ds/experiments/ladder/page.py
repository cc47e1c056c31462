"""Writes a ladder's figures as SVG files and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from llama_ds.config.text import save_text
from llama_ds.errors import UserError
from llama_ds.experiments.ladder import figures
from llama_ds.experiments.ladder.execute import Measured
from llama_ds.experiments.ladder.law import Fit
from llama_ds.experiments.ladder.plan import Rung
from llama_ds.experiments.ladder.results import finished, fit_text, fitted, losses_text
from llama_ds.experiments.ladder.spec import Ladder

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222;background:#fff}}
pre{{overflow-x:auto;white-space:pre-wrap}} svg{{max-width:100%;height:auto}}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def write_report(ladder: Ladder, rungs: Sequence[Rung]) -> tuple[list[str], list[str]]:
    """Write the figures and the page; return their paths, and remarks on what is missing.

    Raises:
        UserError: no run is finished, or a file cannot be written.
    """
    runs, remarks = finished(rungs), []
    if not runs:
        raise UserError(f"{ladder.root}: no run of this ladder is finished; start `tools/ladder.py run` first")
    if len(runs) < len(rungs):
        remarks.append(f"{len(rungs) - len(runs)} of {len(rungs)} runs are not finished and not shown")
    fit: Fit | None = None
    if ladder.sweep is None:
        try:
            fit = fitted(rungs)
        except UserError as error:
            remarks.append(f"no law is drawn: {error}")
    pictures = _pictures(ladder, runs, fit)
    paths = [f"{ladder.root}/{name}.svg" for name in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        save_text(path, picture)
    # A page takes an SVG element, but not the XML declaration and the document type before it.
    parts = [picture[picture.index("<svg") :] for picture in pictures.values()]
    texts = [losses_text(ladder, rungs), *([fit_text(fit, rungs)] if fit else []), *remarks]
    body = "\n".join([*parts, *(f"<pre>{escape(text)}</pre>" for text in texts)])
    page = f"{ladder.root}/ladder.html"
    save_text(page, PAGE.format(title=escape(f"Scaling ladder {ladder.name}"), body=body))
    return [*paths, page], remarks


def _pictures(ladder: Ladder, runs: Sequence[Measured], fit: Fit | None) -> dict[str, str]:
    if ladder.sweep:
        return {"sweep": figures.sweep(runs, ladder.sweep.key)}
    found = {"figure1": figures.training_loss(runs), "loss_over_flops": figures.loss_over_flops(runs, fit)}
    if any(one.tasks for one in runs):
        found["figure2"] = figures.benchmarks(runs)
    if ladder.flops:
        found["iso_flop"] = figures.iso_flop([one for one in runs if not one.rung.predicted])
    return found
