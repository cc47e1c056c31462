"""Weights in bf16 as their own masters: how an update is added that is smaller than half a step of bf16.

Rounded to nearest, it would be lost. There are two remedies (Zamirai et al., arXiv 2010.06192):

- Stochastic rounding: the neighbours of a value are taken with the probabilities that give it as their mean. The random
  bits are a hash of the run's seed, the step, the weight's name and the element's position in the whole weight, so they
  do not depend on the layout, and a resumed run draws the same.
- Kahan compensation: a second bf16 number keeps what the weight lacks, about 16 bits of mantissa together.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_ds.config.schema import ModelConfig
from llama_ds.layout.layout import Layout
from llama_ds.layout.weights import key_of, weight_of
from llama_ds.parallel.optimizer_state import located

LOWER_BITS = 0xFFFF  # bits of fp32 that bf16 does not have


@dataclass(frozen=True)
class Positions:
    """Where the elements of a master from `begin` on, `count` of them, are in the whole weight, row by row."""

    begin: int
    count: int
    key: int  # 32 bits, different for each weight and seed
    start: int  # number of the first element in the tensor-parallel part
    width: int  # columns of the part
    whole_width: int  # columns of the weight
    offset: int  # position of the part's first element

    def of(self, begin: int, end: int, device: torch.device) -> Tensor:
        """Return the positions (n,) of the master's elements `begin` .. `end` as int32, modulo 2^32."""
        first = self.start - self.begin
        number = torch.arange(first + begin, first + end, device=device)
        if self.width != self.whole_width:
            number += number.div(self.width, rounding_mode="floor") * (self.whole_width - self.width)
        return (number + self.offset).to(torch.int32)


def use_weights_as_masters(optimizer: Any) -> None:
    """Let the bf16 weights that a rank updates replace the fp32 masters of DeepSpeed's BF16_Optimizer."""
    own = torch.distributed.get_rank(optimizer.dp_process_group)
    for i, parts in enumerate(optimizer.bf16_partitioned_groups):
        master = parts[own].detach().requires_grad_(True)
        master.grad_dtype = None  # their gradients are fp32
        optimizer.fp32_groups_flat_partition[i] = master
        optimizer.optimizer.param_groups[i]["params"] = [master]
    optimizer._link_all_hp_params()


def positions_of(engine: Any, model: ModelConfig, layout: Layout, seed: int) -> dict[int, list[Positions]]:
    """Return where the elements of this rank's masters are in the whole weights, by id of the master."""
    found: dict[int, list[Positions]] = {}
    for _, name, (master, begin, count, start) in located(engine):
        weight, (layer, local) = weight_of(name), key_of(name)
        rank = 0 if weight.cut is None else engine.mpu.get_tensor_model_parallel_rank()
        part, whole = weight.part_shape(model, layout.tp), weight.shape(model)
        widths = (part[1], whole[1]) if weight.cut == 1 else (1, 1)  # parts of rows are consecutive elements
        offset = rank * (part[1] if weight.cut == 1 else weight.part_numel(model, layout.tp))
        key = zlib.crc32(f"{seed} {layer} {local}".encode())
        found.setdefault(id(master), []).append(Positions(begin, count, key, start, *widths, offset))
    return found


def rounded_at_random(value: Tensor, begin: int, positions: Sequence[Positions], step: Tensor) -> Tensor:
    """Return fp32 values (n,) as bf16 after stochastic rounding in step number `step`.

    `begin` is the place of the first in the master; elements outside of all `positions`, the padding, are truncated.
    """
    bits, end = value.view(torch.int32).clone(), begin + len(value)
    moment = _mixed(step.to(value.device, torch.int32))
    for some in positions:
        first, last = max(begin, some.begin), min(end, some.begin + some.count)
        if first < last:
            noise = _mixed(some.of(first, last, value.device) ^ _signed(some.key))
            noise = _mixed(noise ^ moment).bitwise_and_(LOWER_BITS)
            bits[first - begin : last - begin] += noise
    return bits.bitwise_and_(~LOWER_BITS).view(torch.float32).to(torch.bfloat16)


def bf16_and_rest(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 values as the nearest bf16, and what these lack of them as bf16."""
    rounded = value.to(torch.bfloat16)
    return rounded, (value - rounded.float()).to(torch.bfloat16)


def _mixed(x: Tensor) -> Tensor:
    """Return a hash of each int32 (lowbias32 of C. Wellons, https://github.com/skeeto/hash-prospector)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    """Return 32 bits as a signed number."""
    return word - 2**32 if word >= 2**31 else word
