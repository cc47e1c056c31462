"""What a program does in a decoder layer besides its matrix products: facts read off its code, not fitted.

Memory traffic is in bytes for each number of an activation, every kernel reading its inputs and writing its outputs
once, in 16 bits (dropout masks 1 byte). A layer has activations of N x D (hidden), N x F (inner) and, without fused
attention, H x T x T (scores).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class MemoryTraffic:
    """Bytes moved for each number, forward and backward."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Program:
    """How one training program computes a layer and ends a step."""

    name: str
    gated: bool  # SwiGLU with three matrices; else two
    flash: bool  # attention never writes T x T scores, and skips the half that causality leaves out
    hidden: MemoryTraffic  # norms, residual additions, dropout: numbers N x D
    heads: MemoryTraffic  # of q, k, v and the attention's result: transposes, rotation, biases
    inner: MemoryTraffic  # the activation function: numbers N x F
    scores: MemoryTraffic  # softmax, mask, dropout: numbers H x T x T; zero with flash
    logits: MemoryTraffic  # of the loss: numbers N x V
    optimizer_bytes: float  # moved for each parameter of the optimizer's part in a step
    kernels_forward: int  # kernels that the host starts for a layer
    kernels_backward: int
    kernels_ends: int  # and for embedding, head and loss, in each direction
    kernels_message: int  # calls and checks around a message between stages, counted as kernels
    reduced_bytes: int  # of a gradient, as it is reduced
    accumulation: float  # bytes moved for each weight in each micro-batch to add its gradient to the sum
    blocking_sends: bool  # a rank waits until its message has arrived
    overlaps_reduction: bool  # gradients are reduced, and weights gathered, while others are computed
    overlaps_tensor: bool  # collectives of the backward run beside the weights' gradients
    sums_at_end: bool = False  # one stage, below ZeRO-2: all gradients are summed when the last is there (DeepSpeed)
    sums_norms: bool = False  # under sequence parallelism, of each norm's gradient and micro-batch
    rows_copied: float = 0  # bytes moved for each number that a gather or reduce-scatter of several rows reorders
    gradient_bytes: float = 4  # kept for each parameter until the step
    keeps_outputs: int = 0  # 1: a stage's outputs are kept beside its inputs, as DeepSpeed's pipeline buffers are
    padded_vocab: int = 1  # the vocabulary is padded to a multiple of this and tp
    element_bytes: int = 2  # of a number; traffic is scaled by it


# RMSNorm 4 and 6 bytes, twice; two residual additions of 6. Rotation reads and writes q and k. SwiGLU reads gate and up
# and writes one; backward reads three, writes two (`model/pointwise.py`). Fused AdamW reads weight, gradient and two
# moments in fp32 and writes three and the 16-bit weight, 30 bytes; the norm and zeroing read and write 8.
OURS = Program(
    "llama_ds",
    gated=True,
    flash=True,
    hidden=MemoryTraffic(20, 24),
    heads=MemoryTraffic(4, 6),
    inner=MemoryTraffic(6, 10),
    scores=MemoryTraffic(0, 0),
    logits=MemoryTraffic(10, 10),
    optimizer_bytes=38,
    kernels_forward=16,
    kernels_backward=32,
    kernels_ends=16,
    kernels_message=6,
    reduced_bytes=4,
    accumulation=10,
    blocking_sends=False,
    overlaps_reduction=True,
    overlaps_tensor=True,
    sums_at_end=True,
    sums_norms=True,
    rows_copied=4,
)

# In fp32 there is no second copy of the weights, and products are added to the gradients in place.
OURS_FP32 = replace(OURS, name="llama_ds_fp32", element_bytes=4, optimizer_bytes=36, accumulation=8)

# Megatron-LM and Megatron-DeepSpeed, 2021-23: two LayerNorms (4; 10 with the weights' gradients), two fused
# bias-dropout-additions (7; 5 and a residual sum of 6), bias sums. q, k, v are copied out of one tensor. Fused
# bias-GELU. Scaled masked softmax 4 and 6, dropout 5 and 5. The vocabulary-parallel loss in fp32: cast 6, maximum 4,
# difference 8, exponential 8, sum 4, quotient 8; backward 8, cast 6. Optimizer: unscaling and checks 8, clipping 12,
# copies between 16 bits and fp32 14, Adam 28.
MEGATRON = Program(
    "megatron",
    gated=False,
    flash=False,
    hidden=MemoryTraffic(22, 46),
    heads=MemoryTraffic(6, 8),
    inner=MemoryTraffic(4, 8),
    scores=MemoryTraffic(9, 11),
    logits=MemoryTraffic(38, 14),
    optimizer_bytes=62,
    kernels_forward=34,
    kernels_backward=56,
    kernels_ends=40,
    kernels_message=24,
    reduced_bytes=2,
    accumulation=8,
    blocking_sends=True,
    overlaps_reduction=False,
    overlaps_tensor=False,
    gradient_bytes=2,
    keeps_outputs=1,
    padded_vocab=128,
)

# The same in bf16: gradients are added up in fp32 beside those in 16 bits.
MEGATRON_BF16 = replace(MEGATRON, name="megatron_bf16", reduced_bytes=4, accumulation=14, gradient_bytes=6)

# MosaicML llm-foundry on PyTorch's FSDP: LayerNorm in 16 bits, no dropout, biases whose gradients read once
# more, GELU, fused attention, torch's loss in fp32, AdamW in passes over lists of tensors.
FSDP = Program(
    "fsdp",
    gated=False,
    flash=True,
    hidden=MemoryTraffic(20, 36),
    heads=MemoryTraffic(6, 10),
    inner=MemoryTraffic(4, 8),
    scores=MemoryTraffic(0, 0),
    logits=MemoryTraffic(14, 14),
    optimizer_bytes=80,
    kernels_forward=24,
    kernels_backward=44,
    kernels_ends=16,
    kernels_message=12,
    reduced_bytes=4,
    accumulation=4,
    blocking_sends=True,
    overlaps_reduction=True,
    overlaps_tensor=False,
)
# GPT-NeoX on DeepSpeed: Megatron's layer with fused attention, without dropout.
NEOX = replace(MEGATRON, name="neox", flash=True, scores=MemoryTraffic(0, 0), kernels_forward=30, kernels_backward=48)

# LLaMA layers by autograd, as nanotron and torchtitan have them: norms and the activation function are several kernels,
# logits exist whole and in fp32.
AUTOGRAD = replace(
    OURS,
    name="autograd",
    sums_at_end=False,
    sums_norms=False,
    rows_copied=0,
    hidden=MemoryTraffic(28, 44),
    heads=MemoryTraffic(8, 12),
    inner=MemoryTraffic(10, 16),
    kernels_forward=30,
    kernels_backward=56,
    overlaps_tensor=False,
    blocking_sends=True,
)

PROGRAMS = {program.name: program for program in (OURS, OURS_FP32, MEGATRON, MEGATRON_BF16, FSDP, NEOX, AUTOGRAD)}
