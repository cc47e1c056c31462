"""One process supervises a job of 2048 ranks: the measurement itself, with a shorter heartbeat interval."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ds.launch.scale import watch

RANKS, BEAT_S, SECONDS = 2048, 2.0, 5.0


@pytest.mark.slow
def test_every_rank_is_heard(tmp_path: Path) -> None:
    found = watch(RANKS, BEAT_S, SECONDS, str(tmp_path))
    # Each rank sends SECONDS / BEAT_S heartbeats, plus or minus the one in flight.
    assert abs(found["beats"] - RANKS * SECONDS / BEAT_S) <= RANKS
    assert found["share_of_a_core"] > 0
