"""One of two ranks: reduces, gathers and shares rows, and prints the results and how many bytes left this host.

Arguments: the rank, elements of a part of gradients, then of attention tokens of a rank, heads, kv heads, head size.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from llama_ds.config.context_parallel import CpSizes
from llama_ds.launch.namespaces import INTERFACE
from llama_ds.layout.layout import Layout
from llama_ds.model.shared_rows import kernel_over
from llama_ds.parallel import world
from llama_ds.parallel.data_parallel import NearFirst, start_all_gather, start_reduce_scatter
from llama_ds.parallel.grid import context_parallel
from llama_ds.parallel.trace import Trace

SENT = Path("/sys/class/net", INTERFACE, "statistics", "tx_bytes")


def sent_by(action: Callable[[], object]) -> int:
    dist.barrier()
    before = int(SENT.read_text())
    action()
    dist.barrier()
    return int(SENT.read_text()) - before


def attention_bytes(sizes: CpSizes, tokens: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Return what attention over a row of which this rank has `tokens` sends, forward and backward."""
    cp = context_parallel(Layout(cp=2), sizes, Trace(torch.device("cpu")))
    q, k, v, grad = (torch.randn(1, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads, heads))
    kernel = kernel_over(cp, "sdpa")

    def attend() -> None:
        out, statistics = kernel.forward(q, k, v, None)
        kernel.backward(grad, q, k, v, out, statistics, None)

    attend()  # connections are made
    return sent_by(attend)


def main() -> None:
    rank, count, *shape = map(int, sys.argv[1:])
    dist.init_process_group("gloo")
    group, trace = dist.group.WORLD, Trace(torch.device("cpu"))
    assert group is not None
    mine = torch.randn(2, count, generator=torch.Generator().manual_seed(rank))
    both = [torch.randn(2, count, generator=torch.Generator().manual_seed(r)) for r in range(2)]
    found: dict[str, object] = {}

    whole = mine.clone()
    own = whole[rank]  # in place, as the optimizer does it
    found["reduce bytes"] = sent_by(lambda: start_reduce_scatter(whole, own, group, torch.float32, trace)())
    found["reduced exactly"] = torch.equal(own, both[0][rank] + both[1][rank])

    whole = mine.clone()
    own = whole[rank]
    found["bf16 bytes"] = sent_by(lambda: start_reduce_scatter(whole, own, group, torch.bfloat16, trace)())
    found["rounded once"] = torch.equal(own, both[0][rank].bfloat16().float() + both[1][rank].bfloat16().float())

    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    whole = mine.clone()
    ends = NearFirst(whole, whole[rank], (group, alone), torch.bfloat16, trace)
    ends()
    found["neighbours first"] = torch.equal(whole[rank], (both[0][rank] + both[1][rank]).bfloat16().float())
    gone = weakref.ref(ends)
    del ends
    found["freed"] = gone() is None

    gathered = torch.zeros(2, count)
    gathered[rank] = mine[rank]
    found["gather bytes"] = sent_by(lambda: start_all_gather(gathered, gathered[rank], group, trace)())
    found["gathered"] = torch.equal(gathered, torch.stack([both[0][0], both[1][1]]))
    found["all-reduce bytes"] = sent_by(lambda: dist.all_reduce(mine.clone()))
    for sizes in (CpSizes(2, 1), CpSizes(1, 2)):
        found[f"{sizes.method} bytes"] = attention_bytes(sizes, *shape)
    print(json.dumps(found))


if __name__ == "__main__":
    with world.failing_together():
        main()
