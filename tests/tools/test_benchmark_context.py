"""`benchmark.py context` on two ranks, and what it refuses before it starts them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ds.benchmarks.context.predict import exposed_seconds
from llama_ds.benchmarks.context.request import ContextRequest
from llama_ds.benchmarks.context.run import measure, table
from llama_ds.errors import UserError


@pytest.mark.parametrize(
    ("ranks", "tokens", "heads", "rule"),
    [
        (1, 64, 4, "--ranks 1 share no rows; use 2 or more"),
        (3, 96, 4, "--ranks 3 does not divide --heads 4"),
        (2, 90, 4, "--seq-lens 90 is not a multiple of 2 \\* --ranks 2; use 92"),
        (2, 64, 3, "--kv-heads 2 does not divide --heads 3"),
    ],
)
def test_what_ranks_cannot_share_is_refused(ranks: int, tokens: int, heads: int, rule: str) -> None:
    with pytest.raises(UserError, match=f"^command line: {rule}"):
        ContextRequest(ranks, [tokens], heads, 2, 8, None, 0.0, 1).check()


def test_nodes_of_unequal_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"^command line: --node-ranks 3 does not divide --ranks 4; use a divisor"):
        ContextRequest(4, [64], 4, 2, 8, None, 0.0, 1, 3).check()


def test_predicted_waiting_is_the_bytes_that_no_block_hides() -> None:
    """By hand, at 1 MB/s: 16 tokens of a rank, whose keys and values, or their gradients, are 1,024 bytes."""
    links = ContextRequest(2, [32], 2, 1, 8, 8.0, 0.0, 1)
    ring, exchange = links.methods["ring"], links.methods["all_to_all"]
    assert exposed_seconds(links, ring, 32, 0.0, 0.0) == pytest.approx(4 * 1024e-6)
    assert exposed_seconds(links, ring, 32, 1.0, 1.0) == pytest.approx(1024e-6), "the last gradients"
    assert exposed_seconds(links, ring, 32, 1.0, 3e-3) == pytest.approx(3 * 1024e-6 - 1.5e-3)
    assert exposed_seconds(links, exchange, 32, 1.0, 1.0) == pytest.approx(6 * 1024e-6)
    assert exposed_seconds(replace(links, node_ranks=2), exchange, 32, 1.0, 1.0) == 0
    assert exposed_seconds(replace(links, delay_ms=1.0), exchange, 32, 1.0, 1.0) == pytest.approx(4e-3 + 6 * 1024e-6)
    assert exposed_seconds(replace(links, rate_mbit=None), ring, 32, 1.0, 1.0) is None


@pytest.mark.slow
def test_methods_are_timed_on_real_ranks(tmp_path: Path) -> None:
    """Of 2 x 16 tokens: the ring passes 2 x 16 x 8 numbers three times and once in the forward; see `cp_traffic`."""
    found = measure(ContextRequest(2, [32], 2, 1, 8, None, 0.0, 1), tmp_path)
    methods = json.loads(json.dumps(found))["attention"]["32"]
    assert {name: one["sent_bytes"] for name, one in methods.items()} == {"ring": 4 * 1024, "all_to_all": 6 * 1024}
    assert all(0 < one["exposed"] < 1 and one["median_s"] > 0 for one in methods.values())
    assert "32 tokens  ring" in table(found)
