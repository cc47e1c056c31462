"""Time of a decoder layer, the embedding and the head, for one micro-batch on one rank, in seconds.

D hidden size, F intermediate size, N tokens, H and G query and key-value heads of size K, V vocabulary. The host
launches kernels ahead of the GPU, so a stage takes the longer of host time and GPU time (`step.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from llama_ds.layout.joint_products import copied_bytes, multiplied_jointly
from llama_ds.layout.loss_chunks import chunk_tokens
from llama_ds.layout.planned_documents import PlannedRows
from llama_ds.perf.plan.communication import (
    RankGroup,
    all_gather,
    all_reduce,
    contention,
    exposed_by_chunks,
    layer_sum,
    reduce_scatter,
)
from llama_ds.perf.plan.compute import flash_attention, fp8_gemm, gemm, plain_attention, pointwise
from llama_ds.perf.plan.hardware import Hardware
from llama_ds.perf.plan.job import OP, StepJob
from llama_ds.perf.plan.kernel_speeds import padded_head, relative_speed
from llama_ds.perf.plan.program import MemoryTraffic, Program
from llama_ds.perf.plan.row_sharing import RowSharing, shared_attention

# Host time of a layer's passes as CUDA graphs (`model/graphed_layers.py`), in kernel launches: a forward has autograd's
# call, the check of the weights' addresses and the launch; a backward two calls, as weight gradients may be deferred,
# copies of two gradients of norms and their sums, and the announcement of seven matrices. Counted, not measured.
GRAPH_FORWARD, GRAPH_BACKWARD = 3, 9


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


def layer_time(gpu: Hardware, job: StepJob, policy: str, joint_share: float = 0.0) -> LayerTime:
    """Return the time of a decoder layer under a save policy.

    `joint_share` of its micro-batches compute their weight gradients `job.joint` at a time.
    """
    m = job.model
    shape = (m.hidden_size, m.intermediate_size, m.num_attention_heads, m.num_key_value_heads, m.head_dim)
    sizes = job.micro_batch, job.seq_len, job.tp
    rest = job.sequence_parallel, policy, job.sharing, job.split_share, job.attended
    fp8 = job.fp8, job.fp8_weight_gradients, job.fp8_weight_uses
    found = _layer(gpu, job.program, shape, *sizes, *rest, fp8, job.tp_chunks, (job.joint, joint_share))
    if gpu.host_computes:
        return found
    if any(job.program.host_launches):
        found = _with_launches(gpu, job.program.host_launches, policy, found)
    if job.zero_stage == 3:  # to gather and release the layer's weights
        found = _with_launches(gpu, job.program.zero3_launches, policy, found)
    return _launched_at_once(gpu, found) if job.cuda_graphs else found


def _with_launches(gpu: Hardware, launches: tuple[int, int], policy: str, time: LayerTime) -> LayerTime:
    """Return the times of a layer with more of the host's work, in launches of forward and backward."""
    forward, backward = (gpu.calibration.launch_us * 1e-6 * count for count in launches)
    again = forward if policy == "full" else 0.0
    return replace(
        time,
        forward=replace(time.forward, host=time.forward.host + forward),
        recompute=replace(time.recompute, host=time.recompute.host + again),
        input_backward=replace(time.input_backward, host=time.input_backward.host + backward),
    )


