"""Initial weights do not depend on the layout: any tensor-parallel size cuts the same matrix."""

from __future__ import annotations

import pytest
import torch

from llama_ds.model.init import normal_shard


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_tile_the_whole_matrix(dim: int, size: int) -> None:
    shape = (48, 96) if dim else (96, 48)
    whole = normal_shard(shape, dim, 0, 1, 0.5, seed=3, layer=2, name="q_proj")
    shards = [normal_shard(shape, dim, rank, size, 0.5, seed=3, layer=2, name="q_proj") for rank in range(size)]
    assert torch.equal(torch.cat(shards, dim), whole)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_rows_that_the_ranks_do_not_share_evenly_are_padded(size: int) -> None:
    whole = normal_shard((97, 8), 0, 0, 1, 0.5, seed=3, layer=-1, name="embed")
    shards = [normal_shard((97, 8), 0, rank, size, 0.5, seed=3, layer=-1, name="embed") for rank in range(size)]
    tiled = torch.cat(shards)
    assert {len(shard) for shard in shards} == {-(-97 // size)}
    assert torch.equal(tiled[:97], whole) and not tiled[97:].any()


def test_seed_layer_and_name_each_give_other_weights_of_the_wanted_spread() -> None:
    keys = [(1, 0, "q_proj"), (2, 0, "q_proj"), (1, 1, "q_proj"), (1, 0, "k_proj")]
    drawn = [normal_shard((256, 256), 0, 0, 1, 0.02, seed, layer, name) for seed, layer, name in keys]
    for i, weight in enumerate(drawn):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)  # 65536 draws: 5 standard errors are 0.014
        assert abs(weight.mean().item()) < 5 * 0.02 / 256
        assert all((weight - other).abs().max() > 0.01 for other in drawn[:i])
