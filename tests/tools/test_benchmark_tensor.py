"""`benchmark.py tensor` on two ranks, and what it refuses before it starts them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llama_ds.benchmarks.tensor.run import TensorRequest, summary, table
from llama_ds.errors import UserError
from tests import warm

SMALL = TensorRequest(2, 2, 384, 1, 64, [1, 4], 100.0, True, None, 0.0, 1)


@pytest.mark.parametrize(
    ("request_", "rule"),
    [
        (replace(SMALL, ranks=1), "--ranks 1 have no collectives; use 2 or more"),
        (replace(SMALL, hidden=400), "--ranks 2 do not divide .* --hidden 400; use a multiple of 384"),
        (replace(SMALL, chunks=[3]), "--seq-len 64 is not a multiple of --ranks 2 \\* --chunks 3; use 66"),
        (replace(SMALL, chunks=[4, 1, 4]), "--chunks 4 1 4 names one twice"),
        (replace(SMALL, delay_ms=5.0), "--delay-ms 5 is of simulated links, which need --rate-mbit"),
    ],
)
def test_what_ranks_cannot_share_is_refused(request_: TensorRequest, rule: str) -> None:
    with pytest.raises(UserError, match=f"^command line: {rule}"):
        request_.check()


def test_waits_are_those_of_each_pass(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps(asdict(SMALL)))
    done = warm.run("-m", "llama_ds.benchmarks.tensor.rank", tmp_path / "request.json", tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = summary(SMALL, json.loads((tmp_path / "times.json").read_text()))
    assert list(found["chunks"]) == ["1", "4"]
    for passes in found["chunks"].values():
        assert all(0 < one["exposed_s"] < one["median_s"] for one in passes.values())
    assert "100.0% of the first" in table(found)
