"""Causal attention behind one call: the flash_attn package on CUDA, torch's SDPA elsewhere, a plain reference.

Shapes: B rows, T tokens, H query heads, G key-value heads (G divides H), K head size. Queries are (B, T, H, K),
keys and values (B, T, G, K), all on this rank. `document_start` (B, T) holds, for each position of a packed row,
the position at which its document begins; attention then stays inside documents.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from llama_ds.config.rules import FLASH_HEAD_DIMS
from llama_ds.errors import UserError
from llama_ds.log import logger
from llama_ds.model.attention_blocks import MAX_ROW_TOKENS
from llama_ds.model.attention_torch_flash import FLASH_DTYPES, packed_attention, torch_flash_takes
from llama_ds.model.cpu_products import small_products

FLASH_4 = "flash_attn.cute"
FLASH_MODULES = ("flash_attn", FLASH_4)  # the 2.x interface and that of 4.x; both export the same two functions
# Minimum compute capability of version 4. On an A100 (8.0) only its forward runs (4.0.0b36). From Hopper on it comes
# before version 2, whose kernels are written for Ampere.
_FLASH_4_CAPABILITY = (9, 0)
_FLASH_4_SMALLER = (10, 11)  # capabilities whose kernels lack heads of 136 to 248 (its `_validate_head_dims`)


class Documents:
    """The document boundaries of one micro-batch in the form that each backend takes, each computed at most once."""

    def __init__(self, start: Tensor) -> None:
        self.start = start  # (B, T)
        self.longest = start.shape[1]  # upper bound of the tokens of a document, which kernels size their grids by
        self._biases: dict[torch.dtype, Tensor] = {}
        self.blocks: dict[tuple[Any, ...], Any] = {}  # those of the steps of a ring (`ring_blocks`)

    @classmethod
    def of_lengths(cls, lengths: np.ndarray, device: torch.device) -> Documents:
        """Return documents of these lengths (documents,) as one row, without a read from `device`."""
        ends = lengths.cumsum()
        found = cls(torch.tensor(np.repeat(ends - lengths, lengths)[None], dtype=torch.int32, device=device))
        vars(found)["cumulative_lengths"] = torch.tensor([0, *ends], dtype=torch.int32, device=device)
        found.longest = int(lengths.max())
        return found

    @cached_property
    def mask(self) -> Tensor:
        """Return the (B, 1, T, T) boolean mask: position i attends to j if start_i <= j <= i."""
        position = torch.arange(self.start.shape[1], device=self.start.device)
        return ((position >= self.start[..., None]) & (position <= position[:, None]))[:, None]

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Return the mask as an additive bias on the scores, 0 or -inf, in the dtype that a kernel takes."""
        if dtype not in self._biases:
            bias = torch.zeros(self.mask.shape, dtype=dtype, device=self.start.device)
            self._biases[dtype] = bias.masked_fill_(~self.mask, -math.inf)
        return self._biases[dtype]

    @cached_property
    def begins(self) -> list[list[int]]:
        """Return of each row the positions at which its documents begin.

        Reading them synchronises with the device, once per micro-batch and stage. Without data, as in a dry run, each
        row is one document, which needs most memory.
        """
        rows, length = self.start.shape
        if isinstance(self.start, FakeTensor):
            return [[0]] * rows
        *offsets, _ = self.cumulative_lengths.tolist()
        found: list[list[int]] = [[] for _ in range(rows)]
        for offset in offsets:
            found[offset // length].append(offset % length)
        return found

    @cached_property
    def cumulative_lengths(self) -> Tensor:
        """Return int32 (documents + 1,) offsets into the flattened B * T tokens.

        Reading the number of documents synchronises with the device, once per micro-batch and stage.
        """
        rows, length = self.start.shape
        begins = self.start == torch.arange(length, device=self.start.device)
        offsets = begins.flatten().nonzero().flatten()
        return F.pad(offsets, (0, 1), value=rows * length).to(torch.int32)


Backend = Callable[[Tensor, Tensor, Tensor, "Documents | None"], Tensor]


class CausalAttention:
    """softmax(Q K^T / sqrt(K), causal) V by one backend; shared by a stage's layers."""

    def __init__(self, backend: str, computed_by: Backend | None = None) -> None:
        """`computed_by` computes it in place of the function of the backend, over rows that several ranks share."""
        self.name = backend
        self._backend = computed_by or _load(backend)
        self._documents: Documents | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None = None) -> Tensor:
        """Return (B, T, H, K)."""
        return self._backend(q, k, v, self.documents(document_start))

    def documents(self, start: Tensor | None) -> Documents | None:
        """Return the document boundaries that `start` encodes, None without it."""
        # All layers of a stage receive the same tensor for one micro-batch, so its mask is built once.
        if start is None:
            return None
        if self._documents is None or self._documents.start is not start:
            self._documents = Documents(start)
        return self._documents


