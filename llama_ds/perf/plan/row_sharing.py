"""Time of attention over rows that context-parallel ranks share, and of its messages, in seconds.

n ranks hold S = T / n tokens of each row, with H query and G key-value heads of size K. Each computes 1 / n of the
causal attention of every document of a row. In a ring these are n equal blocks, and a message travels during each
block: 2 S G K elements of keys and values, and in the backward as many fp32 gradients, whose last hop nothing hides.
All-to-alls are exposed: q, k, v and the output in the forward; those, the output's gradient and the gradients of q, k
and v in the backward. In a ring of groups, a rank passes on its share of the heads of its group's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llama_ds.config.context_parallel import WHOLE_ROWS, CpSizes
from llama_ds.layout.cp_traffic import GRADIENT_BYTES, cp_traffic, sent_bytes
from llama_ds.layout.planned_documents import PlannedRows
from llama_ds.perf.plan.communication import RankGroup, half, message
from llama_ds.perf.plan.compute import pointwise
from llama_ds.perf.plan.hardware import Hardware

MERGED_BYTES = 12  # per element of a block's result: read it, read and write the sum, in fp32

# (forward, backward) of causal attention for (gpu, rows, tokens of a row or document, heads, head size)
Attend = Callable[[Hardware, int, int, int, int], tuple[float, float]]


@dataclass(frozen=True)
class RowSharing:
    """A layout's context parallelism: sizes, distance between ranks of a group, and ranks of the job."""

    sizes: CpSizes = WHOLE_ROWS
    stride: int = 1
    ranks: int = 1

    @property
    def size(self) -> int:
        """The number of ranks that share a row."""
        return self.sizes.ranks


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
    documents: PlannedRows,
) -> SharedAttention:
    """Return the times of one layer; `heads` and `kv_heads` are those of a tensor-parallel rank."""
    ring, group = sharing.sizes.ring, sharing.sizes.all_to_all
    own_heads = -(-heads // group)  # each computes all tokens of its group
    traffic = cp_traffic(sharing.sizes, rows * seq_len // sharing.size, heads, kv_heads, head_dim)
    around = RankGroup(group, sharing.stride)
    exchanged = (
        half(gpu, around, float(traffic.exchanged_forward * element_bytes)),
        half(gpu, around, float(traffic.exchanged_backward * element_bytes)),
    )
    forward_bytes, backward_bytes = sent_bytes(sharing.sizes, traffic, element_bytes)
    sent = float(forward_bytes), float(backward_bytes)
    forward = backward = 0.0
    for tokens, count in documents.counts:
        length = max(1, tokens // ring)  # blocks run at the rate of rows of their length
        share = count * tokens * (tokens + 1) / (ring * length * (length + 1))
        own = attend(gpu, rows, length, own_heads, head_dim)
        forward, backward = forward + share * own[0], backward + share * own[1]
    if ring == 1:
        return SharedAttention((forward, backward), exposed=exchanged, messages=exchanged, sent=sent)
    length = seq_len // ring
    passed, gradients = (
        sum(message(gpu, sharing.stride * group, float(traffic.passed * size), sharing.ranks))
        for size in (element_bytes, GRADIENT_BYTES)
    )
    merged = rows * length * own_heads * head_dim, rows * length * own_heads * head_dim + traffic.passed
    merging = tuple(pointwise(gpu, (ring - 1) * MERGED_BYTES * count) for count in merged)
    own = exposed_in_ring(ring, passed, gradients, forward, backward)
    exposed = own[0] + exchanged[0], own[1] + exchanged[1]
    messages = (ring - 1) * passed + exchanged[0], (ring - 1) * passed + ring * gradients + exchanged[1]
    return SharedAttention((forward, backward), (merging[0], merging[1]), exposed, messages, sent)


def exposed_in_ring(ring: int, passed: float, gradients: float, forward: float, backward: float) -> tuple[float, float]:
    """Return the exposed time of a ring's messages in the forward and in the backward.

    Args:
        passed: time of a message with the keys and values of a block.
        gradients: time of a message with their gradients.
        forward: time of all blocks in the forward.
        backward: the same, in the backward.
    """
    return (
        (ring - 1) * max(0.0, passed - forward / ring),
        (ring - 1) * max(0.0, passed + gradients - backward / ring) + gradients,
    )