def _launched_at_once(gpu: Hardware, time: LayerTime) -> LayerTime:
    """Return the times of a layer whose passes are CUDA graphs, which also hold its recompute."""
    launch = gpu.calibration.launch_us * 1e-6
    return replace(
        time,
        forward=replace(time.forward, host=launch * GRAPH_FORWARD),
        recompute=replace(time.recompute, host=0.0),
        input_backward=replace(time.input_backward, host=launch * GRAPH_BACKWARD),
    )


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
    chunks: int,
    joint: tuple[int, float],
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
    columns: list[tuple[int, ...]] = [(n,) for _, n in products]  # widths of the products that compute each
    if program.separate[0]:
        columns[0] = (queries, keys, keys)
    if program.separate[1] and program.gated:
        columns[2] = (inner, inner)
    pieces = [[(k, n) for n in wide] for (k, _), wide in zip(products, columns, strict=True)]
    scaling, in_fp8, _ = fp8
    multiply = gemm if scaling == "off" else fp8_gemm
    weigh = fp8_gemm if in_fp8 else gemm
    forward_gemm = [sum(multiply(gpu, tokens, n, k) for k, n in piece) for piece in pieces]
    input_gemm = [sum(multiply(gpu, tokens, k, n) for k, n in piece) for piece in pieces]
    weight_gemm = [sum(weigh(gpu, k, n, tokens) for k, n in piece) for piece in pieces]

    attend = flash_attention if program.flash else plain_attention
    shared = shared_attention(
        gpu, sharing, attend, rows, seq_len, local_heads, local_kv_heads, head_dim, program.element_bytes, documents
    )
    speed = _kernel_speed(gpu, program.attention, seq_len, head_dim) if program.flash else 1.0
    attention, attention_back = (time / speed for time in shared.attention)
    scale = program.element_bytes / 2
    scores = rows * local_heads * seq_len * seq_len * scale / sharing.size
    score_time = pointwise(gpu, program.scores.forward * scores), pointwise(gpu, program.scores.backward * scores)

    def pointwise_time(forward: bool) -> float:
        def of(traffic: MemoryTraffic) -> float:
            return traffic.forward if forward else traffic.backward

        moved = of(program.hidden) * own * hidden + of(program.inner) * tokens * inner
        moved += of(program.heads) * tokens * (2 * queries + 2 * keys) + of(program.copies) * tokens * queries
        return pointwise(gpu, scale * moved, "forward" if forward else "backward")

    size = float(program.element_bytes) * tokens * hidden / chunks
    chunk_sent = _collectives(gpu, RankGroup(tp), size, sequence_parallel)
    sent = [chunks * time for time in chunk_sent]
    beside_products = 0.0
    if chunks > 1:
        first = 0 if sequence_parallel else 1  # q, k and v: without sequence parallelism nothing is gathered for them
        chunk_gemm = [multiply(gpu, tokens // chunks, n, k) for k, n in products]
        forward_gemm[first:] = [chunks * time for time in chunk_gemm[first:]]
        beside_products = _hidden(gpu, tp, chunks, chunk_sent, chunk_gemm)
    if program.overlaps_forward and tp > 1:  # the last chunk of a product or collective has nothing beside it
        beside = sum(min(time, product) for time, product in zip(sent, forward_gemm, strict=False))
        beside_products = (1 - 1 / tp) * beside * (1 - contention(gpu, RankGroup(tp)))
    quantising = _quantising(gpu, fp8, tokens, products, tp)
    launch, start = gpu.calibration.launch_us * 1e-6, gpu.calibration.kernel_us * 1e-6
    # Launches on the host, with the calls around the collectives; the norm before an exchange is also cut.
    collectives = 8 * chunks + 6 * (chunks - 1) if tp > 1 else 0
    forward = Parts(
        sum(forward_gemm),
        attention + score_time[0],
        pointwise_time(True) + start * (program.kernels_forward + 6 * (chunks - 1)) + shared.merging[0],
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
    if program.own_sums and tp > 1 and not sequence_parallel:
        own_weights = [weigh(gpu, k, n, tokens) for k, n in pieces[0] + pieces[2]]
        exposed = len(own_weights) * sent[0]
        if program.sums_beside_weights:
            exposed -= sum(min(sent[0], time) for time in own_weights) * (1 - contention(gpu, RankGroup(tp)))
    if program.sums_norms and sequence_parallel:
        exposed += 2 * all_reduce(gpu, RankGroup(tp), 4.0 * hidden) * contention(gpu, RankGroup(tp))
    if chunks > 1 and split_share:  # input gradients in chunks, up to the first product of the layer below
        chunk_gemm = [multiply(gpu, tokens // chunks, k, n) for k, n in products]
        exposed -= split_share * _hidden(gpu, tp, chunks, chunk_sent, chunk_gemm, backward=True)
        if sequence_parallel:
            alone = exposed_by_chunks(chunks, 0.0, 0.0, chunk_sent[0], chunk_gemm[3])
            hidden_ahead += split_share * alone
        whole, cut = sum(input_gemm), chunks * sum(chunk_gemm)
        input_gemm = [(1 - split_share) * whole + split_share * cut]
    backward = Parts(
        sum(input_gemm),
        attention_back + score_time[1],
        pointwise_time(False) + start * program.kernels_backward + shared.merging[1],
        exposed,
        launch * (program.kernels_backward + collectives),
        shared.exposed[1],
    )
    backward += quantising[1]
    single = [piece for each in pieces for piece in each]
    weights = _weight_gradients(gpu, program, tokens, single, in_fp8, 1) * (1 - joint[1])
    if joint[1]:
        weights += _weight_gradients(gpu, program, tokens, single, in_fp8, joint[0]) * joint[1]
    weights += quantising[2]
    recompute = _recompute(program.flash, policy, forward, forward_gemm, tp)
    if policy == OP:  # every second product of q, k, v, o, gate, up and down is repeated: k, o, up
        key, output, up = keys / (queries + 2 * keys) * forward_gemm[0], forward_gemm[1], forward_gemm[2] / 2
        recompute = Parts(key + output + up, 0.0, forward.pointwise, host=forward.host)
    return LayerTime(forward, recompute, backward, weights, hidden_ahead)


def _kernel_speed(gpu: Hardware, kernel: str, seq_len: int, head_dim: int) -> float:
    """Return the speed of fused attention over that of FlashAttention-2 on heads that fill its tiles."""
    speed = relative_speed(kernel, gpu.device, head_dim)
    if gpu.curves and gpu.curves.attention:  # measured as it is
        return speed
    own, padded = (flash_attention(gpu, 1, seq_len, 1, size) for size in (head_dim, padded_head(kernel, head_dim)))
    return speed * own[0] / padded[0]


def _hidden(
    gpu: Hardware, tp: int, chunks: int, sent: Sequence[float], products: Sequence[float], backward: bool = False
) -> float:
    """Return the time of a layer's collectives in one direction that products of other chunks hide.

    `sent` and `products` are the times of one chunk, the latter in the order of the forward.
    """
    gather, reduce = (sent[0], sent[1]) if len(sent) > 2 else (0.0, sent[0])
    attention, output, mlp, down = products
    if backward:
        waits = exposed_by_chunks(chunks, mlp, reduce, gather, output)
        waits += exposed_by_chunks(chunks, attention, reduce, gather, down if gather else 0.0, ends=True)
    else:
        waits = exposed_by_chunks(chunks, 0.0, 0.0, gather, attention) if gather else 0.0
        waits += exposed_by_chunks(chunks, output, reduce, gather, mlp, early=False)
        waits += exposed_by_chunks(chunks, down, reduce, 0.0, 0.0)
    return (chunks * sum(sent) - waits) * (1 - contention(gpu, RankGroup(tp)))


def _weight_gradients(
    gpu: Hardware, program: Program, tokens: int, products: Sequence[tuple[int, int]], in_fp8: bool, joint: int
) -> Parts:
    """Return the products of the weight gradients and their accumulation, a micro-batch's part of `joint` of them."""
    multiplied = accumulated = copied = 0.0
    for inputs, outputs in products:
        at_once = 1
        if joint > 1 and multiplied_jointly(tokens, outputs, inputs, joint, program.element_bytes):
            at_once = joint
            copied += copied_bytes(tokens, outputs, inputs, 1, program.element_bytes)
        multiplied += (fp8_gemm if in_fp8 else gemm)(gpu, inputs, outputs, at_once * tokens) / at_once
        accumulated += program.accumulation * inputs * outputs / at_once
    traffic = pointwise(gpu, accumulated, "optimizer") + (pointwise(gpu, copied, "backward") if copied else 0.0)
    return Parts(multiplied, 0.0, traffic)


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
