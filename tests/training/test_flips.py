"""Bits that flip in a real run of three replicas: those that the checks cover are found, and their rank is named.

`tools/benchmark.py flips` does the same with 1,008 flips and 1,000 steps without any.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from llama_ds.benchmarks.flips.request import IN_STEP, SITES, STORED, FlipRequest
from tests import warm

CHECKED = (
    *("weights", "masters", "moments", "activations of the checked layer", "weight gradients of the checked layer"),
    *STORED,
)


@pytest.mark.slow
def test_flipped_bits_are_found_and_their_rank_is_named(tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps(asdict(FlipRequest(ranks=3, flips=2, clean=50, seed=1))))
    done = warm.run("-m", "llama_ds.benchmarks.flips.rank", request, tmp_path, ranks=3)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [trial["site"] for trial in found["trials"]] == [*SITES, *SITES]
    for trial in found["trials"]:
        if trial["site"] in CHECKED:
            assert trial["found"] and trial["ranks"] == [trial["rank"]], trial
        elif trial["found"]:  # by a gradient norm that is far outside, or where the bit was not set before
            assert trial["rank"] in trial["ranks"], trial
        if trial["found"] and trial["site"] in IN_STEP:
            assert trial["found"].startswith("CORRUPTION: ") and "the step is not taken" in trial["found"]
    assert found["alarms"] == found["reports"] == []
