"""How the messages of checks name ranks, and what they advise."""

from __future__ import annotations

from collections.abc import Sequence

from llama_ds.errors import first_of

ADVICE = "test the memory and GPUs of the host, leave it out, and resume from the last checkpoint"
MOST_NAMED = 8


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return ranks with their hosts, "rank 3 on node1, rank 5 on node2"; `hosts` are those of all ranks."""
    return first_of([f"rank {rank} on {hosts[rank]}" for rank in ranks], MOST_NAMED)