def choose_backend(wanted: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """Resolve `auto` for the device and check that a named backend can run there.

    `device_type` is torch's: "cpu" or "cuda". `dtype` is that of queries, keys and values.

    Raises:
        UserError: `wanted` is not installed or does not support the dtype or the head size.
    """
    obstacle = _flash_obstacle(device_type, dtype, head_dim)
    if wanted == "flash_attn" and obstacle:
        raise UserError(f"compute.attention_backend = flash_attn: {obstacle}; use auto or sdpa")
    chosen = wanted if wanted != "auto" else ("sdpa" if obstacle else "flash_attn")
    logger.info("attention backend: %s%s", chosen, _reason(wanted, chosen, obstacle))
    return chosen


def _reason(wanted: str, chosen: str, obstacle: str) -> str:
    if chosen == "flash_attn":
        return f" ({flash_module().__name__} on compute capability {_dotted(torch.cuda.get_device_capability())})"
    return f" (not flash_attn: {obstacle})" if wanted == "auto" and obstacle else ""


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _flash_obstacle(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    if device_type != "cuda":
        return f"it runs on CUDA, this device is {device_type}"
    if dtype not in FLASH_DTYPES:
        return f"it computes in bf16 or fp16, this run in {str(dtype).removeprefix('torch.')}"
    if head_dim not in FLASH_HEAD_DIMS:
        return f"head_dim {head_dim} is not a multiple of {FLASH_HEAD_DIMS.step} up to {FLASH_HEAD_DIMS[-1]}"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package is not installed (pip install flash-attn)"
    capability = torch.cuda.get_device_capability()
    try:
        version_4 = flash_module().__name__ == FLASH_4
    except UserError as error:
        return str(error)
    if version_4 and capability[0] in _FLASH_4_SMALLER and head_dim > 128 and head_dim != 256:
        return f"version 4 takes head_dim up to 128 and 256 on compute capability {_dotted(capability)}, not {head_dim}"
    if version_4 and capability < _FLASH_4_CAPABILITY:
        return f"version 4 has no backward for compute capability {_dotted(capability)} (pip install 'flash-attn<3')"
    return ""


def _load(backend: str) -> Backend:
    if backend == "flash_attn":
        return flash_backend()
    return {"sdpa": sdpa, "reference": reference}[backend]


def flash_backend() -> Backend:
    """Return attention by the installed flash_attn: the 2.x interface, or 4.x's `flash_attn.cute` (Dao 2023).

    Both take these keyword arguments; 2.x returns a tensor, 4.x (tensor, logsumexp).
    """
    module = flash_module()
    dense, varlen = module.flash_attn_func, module.flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        if documents is None:
            out = dense(q=q, k=k, v=v, causal=True)
            return out[0] if isinstance(out, tuple) else out
        rows, length = q.shape[:2]
        offsets = documents.cumulative_lengths
        out = varlen(
            q=q.flatten(0, 1),
            k=k.flatten(0, 1),
            v=v.flatten(0, 1),
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=length,
            max_seqlen_k=length,
            causal=True,
        )
        return (out[0] if isinstance(out, tuple) else out).unflatten(0, (rows, length))

    return attend


def flash_module() -> Any:
    """Return the installed interface of flash_attn for this GPU: `flash_attn` (2.x), or `flash_attn.cute` (4.x).

    Where both are installed, it is 4.x on Hopper and newer and 2.x on older devices.
    """
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= _FLASH_4_CAPABILITY
    for name in reversed(FLASH_MODULES) if hopper else FLASH_MODULES:
        with suppress(ImportError):
            module = importlib.import_module(name)
            if hasattr(module, "flash_attn_func"):  # with only 4.x installed, `flash_attn` is an empty namespace
                return module
    raise UserError(
        f"neither {' nor '.join(FLASH_MODULES)} can be imported (reinstall flash-attn for this torch and CUDA)"
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """Attention by torch.nn.functional.scaled_dot_product_attention; packed rows on CUDA by the kernels below it."""
    if isinstance(documents, Documents) and torch_flash_takes(q):  # not the mask alone, as of rows that branch
        return packed_attention(q, k, v, documents)
    short_on_cpu = q.device.type == "cpu" and q.shape[1] <= MAX_ROW_TOKENS
    if q.device.type == "cpu":
        # The CPU kernel lacks grouped queries and would fall back to unfused attention.
        k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
    with small_products() if short_on_cpu else nullcontext():
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=documents.mask if documents else None,
            is_causal=documents is None,
            enable_gqa=k.shape[2] != q.shape[2],
        )
    return out.transpose(1, 2)


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """Attention computed from its definition, in the inputs' dtype; for tests."""
    length = q.shape[1]
    k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / math.sqrt(q.shape[-1])
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    visible = causal if documents is None else documents.mask
    return torch.einsum("bhij,bjhk->bihk", scores.masked_fill(~visible, -math.inf).softmax(-1), v)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each key-value head for its group of query heads: (B, T, G, K) -> (B, T, H, K)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)
