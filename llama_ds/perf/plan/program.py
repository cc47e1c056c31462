"""Work of training programs besides matrix products: memory traffic, kernels, overlap.

All numbers are counted in the programs' code, not fitted.

Memory traffic is in bytes per element of an activation. Every kernel reads its inputs and writes its outputs once, in
16 bits (dropout masks 1 byte). A layer has activations of N x D (hidden), N x F (inner) and, without fused attention,
H x T x T (scores).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

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
    sums_norms: bool = False  # all-reduce of each norm's gradient per micro-batch under sequence parallelism
    gradient_bytes: float = 4  # bytes kept per parameter until the step
    keeps_outputs: int = 0  # 1: pipeline buffers keep a stage's outputs as well as its inputs (DeepSpeed)
    padded_vocab: int = 1  # the vocabulary is padded to a multiple of this and tp
    element_bytes: int = 2  # bytes of an element; the traffic scales with it
    attention: str = FLASH_2  # kernel of its fused attention (`kernel_speeds.py`)
    copies: MemoryTraffic = MemoryTraffic(0, 0)  # around attention, on tensors as large as the queries
    separate: tuple[bool, bool] = (False, False)  # whether q, k, v and gate, up are products of their own
    own_sums: bool = False  # each product of an input sums its input gradient over tp, without sequence parallelism
    sums_beside_weights: bool = False  # these sums overlap the product's own weight gradient
    step_copies: float = 0  # bytes moved per weight on a rank to fill and empty the reduction's buckets
    waits_for_reduction: bool = False  # ZeRO-2 sums each gradient before the backward goes on
    overlaps_forward: bool = False  # products overlap the tensor-parallel collectives beside them, in tp chunks
    shared_links: int = 1  # collectives over all ranks of a node use one of so many shares of its network links
    buffers_gib: float = 0  # buckets for reduction and gather, outside of what memory.py counts
    kept_norm: float = 4  # bytes of a norm kept for its backward, per element of N x D
    kept_inner: float = 8  # bytes of the activation function's inputs and results kept, per element of N x F
    kept_scores: float = 0  # bytes of attention scores kept, per element of H x T x T, with recompute none
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
    buffers_gib=4,  # the remainder of 41 runs by DeepSpeed, at any size: its two buckets of 5e8 elements, and NCCL's
)

# The same in bf16: gradients accumulate in fp32, in addition to those in 16 bits.
MEGATRON_BF16 = replace(MEGATRON, name="megatron_bf16", reduced_bytes=4, accumulation=14, gradient_bytes=6)

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
)

# The same in programs after Megatron-LM of 2023: ZeRO-1's or DDP's reduction starts after the last backward.
LLAMA = replace(AUTOGRAD, name="llama", overlaps_reduction=False)

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

# RMSNorm as Meta published it, one kernel for each operation, in fp32: cast 6, square 8, mean 4, product 8, cast 6,
# product with the weight 4. The backward: products with the weight 10, cast 6, product 20, square 12, sum 12, cast 6.
# In place of 4 and 6 bytes in one kernel, twice a layer; the fp32 input and the normalized output are kept.
_NORM_KERNELS = (7, 12)


@cache
def with_plain_norms(program: Program) -> Program:
    """Return a LLaMA program whose norms are computed operation by operation."""
    return replace(
        program,
        name=f"{program.name}_norms",
        hidden=MemoryTraffic(program.hidden.forward + 2 * (36 - 4), program.hidden.backward + 2 * (66 - 6)),
        kernels_forward=program.kernels_forward + 2 * (_NORM_KERNELS[0] - 1),
        kernels_backward=program.kernels_backward + 2 * (_NORM_KERNELS[1] - 1),
        kept_norm=8,
    )


@cache
def with_fused_loss(program: Program) -> Program:
    """Return a program whose loss overwrites the 16-bit logits with their gradient."""
    return replace(program, name=f"{program.name}_loss", logits=OURS.logits, kept_logits=4)


@cache
def with_small_gradients(program: Program) -> Program:
    """Return a program that accumulates and reduces gradients in 16 bits."""
    return replace(program, name=f"{program.name}_16", reduced_bytes=2, gradient_bytes=2, accumulation=6)


@cache
def with_bf16_reduction(program: Program) -> Program:
    """Return a program that sends gradients in bf16."""
    return replace(program, name=f"{program.name}_bf16_sums", reduced_bytes=2)


@cache
def with_fused_swiglu(program: Program) -> Program:
    """Return a program with a kernel for SwiGLU, which keeps its inputs and its result."""
    return replace(program, name=f"{program.name}_swiglu", inner=OURS.inner, kept_inner=6)


@cache
def with_plain_rotation(program: Program) -> Program:
    """Return a program whose rotary embedding is computed operation by operation.

    Of queries and keys, half of the elements that `heads` counts: negation of one half 2, concatenation 4, two products
    8, sum 6; backward: two products 8, two padded slices 8, their sum 6, negation 2, sum 6. In place of 4 and 6 bytes.
    """
    heads = MemoryTraffic(program.heads.forward + (20 - 4) / 2, program.heads.backward + (30 - 6) / 2)
    return replace(program, name=f"{program.name}_rotation", heads=heads)


@cache
def with_cast_norms(program: Program) -> Program:
    """Return a LLaMA program whose norms, each a kernel, read fp32 copies of the residuals.

    Cast 6 and norm 6 in place of 4; backward: norm 10 and cast 6 in place of 6. The copy and the result are kept.
    """
    hidden = MemoryTraffic(program.hidden.forward + 2 * (12 - 4), program.hidden.backward + 2 * (16 - 6))
    return replace(program, name=f"{program.name}_cast", hidden=hidden, kept_norm=6)


@cache
def with_broadcasts(program: Program) -> Program:
    """Return a program whose ZeRO-1 broadcasts whole tensors, as InternLM's does."""
    return replace(program, name=f"{program.name}_broadcasts", broadcasts=True)


