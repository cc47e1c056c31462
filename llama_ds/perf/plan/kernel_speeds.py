"""Speeds of fused attention kernels, relative to FlashAttention-2 on the same device.

Table 1 of arXiv 2307.08691 has whole training steps on A100s with heads of 128. From 2,048 to 8,192 tokens a row, a
token of the 1.3B and 2.7B models takes longer by the time of 7 (8192 - 2048) D FLOPs a layer: FlashAttention-2 computes
them at 184 and 185 TFLOP/s (59% of the peak, as `flash_forward` and `flash_backward` of an A100 say), its predecessor
at 79 and 84. The predecessor's heads of 64 fit its registers: 30-50% forward and 25-35% backward of what the other
reaches at 50-73% and up to 63% (section 1). MosaicML's Triton kernel is fitted to its runs up to 65,536 tokens.
"""

from __future__ import annotations

FLASH_1, FLASH_2, TRITON, CUDNN = "FlashAttention-1", "FlashAttention-2", "Triton", "cuDNN"

_LARGE_HEAD = 128
_ON_A100 = {FLASH_1: 0.44, TRITON: 0.525}
# Triton: fitted against the measured FlashAttention-2, 0.65 and 0.73 forward and backward. cuDNN: arXiv 2407.08608,
# figures 5 and 6. Nobody measured the first FlashAttention there.
_ON_H100 = {FLASH_1: 0.44, TRITON: 0.67, CUDNN: 1.8}
_SMALL_HEADS = 0.67
_COMPILED = {FLASH_1: (16, 32, 64, 128), FLASH_2: (32, 64, 96, 128, 160, 192, 224, 256)}


def relative_speed(kernel: str, device: str, head_dim: int) -> float:
    """Return the speed of a kernel over that of FlashAttention-2."""
    if kernel == FLASH_1 and head_dim < _LARGE_HEAD:
        return _SMALL_HEADS
    return (_ON_A100 if device == "A100" else _ON_H100).get(kernel, 1.0)


def padded_head(kernel: str, head_dim: int) -> int:
    """Return the head size that a kernel computes with: the next one for which it was compiled."""
    return next((size for size in _COMPILED.get(kernel, ()) if size >= head_dim), head_dim)
