"""Choice of the library that multiplies float32 matrices on a CPU.

torch uses MKL, which reaches half of the peak of processors other than Intel's (AMD EPYC, Zen 5, two cores: 210 of
450 GFLOP/s). oneDNN, which torch also ships, is fast on all of them, but torch uses it for float32 products only if
they may be rounded to bfloat16 ("medium" precision). oneDNN rounds only on processors with AMX; elsewhere its products
are as exact as MKL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

from llama_ds.machine import cpu_vendor

_SLOW_IN_MKL = ("AuthenticAMD", "HygonGenuine")  # vendor names in /proc/cpuinfo
_ROUNDING_ALLOWED = "medium"
_TOLERANCE = 1e-5  # float32 error of a sum of 64 products of size 1; bfloat16 rounding gives 1e-2


def choose_products() -> None:
    """Use oneDNN for float32 products in this process if it is faster and equally exact."""
    if cpu_vendor() in _SLOW_IN_MKL and not rounds_natively():
        torch.set_float32_matmul_precision(_ROUNDING_ALLOWED)


def onednn_multiplies() -> bool:
    """Return whether `choose_products` selected oneDNN."""
    return torch.get_float32_matmul_precision() == _ROUNDING_ALLOWED


def small_products() -> AbstractContextManager[None]:
    """Let MKL multiply inside, even if oneDNN was selected, which has a high cost for each product.

    MKL takes 0.6 x the time for a row and a matrix in the cache. Torch's attention multiplies small blocks: MKL takes
    0.1 x the time for single tokens, 0.2 x for rows of 80, 0.8 x for 256, and as long for 1024. For a matrix and two
    rows or more oneDNN is faster.
    """
    return _precision("highest") if onednn_multiplies() else nullcontext()


@cache
def rounds_natively() -> bool:
    """Return whether oneDNN rounds factors to bfloat16 where that is allowed: this processor has AMX."""
    with _precision(_ROUNDING_ALLOWED):
        return not exact()


def rounded_products(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Let products of float32 matrices inside round their factors to bfloat16, where `dtype` is it and AMX is here.

    Sums are in float32, as in flash attention on a GPU. It takes 0.3 to 0.7 of the time of MKL's products.
    """
    return _precision(_ROUNDING_ALLOWED) if dtype == torch.bfloat16 and rounds_natively() else nullcontext()


@contextmanager
def _precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def exact(multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> bool:
    """Return whether `multiply` computes products of float32 matrices in float32 with the current settings."""
    x = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    return bool((multiply(x, x).double() - x.double() @ x.double()).abs().max() < _TOLERANCE)
