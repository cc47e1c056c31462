"""Comparison of the weights of data-parallel replicas by exact checksums, to find silent data corruption.

The bits of a weight, as words of 64, are summed modulo 2^64, twice: over rows and over columns of a fold, weighted by
their odd positions. Integer sums are exact in any order, and a change of one bit always changes both. Two changes can
cancel in one of the sums, but hardly in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

_COLUMNS = 1024
_SMALL = 2**16  # elements
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by their bytes


@torch.no_grad()
def checksum(weights: Iterable[Tensor]) -> Tensor:
    """Return two int64 sums (2,) over the bits of weights, on their device, without a host synchronisation."""
    total: Tensor | None = None
    for number, weight in enumerate(_joined(weights)):
        sums = _sums(weight) * (2 * number + 1)
        total = sums if total is None else total + sums
    return torch.zeros(2, dtype=torch.int64) if total is None else total


def _joined(weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield weights as vectors, small ones of one dtype as one: each operation costs more than reading them."""
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for weight in weights:
        flat = weight.detach().reshape(-1)
        if flat.numel() <= _SMALL:
            small.setdefault((flat.dtype, flat.device), []).append(flat)
        else:
            yield flat
    yield from (torch.cat(flats) if len(flats) > 1 else flats[0] for flats in small.values())


def vote(checksums: np.ndarray, group: Sequence[int]) -> list[int]:
    """Return the ranks of a group that differ from its majority; all of them if more than half do not agree.

    `checksums` are those of all ranks: (world, n).
    """
    found = {rank: tuple(checksums[rank].tolist()) for rank in group}
    most, count = Counter(found.values()).most_common(1)[0]
    if count == len(group):
        return []
    return [rank for rank in group if found[rank] != most] if 2 * count > len(group) else list(group)


def _sums(weight: Tensor) -> Tensor:
    each = 8 // weight.element_size()
    whole = len(weight) // each * each
    words, end = weight[:whole], weight[whole:].view(_BITS[weight.element_size()])
    if words.storage_offset() % each:  # a view of other elements must be aligned to them
        words = words.clone()
    words = words.view(torch.int64)
    folded = len(words) // _COLUMNS * _COLUMNS
    fold, rest = words[:folded].view(-1, _COLUMNS), torch.cat([words[folded:], end.to(torch.int64)])
    sums = [torch.cat([fold.sum(dim), rest]) for dim in (1, 0)]
    return torch.stack([(part * _odd(len(part), weight.device)).sum() for part in sums])


def _odd(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, 2 * count, 2, dtype=torch.int64, device=device)
