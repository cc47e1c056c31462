"""Counts what Muon's step allocates on a real rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from llama_ds.parallel.dry_run.holdings import MUON_CALLS, watch_matrices
from llama_ds.parallel.dry_run.ledger import OTHER, Ledger


class StepLedger(Ledger):
    """Counts tensors that are allocated while it is entered; those that are given to operations count as OTHER."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        self.mark([x for x in given if x.untyped_storage()._cdata not in self._held], OTHER)
        return super().__torch_dispatch__(func, types, args, kwargs)

    @contextmanager
    def matrices(self) -> Iterator[None]:
        with self, super().matrices():
            yield


@contextmanager
def counted_matrices(engine: Any) -> Iterator[StepLedger]:
    """Count the bytes that Muon, the optimizer of a DeepSpeed `engine`, holds."""
    ledger = StepLedger()
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    watch_matrices(engine, ledger)
    yield ledger
    for name in MUON_CALLS:
        delattr(optimizer, name)
