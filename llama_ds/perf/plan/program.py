"""Work of training programs besides matrix products: memory traffic, kernels, overlap.

All numbers are counted in the programs' code, not fitted. `program_options.py` has what some of them do differently.

Memory traffic is in bytes per element of an activation. Every kernel reads its inputs and writes its outputs once, in
16 bits (dropout masks 1 byte). A layer has activations of N x D (hidden), N x F (inner) and, without fused attention,
H x T x T (scores).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llama_ds.perf.plan.kernel_speeds import CUDNN, FLASH_1, FLASH_2, TRITON


@dataclass(frozen=True)
class MemoryTraffic:
    """Bytes moved per element, forward and backward."""

    forward: float
    backward: float


@dataclass(frozen=True, eq=False)  # few constants, in the keys of many caches
class Program:
    """How one training program computes a layer and ends a step."""

    name: str
    gated: bool  # SwiGLU with three matrices; otherwise two matrices
    flash: bool  # fused attention: no T x T scores in memory, masked blocks skipped
    hidden: MemoryTraffic  # norms, residual additions, dropout; N x D elements
    heads: MemoryTraffic  # q, k, v and attention output: transposes, rotary embedding, biases
    inner: MemoryTraffic  # activation function; N x F elements
    scores: MemoryTraffic  # softmax, mask, dropout; H x T x T elements; zero with flash
    logits: MemoryTraffic  # loss; N x V elements
    optimizer_bytes: float  # bytes moved per parameter of the optimizer shard and step
    kernels_forward: int  # kernel launches per layer
    kernels_backward: int
    kernels_ends: int  # kernel launches for embedding, head and loss, in each direction
    kernels_message: int  # host work for a message between stages, in kernel launches
    reduced_bytes: int  # bytes of a gradient element in the reduction
    accumulation: float  # bytes moved per weight and micro-batch to accumulate its gradient
    blocking_sends: bool  # a rank blocks until its message has arrived
    overlaps_reduction: bool  # gradient reduction and weight gather overlap computation
    overlaps_tensor: bool  # collectives of the backward overlap the weight gradients
    sums_at_end: bool = False  # DeepSpeed without a pipeline, below ZeRO-2: one all-reduce after the last gradient
    broadcasts: bool = (
        False  # ZeRO-1 sums all gradients on all ranks; each rank broadcasts its tensors after the update
    )
    zero3_launches: tuple[int, int] = (0, 0)  # host's work for a layer's weights in forward, backward, in launches
    host_launches: tuple[int, int] = (0, 0)  # host's work for a layer besides its kernels, forward and backward
    mask_launches: float = 0  # host's work for each element of a T x T mask, on the first and last stage, in launches
    sums_norms: bool = False  # all-reduce of each norm's gradient per micro-batch under sequence parallelism
    gradient_bytes: float = 4  # bytes kept per parameter until the step
    # No buffers besides torch's: without replicas, gradients are made in the first backward, as activations go, and are
    # gone after the step. Under ZeRO-3 (FSDP), the unit that holds embedding and head stays gathered.
    plain_torch: bool = False
    state_bytes: float = 12  # bytes kept per parameter by the optimizer: fp32 weights and two moments
    step_bytes: float = 0  # bytes per parameter of the optimizer's temporary lists of tensors
    keeps_outputs: int = 0  # 1: pipeline buffers keep a stage's outputs as well as its inputs (DeepSpeed)
    padded_vocab: int = 1  # the vocabulary is padded to a multiple of this and tp
    element_bytes: int = 2  # bytes of an element; the traffic scales with it
    attention: str = FLASH_2  # kernel of its fused attention (`kernel_speeds.py`)
    copies: MemoryTraffic = MemoryTraffic(0, 0)  # around attention, on tensors as large as the queries
    separate: tuple[bool, bool] = (False, False)  # whether q, k, v and gate, up are products of their own
    own_sums: bool = False  # each product of an input sums its input gradient over tp, without sequence parallelism
    sums_beside_weights: bool = False  # these sums overlap the product's own weight gradient
    step_copies: float = 0  # bytes moved per weight on a rank to fill and empty the reduction's buckets
    end_passes: float = 0  # bytes moved per weight on a rank at a step's end, below ZeRO-2, besides the update
    waits_for_reduction: bool = False  # ZeRO-2 sums each gradient before the backward goes on
    overlaps_forward: bool = False  # products overlap the tensor-parallel collectives beside them, in tp chunks
    shared_links: int = 1  # collectives over all ranks of a node use one of so many shares of its network links
    buffers_gib: float = 0  # buckets for reduction and gather, outside of what memory.py counts
    kept_norm: float = 4  # bytes of a norm kept for its backward, per element of N x D
    norm_working: float = 0  # bytes of a norm's backward, less what it frees, besides the gradient passed on; likewise
    kept_inner: float = 8  # bytes of the activation function's inputs and results kept, per element of N x F
    kept_scores: float = 0  # bytes of attention scores kept, per element of H x T x T, with recompute none
    scores_working: float = 0  # bytes of scores besides these while they are computed; likewise
    sequence_first: bool = False  # activations are [sequence, batch, hidden]: what attention copies and keeps
    kept_logits: float = 10  # bytes of logits and their gradient at the loss, per element of N x V


# RMSNorm takes 4 and 6 bytes, twice; two residual additions take 6 each. Rotary embedding reads and writes q and k.
# SwiGLU reads gate and up and writes one output; its backward reads three and writes two (`model/pointwise.py`).
# Fused AdamW reads weight, gradient and two moments in fp32 and writes three of them and the 16-bit weight: 30 bytes.
# Gradient norm and zeroing take 8.
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
    zero3_launches=(75, 80),
    sums_norms=True,
)

# In fp32 there are no master weights, and products accumulate into the gradients in place.
OURS_FP32 = replace(OURS, name="llama_ds_fp32", element_bytes=4, optimizer_bytes=36, accumulation=8)

# Megatron-LM and Megatron-DeepSpeed, 2021-23: two LayerNorms (4; 10 with the weights' gradients), two fused
# bias-dropout-additions (7; 5 and a residual sum of 6), bias sums. q, k, v are split from one tensor by a copy. Fused
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
    # DeepSpeed's buckets of 5e8 elements in 16 bits, two for reductions and one for gathers.
    buffers_gib=3 * 5e8 * 2 / 2**30,
)

# The same in bf16 by DeepSpeed's BF16_Optimizer: a gradient is cast to fp32 6 and added 12, and kept in both. At a
# step's end, a rank's gradients are cast to bf16 6, summed (2 bytes twice, as 4 once), divided 4, cast back 6, copied
# in place 8, their norm taken 4, clipped 8 and zeroed 4; its share of the states is updated 28 and cast 6.
MEGATRON_BF16 = replace(
    MEGATRON,
    name="megatron_bf16",
    reduced_bytes=4,
    accumulation=18,
    gradient_bytes=6,
    optimizer_bytes=34,
    end_passes=40,
)

# Megatron-LM itself, without DeepSpeed's buckets; a stage's outputs are freed once they are sent. In bf16 a gradient is
# read 2 and added to the only kept one, in fp32, 8; at a step's end as LLAMA below.
MEGATRON_LM = replace(MEGATRON, name="megatron_lm", keeps_outputs=0, buffers_gib=0)
MEGATRON_LM_BF16 = replace(
    MEGATRON_LM, name="megatron_lm_bf16", reduced_bytes=4, accumulation=10, gradient_bytes=4, end_passes=16
)

# MosaicML llm-foundry on PyTorch FSDP: LayerNorm in 16 bits, no dropout, biases whose gradients need one more read,
# GELU, fused attention, multi-tensor AdamW. Its fused loss keeps the logits and their gradient in 16 bits.
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
    attention=TRITON,
    kept_logits=4,
    plain_torch=True,
)
# GPT-NeoX on DeepSpeed: Megatron's layer with fused attention, without dropout.
NEOX = replace(
    MEGATRON,
    name="neox",
    flash=True,
    attention=FLASH_1,
    scores=MemoryTraffic(0, 0),
    kernels_forward=30,
    kernels_backward=48,
)

# DeepSpeed's ZeRO-3 of 2021 below Megatron's layers: one ring over all ranks, which enters and leaves a node of eight
# links over one of them. Steps of 174.6B on 768 and 1,536 GPUs, and of 529.6B on 1,120 and 2,240, take the same time
# whatever they compute: three times the weights' bytes over one link.
ZERO3_2021 = replace(MEGATRON, name="zero3_2021", shared_links=8)

# LLaMA layers by autograd, as in nanotron, torchtitan and FSDP: a kernel for each norm, several for the activation
# function. All logits at once in fp32: cast 6, log-softmax 8; backward: gradient of the picked logits 4, log-softmax
# 12, cast 6.
AUTOGRAD = replace(
    OURS,
    name="autograd",
    sums_at_end=False,
    zero3_launches=(0, 0),
    sums_norms=False,
    hidden=MemoryTraffic(28, 44),
    heads=MemoryTraffic(8, 12),
    inner=MemoryTraffic(10, 16),
    kernels_forward=30,
    kernels_backward=56,
    logits=MemoryTraffic(14, 22),
    overlaps_tensor=False,
    blocking_sends=True,
    kept_logits=14,
    plain_torch=True,
)

# The same in programs after Megatron-LM of 2023: ZeRO-1's or DDP's reduction starts after the last backward. All of a
# rank's fp32 gradients, not only its share, are divided by the number of ranks 8 and zeroed 4, and gathered weights are
# copied out of the gradients' buffer 4 (`distrib_optimizer.py`).
LLAMA = replace(AUTOGRAD, name="llama", overlaps_reduction=False, end_passes=16, plain_torch=False)

# Megatron-Core with Transformer Engine: fused kernels as ours, gradients in bf16, the tensor-parallel collectives in
# chunks beside their products.
NEMO = replace(
    OURS,
    name="nemo",
    sums_at_end=False,
    reduced_bytes=2,
    gradient_bytes=2,
    accumulation=6,
    kept_inner=6,
    overlaps_forward=True,
    attention=CUDNN,
)
NEMO_GPT = replace(NEMO, name="nemo_gpt", gated=False, inner=MemoryTraffic(4, 8), heads=MemoryTraffic(6, 8))
