"""Keys and values of the tokens before, with which generation computes every token once.

Shapes: B rows, T new tokens of a row, P positions of the cache, H = G R query and G key-value heads of this rank, K
head size. Rows begin at position 0 and have lengths of their own; behind its length a row of the cache holds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ds.model.attention_kernels import attention_kernel
from llama_ds.model.cpu_products import small_products
from llama_ds.model.pointwise import rotated
from llama_ds.model.rope import RotaryTables


class LayerCache:
    """What decoder layers use in place of whole rows: the rotation of the tokens, and their attention."""

    single_on_cpu = False  # whether the next pass is of a single token on a CPU

    def __init__(self) -> None:
        self.joined: dict[nn.Module, tuple[Tensor, Tensor | None] | None] = {}  # see `cached_layer`
        self._tables = (torch.empty(0), torch.empty(0))  # cos and sin of the tokens

    def rotate(self, x: Tensor) -> Tensor:
        """Return queries or keys of the new tokens rotated by their positions: (B, T, heads, K). It may overwrite x."""
        cos, sin = self._tables
        if x.dtype == cos.dtype:
            swapped = x.roll(x.shape[-1] // 2, -1)
            return x.mul_(cos).addcmul_(swapped, sin)
        return rotated(x, cos, sin).to(x.dtype)

    def attend(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        """Return the attention of q (B, T, H, K) of `layer`, whose keys and values are k and v: (B, T, H, K)."""
        raise NotImplementedError


class KeyValueCache(LayerCache):
    """The cache of one batch in all decoder layers of a rank, which allocate their parts on first use.

    `begin` announces the next tokens of every row, then each layer calls `rotate` and `attend` once, and `end` counts
    the tokens.
    """

    def __init__(self, rows: int, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.lengths = [0] * rows  # tokens of each row in the cache
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # keys and values, (B, G, P, K) each
        self._mask: Tensor | None = None  # (B, 1, 1, longest row with its new token), added to the scores
        self._index: tuple[Tensor, Tensor] | None = None  # rows and columns of the new tokens; None: all in one column

    @property
    def empty(self) -> bool:
        """Whether the next tokens are the first ones: prompts, padded on the right to one length."""
        return not any(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._layers.values())

    def begin(self, tokens: int, rotary: RotaryTables, device: torch.device, dtype: torch.dtype) -> None:
        """Prepare for `tokens` more tokens of every row; one, unless the cache is empty. Layers compute in `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = (table.to(wide) for table in rotary.on(device, self.positions))
        self._mask = self._index = None
        self.single_on_cpu = len(self.lengths) == 1 and not self.empty and device.type == "cpu"
        if self.empty:
            self._tables = cos[:tokens], sin[:tokens]  # (T, 1, K)
            return
        assert tokens == 1
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            self._tables = cos[longest : longest + 1], sin[longest : longest + 1]
            return
        column = torch.tensor(self.lengths, device=device)
        self._tables = cos[column][:, None], sin[column][:, None]  # (B, 1, 1, K)
        self._index = torch.arange(len(column), device=device), column
        hidden = torch.arange(longest + 1, device=device) > column[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        self._mask = mask[:, None, None]

    def attend(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        """Append k and v (B, T, G, K) of `layer`; return the attention of q (B, T, H, K) to all so far: (B, T, H, K).

        `backend` is one that `llama_ds.model.attention.choose_backend` has resolved. It computes prompts; the attention
        of single tokens is torch's.
        """
        keys, values = self._part(layer, k)
        if self.empty:
            tokens = k.shape[1]
            keys[:, :, :tokens], values[:, :, :tokens] = k.transpose(1, 2), v.transpose(1, 2)
            return attention_kernel(backend).forward(q, k, v, None)[0]
        longest = max(self.lengths)
        if self._index is None:
            keys[:, :, longest], values[:, :, longest] = k[:, 0], v[:, 0]
        else:
            rows, columns = self._index
            keys[rows, :, columns], values[rows, :, columns] = k[:, 0], v[:, 0]
        # The R queries that share a key-value head are the rows of one matrix, so that no key is repeated.
        grouped = q.view(len(q), k.shape[2], -1, q.shape[3])
        seen = slice(0, longest + 1)
        with nullcontext() if q.is_cuda else small_products():
            out = F.scaled_dot_product_attention(grouped, keys[:, :, seen], values[:, :, seen], attn_mask=self._mask)
        return out.reshape(q.shape)

    def end(self, counts: Sequence[int]) -> None:
        """Count the tokens that every row has got; the others were padding, and the next ones overwrite them."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        for layer, (keys, values) in self._layers.items():
            index = torch.tensor(rows, device=keys.device)
            self._layers[layer] = keys[index], values[index]

    def _part(self, layer: nn.Module, k: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            shape = (len(k), k.shape[2], self.positions, k.shape[3])
            # Zeros, because a mask does not hide NaN: in shorter rows the columns of the longest are read unwritten.
            self._layers[layer] = k.new_zeros(shape), k.new_zeros(shape)
        return self._layers[layer]


class CacheHolder:
    """The cache that the layers of a stage use at present; None: they compute whole rows."""

    def __init__(self) -> None:
        self.cache: LayerCache | None = None

    @contextmanager
    def using(self, cache: LayerCache | None) -> Iterator[None]:
        """Let the layers use `cache`."""
        self.cache = cache
        single = cache is not None and cache.single_on_cpu
        try:
            with small_products() if single else nullcontext():
                yield
        finally:
            self.cache = None
