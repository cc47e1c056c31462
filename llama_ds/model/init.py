"""Initial weights as a pure function of (seed, layer, name, index): the same for every layout.

A matrix is drawn in fixed blocks along its sharded dimension, each from a generator of its own, so that a rank draws
only the blocks it holds and every tensor-parallel size shards the same matrix.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.vocab_parts import own_rows, part_rows
from llama_ds.layout.weights import Role, Weight

BLOCKS = 64  # any tp works; a tp that divides 64 draws no surplus numbers


def block_seed(seed: int, layer: int, name: str, block: int) -> int:
    """Return the 63-bit generator seed of one block of one weight."""
    digest = hashlib.sha256(f"{seed}/{layer}/{name}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def initial_shard(
    weight: Weight, model: ModelConfig, rank: int, size: int, std: float, seed: int, layer: int
) -> Tensor:
    """Return the initial shard of `weight` on `rank` of `size`: normal (0, std), ones for norms, zeros for biases.

    Padding of the vocabulary is zero.
    """
    if weight.seed_name is None:
        own = weight.part_shape(model, size)
        return torch.zeros(own) if weight.role is Role.BIAS else torch.ones(own)
    out_size, in_size = weight.shape(model)
    assert weight.cut is not None, "matrices are drawn in blocks along their sharded dimension"
    return normal_shard((out_size, in_size), weight.cut, rank, size, std, seed, layer, weight.seed_name)


def normal_shard(
    shape: tuple[int, int], dim: int, rank: int, size: int, std: float, seed: int, layer: int, name: str
) -> Tensor:
    """Draw the shard of a normal (0, std) matrix on `rank` of `size` when the matrix is sharded along `dim`.

    Args:
        shape: shape of the full matrix.
        layer: number of the decoder layer from 0, or the key of embedding or head (`embedding.py`).
        name: name of the weight in its layer.

    Returns:
        float32 tensor of `shape`, except that its size along `dim` is ceil(`shape[dim]` / `size`). Where `size` does
        not divide `shape[dim]`, zeros pad the last shards.
    """
    length = shape[dim]
    step = length // math.gcd(length, BLOCKS)
    own, padding = own_rows(length, rank, size), part_rows(length, size) - len(own_rows(length, rank, size))
    first, last = own.start // step, -(-own.stop // step)
    blocks = _draw(shape, dim, step, [block_seed(seed, layer, name, b) for b in range(first, last)])
    drawn = blocks.narrow(dim, own.start - first * step, len(own)).mul_(std)
    return F.pad(drawn, (0, padding) if dim else (0, 0, 0, padding)) if padding else drawn.contiguous()


def _draw(shape: tuple[int, int], dim: int, step: int, seeds: list[int]) -> Tensor:
    """Draw a block of `step` rows (`dim` 0) or columns from each seed; return them side by side."""
    block = list(shape)
    block[dim] = step
    # Memory from NumPy: under deepspeed.zero.Init torch's constructors take the accelerator as the default device, and
    # round what they return to bf16, here before it is scaled.
    blocks = torch.from_numpy(np.empty([len(seeds), *block], np.float32))
    for drawn, seed in zip(blocks, seeds, strict=True):
        drawn.normal_(generator=torch.Generator(device="cpu").manual_seed(seed))
    return (blocks.movedim(0, 1) if dim else blocks).flatten(dim, dim + 1)
