"""Stage boundaries: optimal among all partitions, or as set in the run file."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.flops import layer_costs
from llama_ds.layout.partition import balance, boundaries, decoder_layers

LLAMA_65B = ModelConfig(32000, 8192, 22016, 80, 64, 64, 128)
LLAMA_3_8B = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128)


def all_boundaries(layers: int, stages: int) -> list[list[int]]:
    """Every way to cut [embedding, decoder x layers, norm, head] so that each stage has a decoder layer."""
    return [[0, *cuts, layers + 3] for cuts in combinations(range(2, layers + 1), stages - 1)]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.tuples(*[st.integers(0, 20)] * 3),
    st.integers(1, 8),
    st.sampled_from([0.5, 1, 3e9]),
)
def test_balance_is_the_best_of_all(decoder: list[int], ends: tuple[int, int, int], stages: int, unit: float) -> None:
    if stages > len(decoder):
        return
    counts = [ends[0], *decoder, *ends[1:]]
    exact = {tuple(b): [sum(counts[i:j]) for i, j in pairwise(b)] for b in all_boundaries(len(decoder), stages)}
    rank = {b: (max(loads), sum(load * load for load in loads), b) for b, loads in exact.items()}
    assert tuple(balance([count * unit for count in counts], stages)) == min(rank.values())[2]


def test_even_cut_and_uneven_cut() -> None:
    assert balance([0, 1, 1, 1, 1, 0, 0], 2) == [0, 3, 7]
    # The head weighs as much as two layers: the last stage gets fewer.
    assert balance([0, 1, 1, 1, 1, 1, 1, 0, 2], 2) == [0, 5, 9]
    # Seven layers on three stages: the first stage, which keeps most activations alive, gets fewest.
    assert decoder_layers(balance([0, *[1] * 7, 0, 0], 3)) == [2, 2, 3]


def test_llama_models() -> None:
    assert decoder_layers(boundaries(LLAMA_65B, 2048, 8, None)) == [10] * 8
    # 128k words make Llama-3 8B's head worth more than two of its 32 layers.
    assert layer_costs(LLAMA_3_8B, 8192)[-1] > 2 * layer_costs(LLAMA_3_8B, 8192)[1]
    assert decoder_layers(boundaries(LLAMA_3_8B, 8192, 4, None)) == [8, 9, 9, 6]


def test_explicit_counts_are_kept() -> None:
    bounds = boundaries(LLAMA_65B, 2048, 4, (21, 20, 20, 19))
    assert bounds == [0, 22, 42, 62, 83]
    assert decoder_layers(bounds) == [21, 20, 20, 19]
    assert boundaries(LLAMA_65B, 2048, 1, (80,)) == boundaries(LLAMA_65B, 2048, 1, None) == [0, 83]


def test_more_stages_than_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 decoder layers cannot fill 3 stages"):
        balance([0, 1, 1, 0, 1], 3)
