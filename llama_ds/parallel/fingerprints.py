"""Fingerprints of tensors, by which two computations of the same tensors are compared without sending them.

A fingerprint is six integers: the two sums over bits of `parallel/replicas.py`, which differ if any bit does, and the
bits of four float64 numbers: the sum of squares and three projections on vectors of random signs. If the difference of
two tensors has norm d, their projections differ by about d: they bound it where kernels do not repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llama_ds.parallel.replicas import checksum

SIZE, EXACT = 6, 2  # integers of a fingerprint, and those of its sums over bits
TOLERANCE = 0.02  # relative to the norm; bf16 results that only round differently stay below 2^-8 = 0.004
_PROJECTIONS, _COLUMNS, _KEPT = 3, 1024, 64
_kept_signs: dict[tuple[int, int, torch.device], Tensor] = {}


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """Return the fingerprint (6,) int64 of a tensor, on its device, without a host synchronisation."""
    flat = tensor.detach().reshape(-1)
    wide = flat.float()
    rows = -(-len(wide) // _COLUMNS)
    across, down = _signs(_COLUMNS, 1, flat.device), _signs(rows, 2, flat.device)
    whole = len(wide) // _COLUMNS
    sums = wide[: whole * _COLUMNS].view(whole, _COLUMNS) @ across  # (rows, 3)
    rest = wide[whole * _COLUMNS :]
    if len(rest):
        sums = torch.cat([sums, (rest @ across[: len(rest)])[None]])
    square = torch.linalg.vector_norm(wide).double().square()[None]
    rough = torch.cat([square, (sums.double() * down).sum(0)])
    return torch.cat([checksum([flat]).to(flat.device), rough.view(torch.int64)])


def combined(prints: Sequence[Tensor]) -> Tensor:
    """Return the fingerprint of several tensors, in their order, from theirs."""
    every = torch.stack(list(prints))
    order = torch.arange(1, 2 * len(every), 2, device=every.device)[:, None]
    rough = every[:, EXACT:].contiguous().view(torch.float64).sum(0)
    return torch.cat([(every[:, :EXACT] * order).sum(0), rough.view(torch.int64)])


def agree(first: np.ndarray, second: np.ndarray, exact: bool) -> np.ndarray:
    """Return whether fingerprints (..., 6) are of equal tensors, or, if not `exact`, of nearly equal ones: (...)."""
    same = (first[..., :EXACT] == second[..., :EXACT]).all(-1)
    if exact:
        return same
    one, other = (np.ascontiguousarray(values[..., EXACT:]).view(np.float64) for values in (first, second))
    with np.errstate(invalid="ignore"):
        norms = np.sqrt(np.maximum(one[..., :1], other[..., :1]))
        apart = np.abs(np.concatenate([np.sqrt(one[..., :1]) - np.sqrt(other[..., :1]), (one - other)[..., 1:]], -1))
        near = np.isfinite(norms) & (apart <= TOLERANCE * norms)  # a NaN is never near
        return same | near.all(-1)


def _signs(count: int, seed: int, device: torch.device) -> Tensor:
    """Return (count, 3) random signs, which are the same on every rank; those that take little memory are kept."""
    signs = _kept_signs.get((count, seed, device))
    if signs is None:
        signs = _new_signs(count, seed, device)
        if count <= _COLUMNS and len(_kept_signs) < _KEPT and type(signs) is Tensor:  # no fake one of a dry run
            _kept_signs[count, seed, device] = signs
    return signs


def _new_signs(count: int, seed: int, device: torch.device) -> Tensor:
    numbers = torch.arange(seed, seed + _PROJECTIONS * count, device=device, dtype=torch.int64)
    for factor in (-7046029254386353131, -4658895280553007687):  # the mixing of splitmix64
        numbers = numbers * factor
        numbers = numbers ^ (numbers >> 29)
    signs = (numbers & 1) * 2 - 1
    return signs.view(_PROJECTIONS, count).t().to(torch.float64 if seed == 2 else torch.float32)
