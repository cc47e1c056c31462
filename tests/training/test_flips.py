"""Bits that flip in a real run of three replicas: those that the checks cover are found, and their rank is named.

`tools/benchmark.py flips` does the same with 1,092 flips and 1,000 steps without any.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from llama_ds.benchmarks.flips.request import IN_STEP, SITES, STORED, FlipRequest
from llama_ds.benchmarks.flips.run import SUMS, interval, read, together
from llama_ds.errors import UserError
from tests import warm

CHECKED = (
    *("weights", "masters", "moments", "activations of the checked layer", "weight gradients of the checked layer"),
    "gradients after the reduction",
    *STORED,
)


@pytest.mark.slow
def test_flipped_bits_are_found_and_their_rank_is_named(tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps(asdict(FlipRequest(ranks=3, flips=2, clean=30, seed=2))))
    done = warm.run("-m", "llama_ds.benchmarks.flips.rank", request, tmp_path, ranks=3)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [trial["site"] for trial in found["trials"]] == [*SITES, *SITES]
    for trial in found["trials"]:
        if trial["site"] in CHECKED and trial.get("change") != 0:  # else rounding has removed the flip
            assert trial["found"] and trial["ranks"] == [trial["rank"]], trial
        elif trial["found"]:  # by a gradient norm that is far outside, or where the bit was not set before
            assert trial["rank"] in trial["ranks"], trial
        if trial["found"] and trial["site"] in IN_STEP:
            assert trial["found"].startswith("CORRUPTION: ") and "the step is not taken" in trial["found"]
    assert found["alarms"] == found["reports"] == []


@pytest.mark.slow
def test_a_norm_that_is_infinite_on_one_rank_alone_ends_the_step_on_all(tmp_path: Path) -> None:
    """DeepSpeed skips the step on that rank, and the others wait for its weights for ever."""
    request = tmp_path / "request.json"
    request.write_text(json.dumps(asdict(FlipRequest(ranks=3, clean=1))))
    done = warm.run("-m", "tests.training.flips_worker", request, tmp_path, ranks=3)
    assert done.returncode == 0, done.stderr[-4000:]
    late, early = json.loads((tmp_path / "found.json").read_text())["trials"]
    words = "the norm of the reduced gradient of rank 2 on node2 is not that of the other replicas, but not finite"
    assert words in late["found"] and late["ranks"] == [2]
    assert "the reduced gradients of rank 2 on node2 differ from those of the other replicas" in early["found"]
    assert early["ranks"] == [2]


def test_results_are_added_to_earlier_ones(tmp_path: Path) -> None:
    """A thousand flips are made in pieces; the same piece twice, or one of other ranks, would count wrongly."""
    counts = {"flips": 7, "found": 6, "right_rank": 6, "only_it": 5, "by_norm": 0, "left_out": 0}
    lists = {"seeds": [1], "false_alarms": ["x"], "missed": ["y"]}
    earlier = {"settings": {"ranks": 3}, "sites": dict.fromkeys(SITES, counts), **lists}
    earlier |= dict.fromkeys(SUMS, 2.5)
    file = tmp_path / "found.json"
    file.write_text(json.dumps(earlier))
    both = together(read(str(file), FlipRequest(seed=2)), earlier | {"seeds": [2], "false_alarms": []})
    assert both["sites"]["weights"] == {
        **dict.fromkeys(counts, 0),
        "flips": 14,
        "found": 12,
        "right_rank": 12,
        "only_it": 10,
    }
    assert (both["seeds"], both["false_alarms"], both["clean_s"]) == ([1, 2], ["x"], 5.0)
    with pytest.raises(UserError, match=r"--seed 1: .* has its flips already; set another seed"):
        read(str(file), FlipRequest(seed=1))
    with pytest.raises(UserError, match="was measured on 3 ranks, not 5; set --ranks 3"):
        read(str(file), FlipRequest(ranks=5, seed=2))
    file.write_text("{}")
    with pytest.raises(UserError, match=r"--add .*: no results of this benchmark .*name a file that --out wrote"):
        read(str(file), FlipRequest(seed=2))


def test_the_interval_of_a_share() -> None:
    """Values of Wilson's formula: without a miss in 84 flips the rate is still not certainly 100 percent."""
    assert interval(84, 84) == pytest.approx((0.9563, 1.0), abs=1e-4)
    assert interval(0, 84) == pytest.approx((0.0, 0.0437), abs=1e-4)
    assert interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert interval(0, 0) == (0.0, 1.0)
