"""Ranks without a fault come out of whatever they wait in, and take part in another world as the same processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from llama_ds.errors import Corruption, UserError
from llama_ds.machine import free_port
from llama_ds.parallel.leaving import is_consequence
from tests import warm

WORKER = Path(__file__).with_name("leaving_worker.py")
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:26860"


def test_ranks_leave_collectives_messages_barriers_and_the_store_and_join_another_world() -> None:
    """A rank that stays blocked is killed at the bound; a connection that is left would belong to two attempts.

    One that waited for its gathers once more while it takes the engine apart would fail, and be started anew.
    """
    done = warm.run(WORKER, free_port(), ranks=4)
    assert done.returncode == 0, done.stderr
    found = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda about: about["rank"])
    assert [about["rank"] for about in found] == [0, 1, 2, 3], done.stderr
    for about in found:
        assert about["follows"] is True and about["before"] > 0 and about["gone"], about
        assert about["objects"] == [{"rank": rank, "text": "x" * 200 * (3 - rank)} for rank in range(4)]
        assert about["same"] and about["now"] == 3 - about["rank"] and about["sum"] == 15.0, about


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(GLOO), True),
        (dist.DistNetworkError("the store is gone"), True),
        (Corruption("CORRUPTION", [3]), True),
        (Corruption("CORRUPTION", [1, 3]), False),
        (Corruption("CORRUPTION", []), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (UserError("loss is nan"), False),
        (ConnectionResetError(104, "Connection reset by peer"), False),
        (MemoryError(), False),
    ],
)
def test_only_errors_that_follow_from_another_rank_keep_rank_1(error: Exception, expected: bool) -> None:
    """A rank that fails by itself would carry its fault into the next attempt."""
    assert is_consequence(error, 1) is expected
