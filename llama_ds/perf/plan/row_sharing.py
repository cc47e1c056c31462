"""Time of attention over rows that context-parallel ranks share, and of its messages, in seconds.

n ranks hold S = T / n tokens of each row, with H query and G key-value heads of size K. Each computes 1 / n of a row's
causal attention. In a ring these are n equal blocks, and a message travels during each block: 2 S G K elements of keys
and values, and in the backward as many fp32 gradients, whose last hop nothing hides. All-to-alls are exposed: q, k, v
and the output in the forward; those, the output's gradient and the gradients of q, k and v in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llama_ds.config.context_parallel import RING
from llama_ds.perf.plan.communication import RankGroup, half, message
from llama_ds.perf.plan.compute import pointwise
from llama_ds.perf.plan.hardware import Hardware

FP32_BYTES = 4
MERGED_BYTES = 12  # per element of a block's result: read it, read and write the sum, in fp32

# (forward, backward) of causal attention for (gpu, rows, tokens of a row, heads, head size)
Attend = Callable[[Hardware, int, int, int, int], tuple[float, float]]


@dataclass(frozen=True)
class RowSharing:
    """A layout's context parallelism: ranks of a group, distance between them, method, and ranks of the job."""

    size: int = 1
    stride: int = 1
    method: str = ""
    ranks: int = 1


@dataclass(frozen=True)
class SharedAttention:
    """A rank's attention in forward and backward: times of computation, merging of blocks and messages, bytes sent."""

    attention: tuple[float, float]
    merging: tuple[float, float] = (0.0, 0.0)
    exposed: tuple[float, float] = (0.0, 0.0)  # part of `messages`
    messages: tuple[float, float] = (0.0, 0.0)  # time of all messages, exposed or hidden
    sent: tuple[float, float] = (0.0, 0.0)  # bytes


def shared_attention(
    gpu: Hardware,
    sharing: RowSharing,
    attend: Attend,
    rows: int,
    seq_len: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    element_bytes: int,
) -> SharedAttention:
    """Return the times of one layer; `heads` and `kv_heads` are those of a tensor-parallel rank."""
    n = sharing.size
    if n == 1:
        return SharedAttention(attend(gpu, rows, seq_len, heads, head_dim))
    tokens = rows * seq_len // n
    if sharing.method != RING:
        group = RankGroup(n, sharing.stride)
        keys = 2 * math.lcm(kv_heads, n)
        elements = heads + keys + heads, 3 * heads + keys + heads + keys
        whole = [float(count * tokens * head_dim * element_bytes) for count in elements]
        times = half(gpu, group, whole[0]), half(gpu, group, whole[1])
        sent = whole[0] * (n - 1) / n, whole[1] * (n - 1) / n
        own = attend(gpu, rows, seq_len, -(-heads // n), head_dim)
        return SharedAttention(own, exposed=times, messages=times, sent=sent)
    length = seq_len // n  # blocks run at the rate of rows of their length
    share = seq_len * (seq_len + 1) / (n * length * (length + 1))
    forward, backward = (time * share for time in attend(gpu, rows, length, heads, head_dim))
    keys = 2 * tokens * kv_heads * head_dim
    passed, gradients = (
        sum(message(gpu, sharing.stride, float(keys * size), sharing.ranks)) for size in (element_bytes, FP32_BYTES)
    )
    merged = tokens * heads * head_dim, tokens * heads * head_dim + keys
    merging = tuple(pointwise(gpu, (n - 1) * MERGED_BYTES * count) for count in merged)
    exposed = (
        (n - 1) * max(0.0, passed - forward / n),
        (n - 1) * max(0.0, passed + gradients - backward / n) + gradients,
    )
    messages = (n - 1) * passed, (n - 1) * passed + n * gradients
    sent = (n - 1) * keys * element_bytes, (n - 1) * keys * element_bytes + n * keys * FP32_BYTES
    return SharedAttention((forward, backward), (merging[0], merging[1]), exposed, messages, sent)
