"""Flips bits of a small run on ranks of this machine, and reports what finds them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_ds.benchmarks.flips.request import SITES, FlipRequest
from llama_ds.benchmarks.ranks import start_ranks
from llama_ds.errors import UserError
from llama_ds.machine import cpu_name

_DEVIATIONS = 1.96  # standard deviations, within which 95 percent of a normal distribution are
SUMS = ("clean_steps", "reports_in_clean_steps", "flipping_s", "clean_s")


def read(path: str, request: FlipRequest) -> dict[str, Any]:
    """Return the results of earlier flips, to which `request` adds.

    Raises:
        UserError: there are none in the file, of other ranks, or with the same seed.
    """
    try:
        found = json.loads(Path(path).read_text())
        ranks, seeds = found["settings"]["ranks"], found["seeds"]
        assert found["sites"].keys() == set(SITES) and all(isinstance(found[name], int | float) for name in SUMS)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"--add {path}: no results of this benchmark ({error}); name a file that --out wrote") from None
    if ranks != request.ranks:
        raise UserError(f"--add {path}: was measured on {ranks} ranks, not {request.ranks}; set --ranks {ranks}")
    if request.seed in seeds:
        raise UserError(f"--seed {request.seed}: {path} has its flips already; set another seed")
    return found


def together(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return the results of both, with the settings of the later."""
    sites = {
        site: {name: earlier["sites"][site][name] + count for name, count in counts.items()}
        for site, counts in later["sites"].items()
    }
    sums = {name: round(earlier[name] + later[name], 1) for name in SUMS}
    lists = {name: earlier[name] + later[name] for name in ("seeds", "false_alarms", "missed")}
    return {**later, **sums, **lists, "sites": sites}


def measure(request: FlipRequest, folder: Path) -> dict[str, Any]:
    """Return for each site the flips, those that were found, and those of which the right rank was named."""
    start_ranks("llama_ds.benchmarks.flips.rank", request, folder, request.ranks, None, 0.0)
    result = json.loads((folder / "found.json").read_text())
    sites = {site: _counts([trial for trial in result["trials"] if trial["site"] == site]) for site in SITES}
    return {
        "settings": asdict(request),
        "seeds": [request.seed],
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "sites": sites,
        "clean_steps": result["clean"],
        "missed": [_missed(trial) for trial in result["trials"] if not trial["found"]],
        "false_alarms": result["alarms"],
        "reports_in_clean_steps": len(result["reports"]),
        "flipping_s": round(result["flipping_s"], 1),
        "clean_s": round(result["clean_s"], 1),
    }


def _counts(trials: list[dict[str, Any]]) -> dict[str, int]:
    found = [trial for trial in trials if trial["found"]]
    return {
        "flips": len(trials),
        "found": len(found),
        "right_rank": sum(trial["rank"] in trial["ranks"] for trial in found),
        "only_it": sum(trial["ranks"] == [trial["rank"]] for trial in found),
        "by_norm": sum("gradient norm" in trial["found"] for trial in found),
        "left_out": sum(not trial["found"] and not math.isfinite(trial["norm"]) for trial in trials),
    }


def _missed(trial: dict[str, Any]) -> str:
    bit = trial["bit"] % (16 if trial["site"].startswith("activations") else 32)
    return f"{trial['site']}: bit {bit}, the gradient changed by {trial.get('change', 0.0):.2g} of its norm"


def table(found: dict[str, Any]) -> str:
    """Return the results as text."""
    settings, sites = found["settings"], found["sites"]
    flips = sum(site["flips"] for site in sites.values())
    lines = [
        f"{flips:,} flips of a bit, {settings['ranks']} replicas, bf16, ZeRO-1, every check in every step",
        f"{'site':38} {'flips':>5} {'found':>6} {'(95 percent)':>15} {'right rank':>10} {'alone':>6} {'skipped':>7}",
    ]
    for name, site in sites.items():
        low, high = interval(site["found"], site["flips"])
        share = f"{site['found'] / site['flips']:.1%}" if site["flips"] else ""
        counts = f"{site['right_rank']:>10} {site['only_it']:>6} {site['left_out']:>7}"
        lines.append(f"{name:38} {site['flips']:>5} {share:>6} {f'{low:.1%} - {high:.1%}':>15} {counts}")
    clean, alarms = found["clean_steps"], len(found["false_alarms"])
    lines.append(
        f"{clean:,} steps without flips: {alarms} false alarms ({interval(alarms, clean)[1]:.2%} of the steps at most, "
        f"with 95 percent certainty), {found['reports_in_clean_steps']} reported gradient norms"
    )
    return "\n".join(lines)


def interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 percent confidence interval of a share (E. B. Wilson, JASA 22, 1927)."""
    if not total:
        return 0.0, 1.0
    share, square = count / total, _DEVIATIONS**2 / total
    middle, half = share + square / 2, _DEVIATIONS * math.sqrt(share * (1 - share) / total + square / total / 4)
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))
