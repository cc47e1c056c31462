"""Hashes of weights in files, with what the result's dtype changes in them and how many numbers are not finite.

Hashes are 128-bit XXH3 of an unsharded weight in this project's layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from llama_ds.checkpoint.weights import Readable

CHUNK_ELEMENTS = 1 << 18  # a chunk and its rounded copy fit in the CPU cache


@dataclass(frozen=True)
class Digest:
    """A weight, as rounded to a dtype."""

    hash: str
    rounded: int = 0  # elements that the dtype changes
    nan: int = 0
    infinite: int = 0


def digest(
    tensor: Readable, dtype: torch.dtype, one_nan: bool, done: Callable[[int], None] = lambda nbytes: None
) -> Digest:
    """Return the digest of a weight rounded to `dtype`.

    Args:
        one_nan: give every NaN the same bits, because a conversion between dtypes may give them any.
        done: gets the number of bytes of each chunk in `dtype`.
    """
    total = torch.Size(tensor.shape).numel()
    hasher = xxhash.xxh3_128()
    rounded = nan = infinite = 0
    buffer = torch.empty(min(total, CHUNK_ELEMENTS), dtype=tensor.dtype)
    for start in range(0, total, CHUNK_ELEMENTS):
        part = buffer[: min(CHUNK_ELEMENTS, total - start)]
        tensor.read(part, 0, 1, start)
        result = part.to(dtype)
        if not surely_finite(part):
            nan += int(part.isnan().sum())
            infinite += int(part.isinf().sum())
            result = result.masked_fill(result.isnan(), math.nan) if one_nan else result
        if _narrower(dtype, tensor.dtype):
            rounded += int(((result.to(part.dtype) != part) & ~part.isnan()).sum())
        hasher.update(result.view(torch.uint8).numpy().data)
        done(result.nbytes)
    return Digest(hasher.hexdigest(), rounded, nan, infinite)


def surely_finite(part: Tensor) -> bool:
    """Return False if an element is NaN or infinite, in a twentieth of the time that isfinite() takes.

    A sum of finite numbers may overflow, so that False is only a reason to look.
    """
    if part.dtype == torch.float32:
        return math.isfinite(part.sum())
    return all(map(math.isfinite, torch.aminmax(part)))


def _narrower(result: torch.dtype, source: torch.dtype) -> bool:
    """Return whether a conversion can change a value."""
    return torch.promote_types(result, source) != result
