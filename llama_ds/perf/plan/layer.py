"""Time of a decoder layer, the embedding and the head, for one micro-batch on one rank, in seconds.

D hidden size, F intermediate size, N tokens, H and G query and key-value heads of size K, V vocabulary. The host
launches kernels ahead of the GPU, so a stage takes the longer of host time and GPU time (`step.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from llama_ds.layout.loss_chunks import chunk_tokens
from llama_ds.layout.planned_documents import PlannedRows
from llama_ds.perf.plan.communication import RankGroup, all_gather, all_reduce, contention, layer_sum, reduce_scatter
from llama_ds.perf.plan.compute import flash_attention, fp8_gemm, gemm, plain_attention, pointwise
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import OP, StepJob
from llama_ds.perf.plan.program import MemoryTraffic, Program
from llama_ds.perf.plan.row_sharing import RowSharing, shared_attention


@dataclass(frozen=True)
class Parts:
    """Components of a pass's time. `tensor` is the exposed time of tensor-parallel collectives."""

    matrices: float = 0.0
    attention: float = 0.0
    pointwise: float = 0.0
    tensor: float = 0.0
    host: float = 0.0  # host time, in parallel with the GPU
    context: float = 0.0  # exposed time of context-parallel messages

    @property
    def device(self) -> float:
        return self.matrices + self.attention + self.pointwise + self.tensor + self.context

    def __add__(self, other: Parts) -> Parts:
        return Parts(
            self.matrices + other.matrices,
            self.attention + other.attention,
            self.pointwise + other.pointwise,
            self.tensor + other.tensor,
            self.host + other.host,
            self.context + other.context,
        )

    def __mul__(self, times: float) -> Parts:
        return Parts(
            self.matrices * times,
            self.attention * times,
            self.pointwise * times,
            self.tensor * times,
            self.host * times,
            self.context * times,
        )


@dataclass(frozen=True)
class LayerTime:
    """Times of a layer's passes. A schedule that splits the backward runs its two parts separately."""

    forward: Parts
    recompute: Parts  # runs before the backward
    input_backward: Parts
    weight_backward: Parts
    ahead: float = 0.0  # hidden in the backward by the layer above, which a stage's last layer does not have


def layer_time(gpu: Hardware, job: StepJob, policy: str) -> LayerTime:
    """Return the time of a decoder layer under a save policy."""
    m = job.model
    shape = (m.hidden_size, m.intermediate_size, m.num_attention_heads, m.num_key_value_heads, m.head_dim)
    sizes = job.micro_batch, job.seq_len, job.tp
    rest = job.sequence_parallel, policy, job.sharing, job.split_share, job.attended
    fp8 = job.fp8, job.fp8_weight_gradients, job.fp8_weight_uses
    return _layer(gpu, job.program, shape, *sizes, *rest, fp8)


