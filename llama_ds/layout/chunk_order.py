"""The order in which a decoder layer hands chunks of tokens from one matrix product over to the next.

Between the two, a chunk's partial outputs are summed over tensor-parallel ranks, and passed on: once the sum has
arrived, a norm is computed and its gather issued (`llama_ds.model.chunked_products`). All ranks issue their collectives
in the same order, so it depends on no time.
"""

from __future__ import annotations


def passed_before(count: int, early: bool) -> list[int]:
    """Return how many chunks are passed on before each product: `count` before the sums, `count` behind the gathers.

    From three chunks on, a product lies between the issue of each collective and its wait. Early, for a large product
    before the sums: each chunk is passed on behind the next product. Otherwise, for a small one, which cannot hide its
    sums: the first is passed on early, so that a gather arrives in time, and the others while chunks behind are
    multiplied.
    """
    before = [max(0, i - 1) if early else min(1, max(0, i - 1)) for i in range(count)]
    lead = 1 if count < 3 else count - 1 if early else 2
    return [*before, *(min(count, lead + i) for i in range(count))]
