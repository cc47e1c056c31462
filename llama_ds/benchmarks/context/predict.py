"""How long attention over shared rows should take, from its computation alone and the bandwidth of the links."""

from __future__ import annotations

from llama_ds.benchmarks.context.request import ELEMENT_BYTES, ContextRequest
from llama_ds.config.context_parallel import CpSizes
from llama_ds.layout.cp_traffic import GRADIENT_BYTES, cp_traffic
from llama_ds.perf.plan.row_sharing import exposed_in_ring

EXCHANGES = 2  # all-to-alls in a forward, and in a backward


def exposed_seconds(
    request: ContextRequest, sizes: CpSizes, tokens: int, forward: float, backward: float
) -> float | None:
    """Return for how long messages keep a rank waiting; None on loopback, whose bandwidth is not known.

    A ring waits for its slowest link. Ranks of a node exchange at once.

    Args:
        request: the links and the shape of attention.
        sizes: of the method.
        tokens: of a row.
        forward: seconds of the computation alone.
        backward: the same, in the backward.
    """
    if request.rate_mbit is None:
        return None
    second_bytes, latency = request.rate_mbit * 1e6 / 8, request.delay_ms / 1e3
    traffic = cp_traffic(sizes, tokens // request.ranks, request.heads, request.kv_heads, request.head_dim)
    exchanged = (traffic.exchanged_forward + traffic.exchanged_backward) * ELEMENT_BYTES
    remote = max(0, sizes.all_to_all - request.node_ranks)  # members of its group on other nodes
    waits = remote and exchanged * remote / sizes.all_to_all / second_bytes + 2 * EXCHANGES * latency
    if sizes.ring == 1:
        return waits
    passed, gradients = (traffic.passed * size / second_bytes + latency for size in (ELEMENT_BYTES, GRADIENT_BYTES))
    return waits + sum(exposed_in_ring(sizes.ring, passed, gradients, forward, backward))
