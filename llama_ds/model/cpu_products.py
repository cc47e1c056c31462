"""Which library multiplies float32 matrices on a CPU.

torch has MKL do it, which on processors that are not Intel's reaches half of what they can (AMD EPYC, Zen 5, two cores:
210 of 450 GFLOP/s). oneDNN, which torch ships too, does not mind the maker, but torch gives it float32 products only
where they may be rounded to bfloat16 ("medium" precision). oneDNN rounds on processors with AMX alone; elsewhere its
products are as exact as MKL's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llama_ds.machine import cpu_vendor

_SLOW_IN_MKL = ("AuthenticAMD", "HygonGenuine")  # as /proc/cpuinfo names them
_ROUNDING_ALLOWED = "medium"
_ROUNDING = 1e-5  # of a sum of 64 products of size 1, in float32; rounded to bfloat16 they would be off by 1e-2


def choose_products() -> None:
    """Have oneDNN multiply float32 matrices, in this whole process, where that is faster and just as exact."""
    if cpu_vendor() not in _SLOW_IN_MKL:
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(_ROUNDING_ALLOWED)
    if not exact():
        torch.set_float32_matmul_precision(before)


def onednn_multiplies() -> bool:
    """Tell whether `choose_products` found that it should."""
    return torch.get_float32_matmul_precision() == _ROUNDING_ALLOWED


def exact(multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> bool:
    """Tell whether float32 matrices are, as set at present, multiplied in float32."""
    x = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    return bool((multiply(x, x).double() - x.double() @ x.double()).abs().max() < _ROUNDING)
