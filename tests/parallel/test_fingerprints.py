"""Fingerprints: every bit counts in their exact part, and only what changes a result counts in their bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llama_ds.parallel.fingerprints import agree, combined, fingerprint


def prints(*tensors: torch.Tensor) -> np.ndarray:
    return torch.stack([fingerprint(tensor) for tensor in tensors]).numpy()


def test_a_dry_run_leaves_no_fake_signs_behind() -> None:
    """A fake tensor among the kept signs would fail, or pass anything, in real steps of the same process."""
    with FakeTensorMode():
        fingerprint(torch.empty(777 * 1024))
    assert type(fingerprint(torch.ones(777 * 1024))) is torch.Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 1024, 5000])
def test_the_least_bit_counts_where_results_repeat(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    other = tensor.clone()
    other.view(torch.int32 if dtype is torch.float32 else torch.int16)[size // 2] ^= 1
    first, second = prints(tensor, other)
    assert agree(first, first, exact=True) and not agree(first, second, exact=True)
    assert agree(first, second, exact=False), "within bounds, the last bit is rounding"


def test_bounds_bear_rounding_and_no_more() -> None:
    """The bound is 2 percent of the norm. Of 0.4 percent, bf16's rounding, no case fails; of 20 percent none passes.

    Each of the three projections of a difference of norm d is about normal with deviation d: all within a tenth of d by
    chance in 1 of 2,000 cases, and the norms then still differ by d^2 / 2.
    """
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(20_000, generator=generator)
    clean = prints(tensor)[0]
    for share, same in ((0.004, True), (0.2, False)):
        for _ in range(50):
            noise = share * torch.randn(20_000, generator=generator)
            assert agree(clean, prints(tensor + noise)[0], exact=False) == same
    for bad in (float("nan"), float("inf")):
        other = tensor.clone()
        other[7] = bad
        assert not agree(clean, prints(other)[0], exact=False)
        assert agree(prints(other)[0], prints(other)[0], exact=False), "the same bits are the same result"


def test_a_combined_fingerprint_knows_the_order() -> None:
    first, second = fingerprint(torch.ones(4)), fingerprint(torch.arange(4.0))
    assert not agree(combined([first, second]).numpy(), combined([second, first]).numpy(), exact=True)
