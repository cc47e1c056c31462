"""How unequal the attention of a ring's ranks is, counted from the ids of rows on the host.

With document masks a token attends to those of its document up to itself. Stripes give the ranks of a ring nearly equal
numbers of such pairs, whatever the documents; what is left of the difference is the number reported here.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from llama_ds.config.context_parallel import CpSizes, cp_sizes
from llama_ds.config.document_marks import DocumentMarks
from llama_ds.config.schema import RunConfig
from llama_ds.data.documents import document_begins
from llama_ds.layout.row_cuts import own_ranges


class CpBalance:
    """Counts the pairs of queries and keys of each rank of the ring in the micro-batches that this rank reads."""

    def __init__(self, sizes: CpSizes, marks: DocumentMarks) -> None:
        self.sizes, self.marks = sizes, marks
        self._counted: dict[int, list[np.ndarray]] = defaultdict(list)

    def add(self, step: int, rows: np.ndarray) -> None:
        """Count a micro-batch (b, T + 1) of `step`; a reader thread may do so ahead of the step."""
        self._counted[step].append(ring_work(rows[:, :-1], self.marks, self.sizes))

    def take(self, before: int) -> float | None:
        """Return the imbalance of the steps below `before` that were not taken yet; None if there are none.

        It is 1 if all ranks of the ring compute equally long. A micro-batch takes as long as its slowest rank: the sum
        of these over micro-batches is divided by that of the means over ranks.
        """
        steps = [step for step in list(self._counted) if step < before]
        work = np.array([one for step in steps for one in self._counted.pop(step)])
        return float(work.max(1).sum() / work.mean(1).sum()) if len(work) else None


def balance_of(run: RunConfig, marks: DocumentMarks) -> CpBalance | None:
    """Return the counter of a run; None where the work of all ranks is the same."""
    sizes = cp_sizes(run)[0]
    return CpBalance(sizes, marks) if run.data.document_mask and run.parallel.cp > 1 and sizes.ring > 1 else None


def ring_work(ids: np.ndarray, marks: DocumentMarks, sizes: CpSizes) -> np.ndarray:
    """Return the number of (query, key) pairs that each group of the ring computes of rows (b, T): (ring,)."""
    tokens = ids.shape[1]
    position = np.arange(tokens)
    begins = np.where(document_begins(ids, marks), position, 0)
    visible = (position - np.maximum.accumulate(begins, 1) + 1).sum(0)
    groups = sizes._replace(all_to_all=1)
    own = [own_ranges(tokens, rank, groups) for rank in range(sizes.ring)]
    return np.array([sum(int(visible[part.start : part.stop : part.step].sum()) for part in parts) for parts in own])
