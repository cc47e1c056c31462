"""Rows in which texts branch: a common prefix is computed once, and every branch sees it and itself only.

Shapes: B rows, T tokens of a row, H query and G key-value heads of this rank, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from llama_ds.model.attention import sdpa
from llama_ds.model.key_value_cache import LayerCache
from llama_ds.model.rope import RotaryTables


class BranchedRows(LayerCache):
    """The positions and the attention mask of one micro-batch, in place of those of whole rows.

    Nothing stays after a pass. A column that belongs to no text is padding; it sees itself, so that its attention is
    finite.
    """

    def __init__(
        self, texts: Sequence[Sequence[np.ndarray]], tokens: int, rotary: RotaryTables, device: torch.device
    ) -> None:
        """Take the columns of each text of each row, in the order of the text; texts share those of their prefix.

        A column `tokens` is an id that is only predicted.
        """
        super().__init__()
        positions = np.zeros((len(texts), tokens), np.int64)
        seen = np.zeros((len(texts), tokens, tokens), np.bool_)
        seen[:, np.arange(tokens), np.arange(tokens)] = True
        for row, of_row in enumerate(texts):
            for columns in of_row:
                own = columns[columns < tokens]
                positions[row, own] = np.arange(len(own))
                seen[row][np.ix_(own, own)] = np.tri(len(own), dtype=np.bool_)
        cos, sin = rotary.on(device, int(positions.max()) + 1)
        at = torch.from_numpy(positions).to(device)
        self._tables = cos[at].float(), sin[at].float()  # (B, T, 1, K)
        self._documents = SimpleNamespace(mask=torch.from_numpy(seen).to(device)[:, None])  # (B, 1, T, T)

    def attend(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        """Return the attention of q (B, T, H, K) to k and v (B, T, G, K) along each text: (B, T, H, K).

        torch computes it under every backend, because only its kernels take such a mask.
        """
        return sdpa(q, k, v, self._documents)  # type: ignore[arg-type]
