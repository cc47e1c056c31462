"""Answers of `tools/plan.py goodput` as text and as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from llama_ds.errors import UserError
from llama_ds.perf.plan.goodput import (
    Simulated,
    Tier,
    best_intervals,
    daly_share,
    first_order,
    mtbf_s,
    simulate,
    spares_needed,
    with_intervals,
)
from llama_ds.perf.plan.goodput_published import RUNS
from llama_ds.perf.plan.tables import aligned

CERTAINTY = 0.95
MOST_FAILURES = 20_000  # simulated at most


@dataclass(frozen=True)
class GoodputRequest:
    """What a plan is asked for. Times are seconds."""

    name: str
    gpus: int
    gpus_per_host: int
    failures_per_gpu_day: float
    host_share: float  # share of failures after which a host needs repair
    repair_s: float
    training_s: float  # duration of the run without interruptions
    step_s: float
    tiers: Sequence[Tier]
    start: datetime


def plan_goodput_of(wanted: GoodputRequest) -> tuple[dict[str, Any], str]:
    """Return the plan as data and as text."""
    mtbf = mtbf_s(wanted.failures_per_gpu_day, wanted.gpus)
    if wanted.training_s > MOST_FAILURES * mtbf:
        raise UserError(
            f"goodput: {wanted.training_s / mtbf:,.0f} failures during the training are more than {MOST_FAILURES:,}, "
            "which would take long to simulate; lower --training-days, --gpus or --failures-per-gpu-day"
        )
    young = with_intervals(wanted.tiers, mtbf, wanted.step_s)
    best, _ = best_intervals(wanted.tiers, mtbf, wanted.training_s, wanted.step_s)
    found = simulate(best, mtbf, wanted.training_s)
    by_young = simulate(young, mtbf, min(wanted.training_s, 200 * mtbf), runs=64).effective
    lost_per_s = wanted.host_share / mtbf
    wall = float(found.wall_s.mean())
    late = found.quantile_s(CERTAINTY)
    endless = not math.isfinite(wall)
    moment, throughout = (0, 0) if endless else spares_needed(lost_per_s, wanted.repair_s, wall, CERTAINTY)
    tiers = [
        {
            "tier": one.name,
            "interval_s": one.interval_s,
            "interval_steps": max(round(one.interval_s / wanted.step_s), 1),
            "young_s": at.young(mtbf),
            "daly_s": at.daly(mtbf),
        }
        for one, at in zip(best, wanted.tiers, strict=True)
    ]
    data = {
        "mtbf_s": mtbf,
        "effective_share": 0.0 if endless else found.effective,
        "effective_share_young_intervals": by_young,
        "effective_share_first_order": first_order(best, mtbf),
        "effective_share_daly": daly_share(best[0], mtbf) if len(best) == 1 else None,
        "tiers": tiers,
        "failures": None if endless else found.failures,
        "training_days": wanted.training_s / 86400,
        "expected_days": None if endless else wall / 86400,
        "days_95": None if endless else late / 86400,
        "expected_end": None if endless else _date(wanted.start, wall),
        "end_95": None if endless else _date(wanted.start, late),
        "spare_hosts_at_a_moment_95": moment,
        "spare_hosts_throughout_95": throughout,
        "assumed": {**asdict(wanted), "tiers": [asdict(tier) for tier in wanted.tiers], "start": str(wanted.start)},
    }
    return data, _text(wanted, data, found)


def _date(start: datetime, seconds: float) -> str:
    try:
        return (start + timedelta(seconds=seconds)).date().isoformat()
    except OverflowError:
        return "after the year 9999"


def _text(wanted: GoodputRequest, data: Mapping[str, Any], found: Simulated) -> str:
    hosts = wanted.gpus / wanted.gpus_per_host
    rows = [["tier", "blocked", "restart", "for failures", "best interval", "steps", "Young", "Daly"]]
    for tier, plan in zip(wanted.tiers, data["tiers"], strict=True):
        rows.append(
            [
                tier.name,
                _time(tier.save_s),
                _time(tier.restart_s),
                f"{tier.share:.0%}",
                _time(plan["interval_s"]),
                f"{plan['interval_steps']:,}",
                *(_time(plan[name]) for name in ("young_s", "daly_s")),
            ]
        )
    lines = [
        f"{wanted.name} on {wanted.gpus:,} GPUs: a failure every {_time(data['mtbf_s'])} "
        f"({wanted.failures_per_gpu_day:.3g} per GPU-day)",
        "",
        aligned(rows),
        "",
    ]
    if data["expected_days"] is None:
        return "\n".join([*lines, "the run may make no progress: failures come faster than restarts and saves"])
    checks = f"{data['effective_share_first_order']:.2%} by the sum of costs"
    if data["effective_share_daly"] is not None:
        checks += f", {data['effective_share_daly']:.2%} by Daly's model"
    return "\n".join(
        [
            *lines,
            f"effective training time: {data['effective_share']:.2%} by simulation ({checks}); "
            f"{data['effective_share_young_intervals']:.2%} with Young's intervals",
            f"duration: {data['training_days']:.1f} days of training take {data['expected_days']:.1f} days, and with "
            f"95 percent certainty at most {data['days_95']:.1f}; {found.failures:.0f} failures",
            f"end: {data['expected_end']}, with 95 percent certainty by {data['end_95']}, if it starts on "
            f"{wanted.start.date().isoformat()}",
            f"spare hosts, with 95 percent certainty: {data['spare_hosts_at_a_moment_95']} at any moment, "
            f"{data['spare_hosts_throughout_95']} throughout ({hosts:,.0f} hosts; {wanted.host_share:.0%} of failures "
            f"take a host out for {_time(wanted.repair_s)})",
        ]
    )


def published() -> tuple[list[dict[str, Any]], str]:
    """Return the comparison with published runs."""
    rows = [["run", "GPUs", "per GPU-day", "MTBF", "published", "planned", "lost per failure: published", "planned"]]
    data = []
    for run in RUNS:
        share, tiers = run.planned()
        lost = (1 - share) * run.mtbf_s
        known = run.stated if run.stated is not None else run.derived
        data.append(
            {
                **{"run": run.name, "gpus": run.gpus, "failures_per_gpu_day": run.rate, "mtbf_s": run.mtbf_s},
                **{"stated": run.stated, "derived": run.derived, "planned": share, "source": run.source},
                **{"remark": run.remark, "tiers": [asdict(tier) for tier in tiers]},
                **{"lost_s": run.loss_per_failure_s, "planned_lost_s": lost},
            }
        )
        rate = f"{run.rate:.2e}" + (" (Llama 3's)" if run.failures is None else "")
        kind = "" if run.stated is not None else " (derived)"
        rows.append(
            [
                *(run.name, f"{run.gpus:,}", rate, _time(run.mtbf_s), f"{known or 0:.0%}{kind}", f"{share:.1%}"),
                *(_time(run.loss_per_failure_s or 0), _time(lost)),
            ]
        )
    notes = [f"{run.name}: {run.source}; {run.remark}" for run in RUNS]
    return data, "\n".join([aligned(rows), "", *notes])


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.3g} s"
