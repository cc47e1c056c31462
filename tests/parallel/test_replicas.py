"""Checksums of weights and the vote over replicas; `layout_worker.py` flips a bit on real ranks of every layout."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llama_ds.config.run_file import load_run
from llama_ds.errors import Corruption
from llama_ds.layout.layout import resolve_layout
from llama_ds.parallel import world
from llama_ds.parallel.replicas import checksum, vote
from llama_ds.parallel.whole_gradients import different
from llama_ds.training.replica_check import ReplicaCheck

LAYOUT = ["parallel.tp=1", "parallel.sequence_parallel=false", "parallel.micro_batch=1", "training.global_batch=12"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_counts(dtype: torch.dtype) -> None:
    """Each bit of an element in the fold and of one in the rest behind it, also the sign and those of NaN."""
    weights = [torch.randn(9003, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(2)]
    bits = [weight.view(torch.int16 if dtype is torch.bfloat16 else torch.int32) for weight in weights]
    clean, size = checksum(weights), 8 * weights[0].element_size()
    for index in (0, 4095, 4096, 9000, 9002):
        for bit in range(size):
            flip = -(2 ** (size - 1)) if bit == size - 1 else 2**bit
            bits[1][index] ^= flip
            assert (checksum(weights) != clean).all(), (index, bit)
            bits[1][index] ^= flip
    assert torch.equal(checksum(weights), clean)


def test_changes_that_cancel_in_a_plain_sum_are_found() -> None:
    """Two elements exchanged, in a row, in a column, or between weights: their sum is the same."""
    for first, second in ((5, 6), (4, 5), (5, 5 + 2048), (5, 8999)):
        weights = [torch.arange(9000.0), torch.arange(9000.0)]
        clean = checksum(weights)
        weights[0][[first, second]] = weights[0][[second, first]]
        assert (checksum(weights) != clean).any()
    assert (checksum([torch.ones(4), torch.zeros(4)]) != checksum([torch.zeros(4), torch.ones(4)])).any()


def test_the_place_of_a_weight_in_memory_does_not_count() -> None:
    """Flat buffers put the same weight at other offsets: that is no difference."""
    weight = torch.randn(5001).bfloat16()
    flat = torch.cat([torch.zeros(3).bfloat16(), weight])
    assert torch.equal(checksum([weight]), checksum([flat[3:]]))


@pytest.mark.parametrize(("bad", "named"), [([2], [2]), ([], []), ([1, 2], [0, 1, 2])])
def test_a_difference_ends_the_run_before_the_step_and_before_the_save(
    bad: list[int], named: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three replicas: the wrong one is named with its host; if all differ from each other, all of them."""
    run = load_run("quickstart", ["checkpoint.compare_replicas=10", "parallel.pp=1", *LAYOUT])
    engine = SimpleNamespace(module=torch.nn.Linear(4, 4), optimizer=None)
    hosts = [f"node{rank}" for rank in range(3)]
    check = ReplicaCheck(run, resolve_layout(run, 3), engine, hosts, torch.device("cpu"))

    def of_all(values: list[int], where: object = None) -> np.ndarray:
        return np.array([[values[0] + (rank if rank in bad else 0), values[1]] for rank in range(3)])

    monkeypatch.setattr(world, "gather_numbers", of_all)
    check.before_step(9)
    assert check.numbers() is None, "it is not yet time"
    check.before_step(10)
    sums = check.numbers()
    assert sums is not None
    for words, compare in (
        ("in step 10 the weights of", lambda: check.judge(of_all(sums.tolist()))),
        ("after step 11 the weights of", lambda: check.before_save(11)),
    ):
        with pytest.raises(Corruption) if bad else nullcontext() as raised:
            compare()
        if bad:
            assert f"{words} rank {named[0]} on node{named[0]}" in str(raised.value)
            assert list(raised.value.ranks) == named


def test_the_vote() -> None:
    sums = np.array([[1, 1], [1, 1], [1, 2], [1, 1], [3, 1], [4, 1]])
    assert vote(sums, [0, 1, 3]) == []
    assert vote(sums, [0, 1, 2]) == [2]
    assert vote(sums, [0, 1, 2, 3, 4]) == [2, 4]
    assert vote(sums, [0, 2]) == [0, 2], "of two, either may be right"
    assert vote(sums, [0, 1, 2, 4]) == [0, 1, 2, 4], "half is no majority"


def test_the_vote_on_norms() -> None:
    """-1 is a norm that is not finite: of two replicas, it is the one with the flipped bit."""
    norms = np.array([1.0, 1.00005, 1.2, -1.0, 1.0, -1.0])
    assert different(norms, [0, 1, 4]) == []
    assert different(norms, [0, 1, 2]) == [2]
    assert different(norms, [0, 3]) == [3]
    assert different(norms, [0, 2]) == [0, 2], "of two finite ones, either may be right"
    assert different(norms, [3, 5]) == [], "all skip the step"
