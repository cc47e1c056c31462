"""Where documents begin among the ids of rows, on the host.

Shapes: b rows, T tokens.
"""

from __future__ import annotations

import numpy as np

from llama_ds.config.document_marks import DocumentMarks
from llama_ds.data.filler import plain_ids


def document_begins(ids: np.ndarray, marks: DocumentMarks) -> np.ndarray:
    """Return whether each token is the first of a document within its row: (b, T) ids, also filler, -> (b, T) bool.

    `model.embedding.document_starts` computes the same on the device. The first token of a row may begin none.
    """
    ids = plain_ids(ids)
    if marks.begin is not None:
        return ids == marks.begin
    begins = np.zeros(ids.shape, dtype=bool)
    begins[:, 1:] = ids[:, :-1] == marks.eos
    return begins
