"""What training programs do differently from those in `program.py`, counted in their code.

Each function returns the program with one such difference; `rows.py` chooses them by what a row's note states.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from llama_ds.perf.plan.program import MEGATRON, MEGATRON_BF16, OURS, MemoryTraffic, Program

# RMSNorm as Meta published it, one kernel for each operation, in fp32: cast 6, square 8, mean 4, product 8, cast 6,
# product with the weight 4. The backward: products with the weight 10, cast 6, product 20, square 12, sum 12, cast 6.
# In place of 4 and 6 bytes in one kernel, twice a layer; the fp32 input and the normalized output are kept. At one
# time the backward needs 16 bytes besides the gradient that it passes on (`tests/perf/test_plan_counted_memory.py`).
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
        norm_working=16,
    )


@cache
def with_fused_loss(program: Program) -> Program:
    """Return a program whose loss overwrites the 16-bit logits with their gradient."""
    return replace(program, name=f"{program.name}_loss", logits=OURS.logits, kept_logits=4)


@cache
def with_small_logits(program: Program) -> Program:
    """Return a program whose loss is torch's cross entropy of 16-bit logits.

    It keeps logits, log-softmax and the gradients of both: reads and writes of 2 bytes, softmax and its backward, and
    the zeros into which the gradient of the picked logits is written.
    """
    return replace(program, name=f"{program.name}_small_logits", logits=MemoryTraffic(4, 8), kept_logits=8)


@cache
def with_fused_head(program: Program) -> Program:
    """Return a program that computes head and loss by parts of the tokens, each as large as a hidden state (Liger).

    The kernel reads the logits of a part twice and writes their gradient; the backward has only products.
    """
    return replace(program, name=f"{program.name}_head", logits=MemoryTraffic(8, 0), kept_logits=0)


@cache
def with_small_gradients(program: Program) -> Program:
    """Return a program that accumulates and reduces gradients in 16 bits."""
    return replace(program, name=f"{program.name}_16", reduced_bytes=2, gradient_bytes=2, accumulation=6)


@cache
def with_gradient_buffers(program: Program) -> Program:
    """Return a program with gradients in buffers of its own, which exist before the backward."""
    return replace(program, name=f"{program.name}_buffers", plain_torch=False)


@cache
def with_bf16_reduction(program: Program) -> Program:
    """Return a program that sends gradients in bf16."""
    return replace(program, name=f"{program.name}_bf16_sums", reduced_bytes=2)


@cache
def with_bf16_states(program: Program) -> Program:
    """Return a program whose AdamW has weights, gradients and moments in bf16, and no fp32 weights.

    By torch's operations on lists of tensors: norm 2, clipping 4, decay 4, first moment 6, second 10, root 4, quotient
    4, sum 4, update 8. The roots of all second moments are a list of their own.
    """
    return replace(program, name=f"{program.name}_bf16_states", state_bytes=4, optimizer_bytes=46, step_bytes=2)


@cache
def with_fused_optimizer(program: Program) -> Program:
    """Return a program with torch's fused AdamW, one kernel, beside norm and clipping of the gradients."""
    bytes_moved = 20 if program.state_bytes == 4 else OURS.optimizer_bytes
    return replace(program, name=f"{program.name}_fused_update", optimizer_bytes=bytes_moved, step_bytes=0)


@cache
def with_fused_swiglu(program: Program) -> Program:
    """Return a program with a kernel for SwiGLU, which keeps its inputs and its result."""
    return replace(program, name=f"{program.name}_swiglu", inner=OURS.inner, kept_inner=6)


@cache
def with_recomputed_swiglu(program: Program) -> Program:
    """Return a program with a kernel for SwiGLU, which keeps its inputs and computes its result again (6 bytes)."""
    inner = MemoryTraffic(OURS.inner.forward, OURS.inner.backward + 6)
    return replace(program, name=f"{program.name}_swiglu_again", inner=inner, kept_inner=4)


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
def with_megatron(program: Program) -> Program:
    """Return a program with Megatron-LM's padding of the vocabulary, loss in fp32 and order of activations."""
    return replace(
        program,
        name=f"{program.name}_megatron",
        padded_vocab=MEGATRON.padded_vocab,
        logits=MEGATRON.logits,
        kept_logits=MEGATRON.kept_logits,
        sequence_first=True,
        plain_torch=False,
    )


@cache
def with_deepspeed(program: Program) -> Program:
    """Return a program with DeepSpeed's buckets, into which gradients are copied and divided, and its optimizer.

    Its hooks around every module and weight of a layer of transformers, which gather, count and release, take a host
    12.4 ms by ZeRO-3 where the layer's 120 kernels take it 2.5 ms
    (docs/measurements/2026-11-30-planner-fourth-rows.md).
    """
    return replace(
        program,
        name=f"{program.name}_deepspeed",
        zero3_launches=(300, 245),
        buffers_gib=MEGATRON.buffers_gib,
        optimizer_bytes=MEGATRON.optimizer_bytes,
        step_copies=8,
        plain_torch=False,
    )


@cache
def with_megatron_deepspeed(program: Program) -> Program:
    """Return a LLaMA program with the host's work for a layer of Megatron-DeepSpeed, 79 and 60 launches.

    Counted and timed in docs/measurements/2026-11-30-planner-deepspeed-pipeline.md, as are the next three.
    """
    more = max(0, 79 - program.kernels_forward), max(0, 60 - program.kernels_backward)
    return replace(program, name=f"{program.name}_megatron_ds", host_launches=more)


@cache
def with_bf16_optimizer(program: Program) -> Program:
    """Return a program whose gradients DeepSpeed's BF16_Optimizer accumulates, for 7 launches, sums and clips."""
    forward, backward = program.host_launches
    return replace(
        program,
        name=f"{program.name}_bf16_optimizer",
        reduced_bytes=MEGATRON_BF16.reduced_bytes,
        accumulation=MEGATRON_BF16.accumulation,
        gradient_bytes=MEGATRON_BF16.gradient_bytes,
        optimizer_bytes=MEGATRON_BF16.optimizer_bytes,
        end_passes=MEGATRON_BF16.end_passes,
        step_copies=0,
        host_launches=(forward, backward + 7),
    )


@cache
def with_zeroed_gradients(program: Program) -> Program:
    """Return a program that zeroes 16-bit gradients before a backward 2, which adds to them 6 instead of replacing."""
    return replace(program, name=f"{program.name}_zeroed", accumulation=program.accumulation + 8)


@cache
def with_host_mask(program: Program) -> Program:
    """Return a program that builds a causal mask on one core of the host, while the GPU waits for the batch."""
    return replace(program, name=f"{program.name}_mask", mask_launches=8.6e-5)


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
    cast to fp32 6, softmax 8, cast 6; the backward reads and writes as much again with one more operand: 38. Scores in
    16 bits exist beside those kept, with torch's operations also in fp32.
    """
    traffic, kept, working = (MemoryTraffic(4, 6), 2, 2) if fused_softmax else (MemoryTraffic(28, 38), 6, 6)
    name = f"{program.name}_scores"
    return replace(program, name=name, flash=False, scores=traffic, kept_scores=kept, scores_working=working)


@cache
def with_attention(program: Program, kernel: str) -> Program:
    """Return a program with this kernel for its fused attention."""
    return replace(program, name=f"{program.name}_{kernel}", attention=kernel)
