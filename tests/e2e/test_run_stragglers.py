"""logging.straggler_interval reports the rank that the others wait for and its slow part, and changes nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import TRAIN, forked, succeed
from tiny_run import Run

SLOW = Path(__file__).with_name("slow_rank.py")
# Half a second per step in 2 to 4 calls. Other load on the machine slows down a rank as well, and that is reported too:
# on two cores it was 150 ms a step. The tests allow such reports up to half of the delay.
DELAY_MS = 400
PP2_DP2 = {"parallel.pp": 2, "logging.straggler_interval": 3}
DP4 = {"logging.straggler_interval": 3}


def found(run: Run) -> list[dict[str, Any]]:
    """The lines of stragglers.jsonl, without reports of less than half of the delay."""
    reports = [json.loads(line) for line in (run.dir / "stragglers.jsonl").read_text().splitlines()]
    for report in reports:
        report["slow"] = [slow for slow in report["slow"] if slow["ms"] - slow["median_ms"] > DELAY_MS / 2]
        report["slow_links"] = [link for link in report["slow_links"] if link["ms"] > DELAY_MS / 2]
    return reports


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "where", "seconds", "rank", "part"),
    [
        (PP2_DP2, "forward", 0.15, 1, "compute"),
        (PP2_DP2, "data", 0.3, 3, "data"),
        (DP4, "forward", 0.3, 2, "compute"),
    ],
)
def test_the_slow_rank_is_named(
    layout: dict[str, Any], where: str, seconds: float, rank: int, part: str, make_run: Callable[..., Run]
) -> None:
    run = make_run(f"slow_{where}_{rank}", layout)
    output = succeed(forked(4, SLOW, where, seconds, rank, run.file), run.log)
    reports = found(run)
    # The first step is left out.
    assert [(report["step"], report["steps"]) for report in reports] == [(3, 2), (6, 3)]
    for report in reports:
        (slow,) = report["slow"]
        assert slow["ranks"] == [rank] and slow["part"] == part and slow["steady"]
        assert report["slow_links"] == []
        assert slow["ms"] - slow["median_ms"] > DELAY_MS
        parts = slow["parts"]
        # All ranks take the same time for a step: the parts of the slow one add up to it.
        assert sum(parts.values()) - parts["between_ms"] == pytest.approx(report["step_ms"], rel=0.2)
    assert len(re.findall(rf"^SLOW: ranks? (?:\d, )?{rank}\b", output, re.MULTILINE)) >= len(reports)


@pytest.mark.slow
def test_a_slow_link_is_told_from_a_slow_rank_and_losses_are_those_without(make_run: Callable[..., Run]) -> None:
    """Rank 3's messages are late: no rank computes longer, but the waits in its pipeline, ranks 1 and 3, show it."""
    run, without = make_run("slow_link", PP2_DP2), make_run("no_report", {**PP2_DP2, "logging.straggler_interval": 0})
    output = succeed(forked(4, SLOW, "messages", 0.3, 3, run.file), run.log)
    for report in found(run):
        assert report["slow"] == []
        assert [(link["ranks"], link["after_stage"]) for link in report["slow_links"]] == [([1, 3], 0)]
    assert "SLOW LINK: between rank 1 on " in output

    succeed(forked(4, TRAIN, without.file), without.log)
    assert run.losses == without.losses and run.validation_loss == without.validation_loss
    assert not (without.dir / "stragglers.jsonl").exists()