@lru_cache(maxsize=100_000)
def _layer(
    gpu: Hardware,
    program: Program,
    shape: tuple[int, int, int, int, int],
    rows: int,
    seq_len: int,
    tp: int,
    sequence_parallel: bool,
    policy: str,
    sharing: RowSharing,
    split_share: float,
    documents: PlannedRows,
    fp8: tuple[str, bool, int],
) -> LayerTime:
    hidden, inner, heads, kv_heads, head_dim = shape
    tokens = rows * seq_len // sharing.size
    own = tokens / tp if sequence_parallel else tokens
    local_heads = -(-heads // tp)
    local_kv_heads = -(-kv_heads // tp)
    queries, keys, inner = local_heads * head_dim, local_kv_heads * head_dim, -(-inner // tp)

    products = [
        (hidden, queries + 2 * keys),
        (queries, hidden),
        (hidden, inner * (2 if program.gated else 1)),
        (inner, hidden),
    ]
    scaling, in_fp8, _ = fp8
    multiply = gemm if scaling == "off" else fp8_gemm
    forward_gemm = [multiply(gpu, tokens, n, k) for k, n in products]
    input_gemm = [multiply(gpu, tokens, k, n) for k, n in products]
    weight_gemm = [(fp8_gemm if in_fp8 else gemm)(gpu, k, n, tokens) for k, n in products]

    attend = flash_attention if program.flash else plain_attention
    shared = shared_attention(
        gpu, sharing, attend, rows, seq_len, local_heads, local_kv_heads, head_dim, program.element_bytes, documents
    )
    attention, attention_back = (time / (program.attention if program.flash else 1) for time in shared.attention)
    scale = program.element_bytes / 2
    scores = rows * local_heads * seq_len * seq_len * scale / sharing.size
    score_time = pointwise(gpu, program.scores.forward * scores), pointwise(gpu, program.scores.backward * scores)

    def pointwise_time(forward: bool) -> float:
        def of(traffic: MemoryTraffic) -> float:
            return traffic.forward if forward else traffic.backward

        moved = of(program.hidden) * own * hidden + of(program.inner) * tokens * inner
        moved += of(program.heads) * tokens * (2 * queries + 2 * keys)
        if sequence_parallel and rows > 1:
            moved += 4 * program.rows_copied * tokens * hidden
        return pointwise(gpu, scale * moved, "forward" if forward else "backward")

    sent = _collectives(gpu, RankGroup(tp), float(program.element_bytes) * tokens * hidden, sequence_parallel)
    beside_products = 0.0
    if program.overlaps_forward and tp > 1:  # the last chunk of a product or collective has nothing beside it
        beside = sum(min(time, product) for time, product in zip(sent, forward_gemm, strict=False))
        beside_products = (1 - 1 / tp) * beside * (1 - contention(gpu, RankGroup(tp)))
    quantising = _quantising(gpu, fp8, tokens, products, tp)
    launch, start = gpu.calibration.launch_us * 1e-6, gpu.calibration.kernel_us * 1e-6
    collectives = 8 if tp > 1 else 0  # launches on the host, with the calls around the collectives
    forward = Parts(
        sum(forward_gemm),
        attention + score_time[0],
        pointwise_time(True) + start * program.kernels_forward + shared.merging[0],
        sum(sent) - beside_products,
        launch * (program.kernels_forward + collectives),
        shared.exposed[0],
    )
    forward += quantising[0]
    hidden_ahead = 0.0
    exposed = sum(sent) + (2 * sent[0] if sequence_parallel and not program.overlaps_tensor else 0)
    if program.overlaps_tensor and tp > 1:
        # Each collective overlaps a weight gradient. Under sequence parallelism these are, in order: all-gather with
        # q, k, v; reduce-scatter with the down projection; all-gather with gate and up; reduce-scatter with the
        # output projection. Otherwise there are two all-reduces. Where the weight gradients are deferred, nothing is
        # computed meanwhile.
        order = (0, 3, 2, 1) if sequence_parallel else (3, 1)
        covered = [min(time, weight_gemm[i]) for time, i in zip(sent, order, strict=True)]
        credit = (1 - split_share) * (1 - contention(gpu, RankGroup(tp)))
        exposed -= credit * sum(covered)
        hidden_ahead = credit * covered[0] if sequence_parallel else 0.0
    if program.sums_norms and sequence_parallel:
        exposed += 2 * all_reduce(gpu, RankGroup(tp), 4.0 * hidden) * contention(gpu, RankGroup(tp))
    backward = Parts(
        sum(input_gemm),
        attention_back + score_time[1],
        pointwise_time(False) + start * program.kernels_backward + shared.merging[1],
        exposed,
        launch * (program.kernels_backward + collectives),
        shared.exposed[1],
    )
    backward += quantising[1]
    numbers = sum(k * n for k, n in products)
    weights = Parts(sum(weight_gemm), 0.0, pointwise(gpu, program.accumulation * numbers, "optimizer"))
    weights += quantising[2]
    recompute = _recompute(program.flash, policy, forward, forward_gemm, tp)
    if policy == OP:  # every second product of q, k, v, o, gate, up and down is repeated: k, o, up
        key, output, up = keys / (queries + 2 * keys) * forward_gemm[0], forward_gemm[1], forward_gemm[2] / 2
        recompute = Parts(key + output + up, 0.0, forward.pointwise, host=forward.host)
    return LayerTime(forward, recompute, backward, weights, hidden_ahead)


def _quantising(
    gpu: Hardware, fp8: tuple[str, bool, int], tokens: int, products: Sequence[tuple[int, int]], tp: int
) -> tuple[Parts, Parts, Parts]:
    """Return what `model/fp8.py` adds to the forward, the input gradients and the weight gradients.

    A factor is read twice in 16 bits and written in 8: for its largest magnitudes, and to be quantised. The weights'
    factors of input gradients, and both of weight gradients, are copied once more in 8 bits, transposed. Current
    scaling agrees on magnitudes where ranks share the contracted dimension: that of row-parallel matrices in the
    forward, of column-parallel ones in the backward.
    """
    scaling, weight_gradients, weight_uses = fp8
    if scaling == "off":
        return Parts(), Parts(), Parts()
    launch, start = gpu.calibration.launch_us * 1e-6, gpu.calibration.kernel_us * 1e-6
    inputs, outputs = (float(tokens * sum(sizes)) for sizes in zip(*products, strict=True))
    weights = sum(k * n for k, n in products) / weight_uses

    def added(size: float, kernels: int, kind: str, shared: Sequence[int] = ()) -> Parts:
        agreed = shared if scaling == "current" and tp > 1 else ()
        sums = sum(all_reduce(gpu, RankGroup(tp), 4.0 * rows) for rows in agreed)
        calls = len(products) * kernels + 2 * len(agreed)
        return Parts(pointwise=pointwise(gpu, size, kind) + start * calls, tensor=sums, host=launch * calls)

    return (
        added(5 * (inputs + weights), 4, "forward", [tokens + n for _, n in products[1::2]]),
        added(5 * outputs + 7 * weights, 5, "backward", [tokens + k for k, _ in products[::2]]),
        added(5 * (inputs + outputs), 4, "backward") if weight_gradients else Parts(),
    )


def _collectives(gpu: Hardware, group: RankGroup, size: float, sequence_parallel: bool) -> list[float]:
    """Return the times of a layer's collectives in one direction, in order."""
    if not sequence_parallel:
        return [layer_sum(gpu, group, size)] * 2
    return [all_gather(gpu, group, size), reduce_scatter(gpu, group, size)] * 2


def _recompute(flash: bool, policy: str, forward: Parts, products: list[float], tp: int) -> Parts:
    """Return the recompute of the backward: the full forward, or the attention or pointwise kernels only."""
    if policy == "full":
        return forward
    if policy == "selective" and not flash:
        return Parts(attention=forward.attention, host=forward.host * 0.2)
    if policy == "selective":  # `layout/activation_memory.py`: norms and SwiGLU, and the output projection on one rank
        return Parts(products[1] if tp == 1 else 0.0, 0.0, forward.pointwise * 0.5)
    return Parts()


def head_time(gpu: Hardware, job: StepJob) -> LayerTime:
    """Return the time of the head and the loss."""
    hidden, tokens, vocab = job.model.hidden_size, job.tokens, job.vocab
    chunk = chunk_tokens(tokens, hidden, vocab) if job.program.name.startswith("llama_ds") else tokens
    chunks = tokens / chunk
    group, size = job.group("tp"), float(job.program.element_bytes) * tokens * hidden
    gather, reduce = all_gather(gpu, group, size), layer_sum(gpu, group, size)
    if job.sequence_parallel:
        reduce = gather + reduce_scatter(gpu, group, size)
    numbers, traffic = job.program.element_bytes / 2 * tokens * vocab, job.program.logits
    loss = pointwise(gpu, traffic.forward * numbers, "loss"), pointwise(gpu, traffic.backward * numbers, "loss")
    sums = chunks * (all_reduce(gpu, group, 4.0 * chunk) + all_reduce(gpu, group, 8.0 * chunk))  # maximum, two sums
    sums += gather if job.sequence_parallel else 0.0
    forward = Parts(gemm(gpu, chunk, vocab, hidden) * chunks, 0.0, loss[0], sums)
    backward = Parts(gemm(gpu, chunk, hidden, vocab) * chunks, 0.0, loss[1], reduce)
    added = pointwise(gpu, job.program.accumulation * hidden * vocab, "optimizer")
    return LayerTime(forward, Parts(), backward, Parts(gemm(gpu, hidden, vocab, tokens), 0.0, added))


def embedding_time(gpu: Hardware, job: StepJob) -> LayerTime:
    """Return the time of the embedding: lookup, all-reduce over tensor-parallel ranks, accumulation of gradients."""
    numbers, element_bytes = job.tokens * job.model.hidden_size, job.program.element_bytes
    reduce = layer_sum(gpu, job.group("tp"), float(element_bytes) * numbers)
    moved = 5 * element_bytes * numbers + job.program.accumulation * job.vocab * job.model.hidden_size
    return LayerTime(
        Parts(pointwise=pointwise(gpu, 3 * element_bytes * numbers), tensor=reduce),
        Parts(),
        Parts(),
        Parts(pointwise=pointwise(gpu, moved, "optimizer")),
    )
