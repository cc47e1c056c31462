"""Tables of a ladder: its plan, its losses, and the law fitted to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_ds.config.text import save_text
from llama_ds.errors import UserError
from llama_ds.experiments.ladder.execute import Measured, measured
from llama_ds.experiments.ladder.law import LEVEL, Fit, Law, cheapest, fit_law
from llama_ds.experiments.ladder.plan import Rung
from llama_ds.experiments.ladder.spec import Ladder
from llama_ds.perf.plan.cost import Rates

PREDICTION = "prediction.json"


def plan_data(rungs: Sequence[Rung], paths: Sequence[str]) -> list[dict[str, Any]]:
    """Return what `plan` prints with --json."""
    return [
        {"name": rung.name, "run_file": path, "parameters": rung.parameters, "tokens": rung.run.training.tokens,
         "flops": rung.flops, "predicted": rung.predicted}
        for rung, path in zip(rungs, paths, strict=True)
    ]  # fmt: skip


def plan_text(rungs: Sequence[Rung]) -> str:
    """Return the runs as a table."""
    rows = [f"{'run':16}{'width':>6}{'heads':>6}{'ffn':>6}{'parameters':>12}{'tokens':>13}{'batch':>6}{'lr':>10}"]
    for rung in rungs:
        model, run = rung.run.model, rung.run
        shape = f"{model.hidden_size:6}{model.num_attention_heads:6}{model.intermediate_size:6}{rung.parameters:12,}"
        rest = f"{run.training.tokens:13,}{run.training.global_batch:6}{run.optimizer.lr:10.3g}"
        rows.append(f"{rung.name:16}{shape}{rest}{'  predicted' if rung.predicted else ''}")
    return "\n".join([*rows, f"{sum(rung.flops for rung in rungs):.3g} FLOPs in all"])


def results(rungs: Sequence[Rung]) -> list[dict[str, Any]]:
    """Return the losses of the finished runs."""
    return [
        {"name": one.rung.name, "parameters": one.rung.parameters, "tokens": one.rung.run.training.tokens,
         "flops": one.rung.flops, "val_loss": one.loss, "predicted": one.rung.predicted}
        for one in finished(rungs)
    ]  # fmt: skip


def finished(rungs: Sequence[Rung]) -> list[Measured]:
    """Return the finished runs."""
    return [found for rung in rungs if (found := measured(rung))]


def fitted(rungs: Sequence[Rung]) -> Fit:
    """Return the law fitted to the finished runs, without those of predicted sizes.

    Raises:
        UserError: the runs are too few, or a sweep, whose runs differ in more than size and tokens.
    """
    runs = [one for one in finished(rungs) if not one.rung.predicted]
    if any(one.rung.value is not None for one in runs):
        raise UserError("fit: the runs are a sweep of an option; fit a ladder without one, with the best value as base")
    sizes = [float(one.rung.parameters) for one in runs]
    return fit_law(sizes, [float(one.rung.run.training.tokens) for one in runs], [one.loss for one in runs])


def predict_first(ladder: Ladder, rungs: Sequence[Rung]) -> str:
    """Write down the predicted losses before their runs begin; one that was written before stays. Return it as text."""
    path = Path(ladder.root, PREDICTION)
    if not path.exists():
        found = fitted(rungs)
        rows = {}
        for rung in rungs:
            if rung.predicted:
                rows[rung.name] = found.prediction(rung.parameters, rung.run.training.tokens)
        save_text(str(path), json.dumps(rows) + "\n")
    return "\n".join(
        f"{name}: predicted {loss:.4f} nats per token, {LEVEL:.0%} interval {low:.4f} to {high:.4f}"
        for name, (loss, low, high) in predictions(ladder).items()
    )


def predictions(ladder: Ladder) -> dict[str, tuple[float, float, float]]:
    """Return (loss, low, high) by the name of the predicted run; {} before there is a prediction."""
    path = Path(ladder.root, PREDICTION)
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {name: (float(loss), float(low), float(high)) for name, (loss, low, high) in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged; remove it, and the prediction is made again") from None


def losses_text(ladder: Ladder, rungs: Sequence[Rung]) -> str:
    """Return the losses as a table, predicted ones beside the measured."""
    told, rows = predictions(ladder), [f"{'run':16}{'parameters':>12}{'tokens':>13}{'val. loss':>11}"]
    for one in finished(rungs):
        row = f"{one.rung.name:16}{one.rung.parameters:12,}{one.rung.run.training.tokens:13,}{one.loss:11.4f}"
        if one.rung.name in told:
            loss, low, high = told[one.rung.name]
            verdict = "within" if low <= one.loss <= high else "OUTSIDE OF"
            row += f"   predicted {loss:.4f}; {verdict} its interval {low:.4f} to {high:.4f}"
        rows.append(row)
    return "\n".join(rows)


def fit_data(found: Fit, rungs: Sequence[Rung]) -> dict[str, Any]:
    """Return the law, its intervals and the predictions as plain data."""
    names = ("E", "A", "B", "alpha", "beta")
    rows = [(rung, found.prediction(rung.parameters, rung.run.training.tokens)) for rung in rungs if rung.predicted]
    return {
        "constants": {name: {"value": getattr(found.law, name), "interval": found.interval(name)} for name in names},
        "predictions": {rung.name: dict(zip(("loss", "low", "high"), row, strict=True)) for rung, row in rows},
    }


def fit_text(found: Fit, rungs: Sequence[Rung]) -> str:
    """Return the law and what follows from it, with its limits."""
    law, rows = found.law, ["L(N, D) = E + A / N^alpha + B / D^beta"]
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = found.interval(name)
        rows.append(f"  {name:6}{getattr(law, name):10.4g}   {LEVEL:.0%} interval {low:.4g} to {high:.4g}")
    runs = [one.rung for one in finished(rungs) if not one.rung.predicted]
    sizes, tokens = [one.parameters for one in runs], [one.run.training.tokens for one in runs]
    flops = max(6.0 * n * d for n, d in zip(sizes, tokens, strict=True))
    for factor in (1, 10):
        size, data = law.optimal(flops * factor)
        rows.append(f"optimal for {flops * factor:.3g} FLOPs: {size:.3g} parameters, {data:.3g} tokens")
    for rung in rungs:
        if rung.predicted:
            loss, low, high = found.prediction(rung.parameters, rung.run.training.tokens)
            rows.append(f"{rung.name}: predicted {loss:.4f}, {LEVEL:.0%} interval {low:.4f} to {high:.4f}")
    rows.append(
        f"fitted to {len(runs)} runs of {min(sizes):,} to {max(sizes):,} parameters and {min(tokens):,} to "
        f"{max(tokens):,} tokens; far outside of these the law is a guess. E, the irreducible loss, holds for this "
        "data and tokenizer only, and text that is read several times counts less than the law says"
    )
    return "\n".join(rows)


def choice(law: Law, target: float, inference: float, rates: Rates) -> tuple[dict[str, float], str]:
    """Return the size that reaches a loss for the fewest GPU-hours over its life, as data and text."""
    size, tokens = cheapest(law, target, inference, 1 / rates.training, 1 / rates.inference)
    train = 6 * size * tokens / rates.training / 3600
    serve = 2 * size * inference / rates.inference / 3600
    data = {"parameters": size, "tokens": tokens, "training_gpu_hours": train, "inference_gpu_hours": serve}
    text = f"cheapest for loss {target:g} and {inference:.3g} tokens of inference: {size:.3g} parameters, "
    return data, text + f"{tokens:.3g} tokens; {train:.3g} GPU-hours of training, {serve:.3g} of inference"
