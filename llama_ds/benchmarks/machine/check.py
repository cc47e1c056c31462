"""Compares the planner's predictions with measured steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from llama_ds.layout.recompute import GIB
from llama_ds.machine import machine
from llama_ds.perf.plan.estimate import Estimate

LOSS_TOLERANCE = 1e-3  # relative: all layouts must compute the same first loss


def compare(planned: Sequence[Estimate], found: dict[str, Any]) -> dict[str, Any]:
    """Return the predicted and measured seconds of each layout, and the error relative to the measured time.

    On CUDA also its memory in bytes: planned and measured of tensors, and both of the planner's margin.
    """
    rows = []
    for plan, measured in zip(planned, found["layouts"], strict=True):
        step, seconds = plan.step, measured["seconds"]
        middle = statistics.median(seconds)
        rows.append(
            {
                "overrides": measured["overrides"],
                "predicted_s": step.seconds,
                "measured_s": middle,
                "fastest_s": min(seconds),
                "slowest_s": max(seconds),
                "error": step.seconds / middle - 1,
                "parts_s": {
                    "pipeline": step.pipeline,
                    "reduction": step.reduction,
                    "optimizer": step.optimizer,
                    "host": step.host,
                },
                "bubble": step.bubble,
                "loss": measured["losses"][0],
                "memory": memory_beside_plan(plan, measured["memory"]),
            }
        )
    losses = [row["loss"] for row in rows]
    if max(losses) - min(losses) > LOSS_TOLERANCE * max(losses):
        raise AssertionError(f"the layouts compute different losses of the same weights and rows: {losses}")
    return {
        "machine": machine(),
        "cluster": planned[0].gpu.name,
        "ranks": planned[0].layout.world,
        "layouts": rows,
        "median_abs_error": statistics.median(abs(row["error"]) for row in rows),
        "largest_abs_error": max(abs(row["error"]) for row in rows),
    }


def memory_beside_plan(plan: Estimate, measured: dict[str, float] | None) -> dict[str, float] | None:
    """Return bytes of tensors and of the margin, planned and from `layouts.measured_memory`; None without these."""
    if measured is None:
        return None
    fullest = max(plan.memory, key=lambda rank: rank.total)
    fragments = measured["reserved"] - measured["allocated"]
    return {
        "planned": fullest.total - fullest.margin,
        "measured": measured["allocated"],
        "planned_margin": fullest.margin,
        "fragments": fragments,
        "outside": measured["outside"],
        "margin_share": (fragments + measured["outside"]) / measured["device"],
    }


def comparison_table(results: dict[str, Any]) -> str:
    """Return the comparison as readable text."""
    names = [" ".join(word.removeprefix("parallel.") for word in row["overrides"]) or "-" for row in results["layouts"]]
    width = max(map(len, names))
    lines = [
        f"{results['ranks']} ranks of {results['cluster']}: a step in ms",
        f"{'layout':{width}} {'predicted':>10} {'measured':>10} {'fastest':>9} {'slowest':>9} {'error':>7} "
        f"{'bubble':>7}",
    ]
    for name, row in zip(names, results["layouts"], strict=True):
        times = (row["predicted_s"], row["measured_s"], row["fastest_s"], row["slowest_s"])
        numbers = " ".join(f"{t * 1e3:{w}.1f}" for t, w in zip(times, (10, 10, 9, 9), strict=True))
        lines.append(f"{name:{width}} {numbers} {row['error']:+7.1%} {row['bubble']:7.1%}")
    for name, row in zip(names, results["layouts"], strict=True):
        if memory := row["memory"]:
            planned, measured, margin, fragments, outside = (
                memory[key] / GIB for key in ("planned", "measured", "planned_margin", "fragments", "outside")
            )
            lines.append(
                f"{name:{width}} GiB of tensors: planned {planned:.2f}, measured {measured:.2f}; margin: planned "
                f"{margin:.2f}, measured {fragments:.2f} in fragments + {outside:.2f} of driver and libraries "
                f"({memory['margin_share']:.1%} of the device)"
            )
    lines.append(f"median of |error| {results['median_abs_error']:.1%}, largest {results['largest_abs_error']:.1%}")
    return "\n".join(lines)
