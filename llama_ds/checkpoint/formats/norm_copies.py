"""Norms in the files of tensor-parallel ranks, each of which has trained its own copy of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from llama_ds.checkpoint.stored import Stored
from llama_ds.errors import UserError

# Each rank of Meta's training kept its own copy of the norms, and in Llama 3 70B the copies differ by up to 0.01.
# GPT-NeoX does the same. Norms of unrelated models differ by tenths, so that copies within this bound are those of one
# model.
NORM_DRIFT, NORM_DRIFT_RELATIVE = 0.01, 0.05  # absolute, and relative to the norm's largest weight; the larger counts


def norm_drift(names: Sequence[str], parts: Sequence[Mapping[str, Stored]], paths: Sequence[str]) -> list[str]:
    """Return a line on norms that differ between ranks; the first rank's are taken.

    Args:
        names: names of the norms.
        parts: the tensors of each rank by name.
        paths: the paths of their files.

    Raises:
        UserError: they differ by more than copies of one model do.
    """
    different, largest = set(), 0.0
    for name in names:
        first = _whole(parts[0][name])
        for path, part in zip(paths[1:], parts[1:], strict=True):
            other = _whole(part[name])
            if torch.equal(first.view(torch.int64), other.view(torch.int64)):  # bits, so that NaN equals itself
                continue
            difference = (first - other).abs().max().item()
            if not difference <= max(NORM_DRIFT, NORM_DRIFT_RELATIVE * first.abs().max().item()):
                raise UserError(
                    f"{path}: {name} differs from that of {paths[0]} by up to {difference:.3g}: parts of two models; "
                    "copy it again"
                )
            different.add(name)
            largest = max(largest, difference)
    if not different:
        return []
    return [
        f"{paths[0]}: its norms are taken; {len(different)} of {len(names)} differ in the files of other ranks, "
        f"by at most {largest:.3g}"
    ]


def _whole(stored: Stored) -> torch.Tensor:
    out = torch.empty(stored.shape, dtype=torch.float64)
    stored.read(out)
    return out
