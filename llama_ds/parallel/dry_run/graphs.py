"""CUDA graphs in a dry run: they hold memory as real ones do, and compute nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llama_ds.model.graphs import Replay, T, tensors_of
from llama_ds.parallel.dry_run.ledger import WORKING, Ledger


class DryGraphs:
    """Counts the results of graphs as activations, and one share of temporaries, the largest, for all graphs."""

    computes = False

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._temporaries = torch.empty(0, dtype=torch.uint8)

    def capture(self, function: Callable[[], T]) -> tuple[T, Replay]:
        ledger = self._ledger
        ledger.high = ledger.total
        result = function()
        temporaries = ledger.high - ledger.total
        if temporaries > self._temporaries.nbytes:
            self._temporaries = torch.empty(0, dtype=torch.uint8)  # the graphs' pool grows
            self._temporaries = torch.empty(temporaries, dtype=torch.uint8)
            ledger.mark([self._temporaries], WORKING)
        for tensor in tensors_of(result):
            ledger.saved(tensor)
        return result, lambda: None
