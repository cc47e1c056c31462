"""What a context-parallel rank needs of a micro-batch's rows, as one array for its device.

Shapes: b rows, T tokens, S = T / cp tokens of this rank. A rank's tokens are a few runs of neighbours, or, in stripes,
every n-th token. Ids and labels of neighbours overlap but for one column, as they do in whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama_ds.config.context_parallel import CpSizes
from llama_ds.config.document_marks import DocumentMarks
from llama_ds.data.documents import document_begins
from llama_ds.layout.row_cuts import own_ranges
from llama_ds.model.embedding import starts_of

WORD = np.dtype(np.int32)
WORD_BITS = 8 * WORD.itemsize


@dataclass(frozen=True)
class RowShare:
    """One rank's share of rows with `tokens` tokens; `marks` are set if attention needs to know their documents."""

    tokens: int
    rank: int  # in the context-parallel group
    sizes: CpSizes
    marks: DocumentMarks | None = None

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the share of rows (b, T + 1) with marked filler: int32 (b, columns).

        Its columns are ids and labels of this rank's tokens; then, with marks, a bit for every token of the row.
        """
        columns: list[np.ndarray] = []
        for part in self._parts:
            if part.step == 1:
                columns.append(rows[:, part.start : part.stop + 1])
            else:
                columns += [rows[:, part.start + at : part.stop + at : part.step] for at in (0, 1)]
        if self.marks is not None:
            begins = document_begins(rows[:, :-1], self.marks)
            padded = np.pad(begins, ((0, 0), (0, -self.tokens % WORD_BITS)))
            columns.append(np.packbits(padded, axis=1, bitorder="little").view(WORD))
        return np.concatenate(columns, 1, dtype=WORD)

    def split(self, share: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return ids (b, S) and labels (b, S), both with marked filler, and document starts (b, T) if there are marks.

        `share` is what `of` returned, on any device.
        """
        ids, labels, at = [], [], 0
        for part in self._parts:
            length = len(part)
            shift = 1 if part.step == 1 else length
            ids.append(share[:, at : at + length])
            labels.append(share[:, at + shift : at + shift + length])
            at += shift + length
        starts = None if self.marks is None else starts_of(_bits(share[:, at:])[:, : self.tokens])
        return torch.cat(ids, 1).long(), torch.cat(labels, 1).long(), starts

    @property
    def _parts(self) -> tuple[range, ...]:
        return own_ranges(self.tokens, self.rank, self.sizes)


def _bits(words: Tensor) -> Tensor:
    """Return the bits (b, 32 W) of words (b, W), the lowest first."""
    octets = words.view(torch.uint8)
    return (octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=words.device) & 1).flatten(1).bool()
