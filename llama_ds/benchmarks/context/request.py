"""What is measured: the shape of attention, the ranks, and the links."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ds.benchmarks.ranks import check_links
from llama_ds.config.context_parallel import ALL_TO_ALL, HIERARCHICAL, RING, CpSizes
from llama_ds.errors import UserError

ELEMENT_BYTES = 4  # float32


@dataclass(frozen=True)
class ContextRequest:
    """Attention of one layer, forward and backward, of one row in float32."""

    ranks: int
    seq_lens: list[int]
    heads: int
    kv_heads: int
    head_dim: int
    rate_mbit: float | None  # bandwidth of a link in each direction; None: loopback
    delay_ms: float
    repeats: int
    node_ranks: int = 1  # neighbouring ranks whose links to each other have no limit

    @property
    def methods(self) -> dict[str, CpSizes]:
        """The methods that this number of ranks has."""
        found = {RING: CpSizes(self.ranks, 1), ALL_TO_ALL: CpSizes(1, self.ranks)}
        return found | ({HIERARCHICAL: CpSizes(self.ranks // 2, 2)} if self.ranks % 2 == 0 and self.ranks > 2 else {})

    def check(self) -> None:
        """Refuse what the ranks cannot share.

        Raises:
            UserError: the message names values that they can.
        """
        if self.ranks < 2:
            raise UserError(f"command line: --ranks {self.ranks} share no rows; use 2 or more")
        check_links(self.rate_mbit, self.delay_ms)
        if self.heads % self.kv_heads:
            raise UserError(
                f"command line: --kv-heads {self.kv_heads} does not divide --heads {self.heads}; use a divisor"
            )
        if self.heads % self.ranks:
            raise UserError(f"command line: --ranks {self.ranks} does not divide --heads {self.heads}; use a divisor")
        if self.ranks % self.node_ranks:
            raise UserError(
                f"command line: --node-ranks {self.node_ranks} does not divide --ranks {self.ranks}; use a divisor"
            )
        for tokens in self.seq_lens:
            if tokens % (2 * self.ranks):
                raise UserError(
                    f"command line: --seq-lens {tokens} is not a multiple of 2 * --ranks {self.ranks}; "
                    f"use {(tokens // (2 * self.ranks) + 1) * 2 * self.ranks}"
                )
