"""What attention over shared rows sends, of a layer and micro-batch.

A rank holds S tokens of rows and has H query and G key-value heads of size K. A group of a ranks exchanges the tokens
of its heads, key-value heads repeated to lcm(G, a); then a ring of n groups passes on the keys of L = a S tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from llama_ds.config.context_parallel import CpSizes

GRADIENT_BYTES = 4  # gradients travel around a ring in float32, or wider if the run is


class CpTraffic(NamedTuple):
    """Numbers of elements."""

    exchanged_forward: int  # in a rank's all-to-alls: q, k, v and the output
    exchanged_backward: int  # the output's gradient, q, k, v and the output; the gradients of q, k and v
    passed: int  # in each message of a ring: keys and values of a block; in the backward also their gradients


def cp_traffic(sizes: CpSizes, tokens: int, heads: int, kv_heads: int, head_dim: int) -> CpTraffic:
    """Return the elements of a rank with `tokens` of rows; `heads` are those of a tensor-parallel rank."""
    group = sizes.all_to_all
    keys = 2 * math.lcm(kv_heads, group)
    own = tokens * head_dim if group > 1 else 0
    passed = tokens * group * (keys // group) * head_dim if sizes.ring > 1 else 0
    return CpTraffic((2 * heads + keys) * own, (4 * heads + 2 * keys) * own, passed)


def sent_bytes(sizes: CpSizes, traffic: CpTraffic, element_bytes: int) -> tuple[int, int]:
    """Return the bytes that a rank sends to others in the forward and in the backward of a layer and micro-batch.

    A ring of n groups passes keys on n - 1 times, and their gradients n times, back to their own rank.
    """
    ring, group = sizes.ring, sizes.all_to_all
    forward, backward = (
        count * element_bytes * (group - 1) // group
        for count in (traffic.exchanged_forward, traffic.exchanged_backward)
    )
    keys = (ring - 1) * traffic.passed * element_bytes
    gradients = ring * traffic.passed * max(GRADIENT_BYTES, element_bytes)
    return forward + keys, backward + keys + gradients
