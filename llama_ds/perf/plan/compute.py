"""Time model of one GPU's matrix products, attention and pointwise kernels, in seconds. Measurements take precedence.

A product of (M x K) and (K x N) is cut into tiles, which the multiprocessors compute in waves; the last wave may be
nearly empty (NVIDIA, "Matrix Multiplication Background"). A tile reads (tm + tn) K elements for tm tn K products, so
small tiles are slower. Start and end of a tile cost as much as some columns of K.
"""

from __future__ import annotations

import math
from functools import lru_cache

from llama_ds.perf.plan.hardware import Hardware

_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
_TILE_TRAFFIC = 12.0  # a t x t tile has 1 / (1 + 2 * this / t) of the speed of an infinite tile
_ALIGNED = 64  # elements of 16 bits, 128 bytes in all
_BARE_SHARE = 0.03  # share of the peak without tensor cores: products of unaligned heads (runs of BLOOM's prototypes)
_SPLITS = (1, 2, 4, 8)  # split-K factors
_HALF_ROW = 256  # sequence length at which fused attention reaches half of its final rate
_HALF_HEAD = 32  # head size at which it reaches half of its final rate


@lru_cache(maxsize=200_000)
def gemm(gpu: Hardware, m: int, n: int, k: int, batch: int = 1) -> float:
    """Return the time of `batch` products of (m, k) and (k, n)."""
    if gpu.curves and gpu.curves.products:
        return 2.0 * m * n * k * batch / gpu.curves.products.flops_per_second(m, n, k)
    fit = gpu.calibration
    rate = gpu.peak / gpu.processors * fit.gemm_ceiling
    align = math.gcd(math.gcd(k, n), _ALIGNED)
    if align < 8 and batch > 1:
        return 2.0 * m * n * k * batch / (gpu.peak * _BARE_SHARE)
    rate *= fit.misaligned ** (math.log2(_ALIGNED / align) / 3)
    best = math.inf
    for tm, tn in _TILES:
        tiles = -(-m // tm) * -(-n // tn) * batch
        speed = rate / (1 + _TILE_TRAFFIC * (1 / tm + 1 / tn)) * (1 + _TILE_TRAFFIC * (1 / 256 + 1 / 128))
        for split in _SPLITS:
            waves = -(-tiles * split // gpu.processors)
            time = waves * 2.0 * tm * tn * (k / split + fit.gemm_ramp) / speed
            best = min(best, time)
            if tiles * split >= gpu.processors:
                break
    numbers = batch * (m * k + k * n + m * n)
    return max(best, gpu.element_bytes * numbers / bandwidth(gpu))


def fp8_gemm(gpu: Hardware, m: int, n: int, k: int) -> float:
    """Return the time of a product in float8, without the quantisation of its factors.

    Nobody has measured it: it is that in bf16, sped up as the peaks say.
    """
    speedup = gpu.fp8_speedup
    assert speedup is not None
    return gemm(gpu, m, n, k) / speedup


def bandwidth(gpu: Hardware) -> float:
    """Return the memory bandwidth that pointwise kernels reach, in bytes/s."""
    return gpu.bandwidth_gb_s * 1e9 * gpu.calibration.memory


def pointwise(gpu: Hardware, bytes_moved: float, kind: str = "forward") -> float:
    """Return the time of kernels that move `bytes_moved`; `kind` is a field of `curves.Kernels`."""
    if gpu.curves and gpu.curves.kernels:
        return bytes_moved / getattr(gpu.curves.kernels, kind).bytes_per_second(bytes_moved)
    return bytes_moved / bandwidth(gpu)


def flash_attention(gpu: Hardware, rows: int, seq_len: int, heads: int, head_dim: int) -> tuple[float, float]:
    """Return (forward, backward) of fused causal attention: 2 and 5 products over half of the T x T square.

    The kernel is FlashAttention-2, or the measured one.

    Args:
        rows: sequences of a micro-batch.
        heads: attention heads on this rank.
    """
    product = 2.0 * rows * heads * head_dim * seq_len * (seq_len + 1) / 2
    if gpu.curves and gpu.curves.attention:
        forward, backward = gpu.curves.attention.flops_per_second(seq_len, head_dim)
        return 2 * product / forward, 5 * product / backward
    ramp = seq_len / (seq_len + _HALF_ROW) * head_dim / (head_dim + _HALF_HEAD) * (128 + _HALF_HEAD) / 128
    fit = gpu.calibration
    forward, backward = fit.flash_forward * gpu.peak * ramp, fit.flash_backward * gpu.peak * ramp
    return 2 * product / forward, 5 * product / backward


def plain_attention(gpu: Hardware, rows: int, seq_len: int, heads: int, head_dim: int) -> tuple[float, float]:
    """Return (forward, backward) of the products of unfused attention: 2 and 4 over the full T x T square."""
    batch = rows * heads
    scores = gemm(gpu, seq_len, seq_len, head_dim, batch)
    values = gemm(gpu, seq_len, head_dim, seq_len, batch)
    return scores + values, 2 * (scores + values)