@cache
def with_megatron_vocabulary(program: Program) -> Program:
    """Return a program with Megatron-LM's padding of the vocabulary, and its loss in fp32."""
    return replace(program, name=f"{program.name}_padded", padded_vocab=MEGATRON.padded_vocab, logits=MEGATRON.logits)


@cache
def with_deepspeed(program: Program) -> Program:
    """Return a program with DeepSpeed's buckets, into which gradients are copied and divided, and its optimizer."""
    return replace(
        program,
        name=f"{program.name}_deepspeed",
        buffers_gib=MEGATRON.buffers_gib,
        optimizer_bytes=MEGATRON.optimizer_bytes,
        step_copies=8,
    )


@cache
def with_separate_gate(program: Program) -> Program:
    """Return a program that multiplies gate and up one after the other."""
    return replace(program, name=f"{program.name}_gate", separate=(False, True))


@cache
def with_separate_products(program: Program) -> Program:
    """Return a program that multiplies queries, keys, values, gate and up one after the other."""
    return replace(program, name=f"{program.name}_separate", separate=(True, True))


@cache
def with_transformers(program: Program) -> Program:
    """Return a program with transformers' LLaMA: separate products, and a loss of shifted logits in fp32.

    Cast 6, copy of all tokens but the last 8, log-softmax 8; backward: gradient of the picked logits 4, log-softmax 12,
    the copy's gradient among zeros 12, cast 6.
    """
    changed = with_separate_products(program)
    return replace(changed, name=f"{changed.name}_hf", logits=MemoryTraffic(22, 34), kept_logits=18)


@cache
def with_copies(program: Program, forward: float, backward: float) -> Program:
    """Return a program that moves these bytes for each element of the queries around attention.

    Keys and values repeated to all heads: written 4; their gradients read 4. Repeated before rotation (litgpt): written
    with the queries 8, rotated 20, queries and keys concatenated 8; gradients 8, 30 and 8. Rows unpadded: three tensors
    gathered 12, the result scattered 6; three gradients scattered 18, one gathered 4.
    """
    copies = MemoryTraffic(program.copies.forward + forward, program.copies.backward + backward)
    return replace(program, name=f"{program.name}_copies", copies=copies)


@cache
def with_own_sums(program: Program) -> Program:
    """Return a program in which each column-parallel product sums its input gradient, and waits for it.

    So Paddle's `_c_identity`: five all-reduces in the backward of a layer with separate products, not two.
    """
    return replace(program, name=f"{program.name}_sums", own_sums=True)


@cache
def with_sums_beside_weights(program: Program) -> Program:
    """Return a program whose products sum their input gradients while they compute their weight gradients."""
    return replace(program, name=f"{program.name}_beside", own_sums=True, sums_beside_weights=True)


@cache
def with_waiting_reduction(program: Program) -> Program:
    """Return a program whose ZeRO-2 sums each gradient on the stream of the computation, as Paddle's stage 2."""
    return replace(program, name=f"{program.name}_waiting", waits_for_reduction=True)


@cache
def with_recomputed_norms(program: Program) -> Program:
    """Return a program that computes norms of fp32 copies again in the backward: twice 12 bytes, and a sum of 6."""
    hidden = MemoryTraffic(program.hidden.forward, program.hidden.backward + 30)
    return replace(program, name=f"{program.name}_again", hidden=hidden, kept_norm=4)


@cache
def with_plain_optimizer(program: Program) -> Program:
    """Return a program whose update is computed operation by operation, on gradients from buckets.

    Sum of an fp32 copy 10, norm 2, flattening 4, cast 6, clipping 8, AdamW 88, cast of the weights 6. AdamW: decay 8,
    product and sum of the first moment 20, of the second 20, root, quotient and sum 24, update 16. Gradients are copied
    into a bucket, divided and copied back.
    """
    return replace(program, name=f"{program.name}_update", optimizer_bytes=124, step_copies=12)


@cache
def with_biases(program: Program) -> Program:
    """Return a program that adds biases to q, k, v, gate and up, each 4 bytes, and sums all biases' gradients, 2."""
    heads = MemoryTraffic(program.heads.forward + 3, program.heads.backward + 1.5)
    hidden = MemoryTraffic(program.hidden.forward, program.hidden.backward + 4)
    inner = MemoryTraffic(program.inner.forward + 8, program.inner.backward + 4)
    return replace(program, name=f"{program.name}_biases", hidden=hidden, heads=heads, inner=inner)


@cache
def without_flash(program: Program, fused_softmax: bool) -> Program:
    """Return a LLaMA program whose attention computes all scores.

    Megatron's scaled masked softmax is one kernel: 4 and 6 bytes, and its output is kept. Of torch, scale 4, mask 4,
    cast to fp32 6, softmax 8, cast 6; the backward reads and writes as much again with one more operand: 38.
    """
    traffic, kept = (MemoryTraffic(4, 6), 2) if fused_softmax else (MemoryTraffic(28, 38), 6)
    return replace(program, name=f"{program.name}_scores", flash=False, scores=traffic, kept_scores=kept)


@cache
def with_attention(program: Program, kernel: str) -> Program:
    """Return a program with this kernel for its fused attention."""
    return replace(program, name=f"{program.name}_{kernel}", attention=kernel)
