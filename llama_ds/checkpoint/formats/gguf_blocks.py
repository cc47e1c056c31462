"""How GGUF stores the elements of a tensor: as numbers of one dtype, or as q8_0 blocks of 32.

A q8_0 block is a scale d in fp16 and 32 integers q of 8 bits; an element is q d. The arithmetic is that of the package
gguf, whose results have the same bits as llama.cpp's own quantization. Reading checks every element against BOUND.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from llama_ds.checkpoint.formats.views import RowBlocks
from llama_ds.checkpoint.stored import Stored
from llama_ds.checkpoint.weights import Readable
from llama_ds.errors import UserError

Q8_0 = "q8_0"
BLOCK, BLOCK_BYTES = 32, 34
LARGEST = 127  # largest integer of a block
# Half a step, and the rounding of the scale to fp16 (normal: 2^-11 of it; subnormal: 2^-25) times the largest integer.
HALF_STEP, SCALE_ERROR, SMALLEST_ERROR = 0.5, LARGEST * 2.0**-11, LARGEST * 2.0**-25


@dataclass(frozen=True)
class Blocks:
    """A tensor in q8_0."""

    dtype: torch.dtype = torch.float32

    def nbytes(self, numel: int) -> int:
        """Return the size of so many elements, whole blocks, in bytes."""
        return numel // BLOCK * BLOCK_BYTES

    def encode(self, part: Tensor) -> Tensor:
        """Return the bytes of whole blocks.

        Raises:
            UserError: a number is too large for the scale in fp16.
        """
        return torch.from_numpy(_quantized(part).reshape(-1))


class BlocksInFile:
    """A matrix that a file holds in q8_0, read as fp32."""

    dtype = torch.float32

    def __init__(self, path: str, offset: int, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.paths = {path}
        self._blocks = Stored(path, offset, torch.uint8, (torch.Size(shape).numel() // BLOCK * BLOCK_BYTES,))

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the whole tensor, in `dtype` or as fp32."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype)
        self.read(out)
        return out

    def read(self, out: Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        """Fill `out` with elements of the rows of rank `rank` of `size`, from `start` on."""
        out = out.view(-1)
        begin = rank * (torch.Size(self.shape).numel() // size) + start
        first, last = begin // BLOCK, -(-(begin + len(out)) // BLOCK)
        blocks = torch.empty((last - first) * BLOCK_BYTES, dtype=torch.uint8)
        self._blocks.read(blocks, first * BLOCK_BYTES)
        values = _dequantized(blocks.numpy().reshape(-1, BLOCK_BYTES))
        out.copy_(torch.from_numpy(values.reshape(-1))[begin - first * BLOCK :][: len(out)])


class Rounded(RowBlocks):
    """A matrix, rounded to what q8_0 holds of it; each element is checked to be within the bound of its block."""

    def __init__(self, source: Readable) -> None:
        super().__init__(source, source.shape)

    def _block(self, rank: int, size: int, row: int, buffer: Tensor) -> Tensor:
        self.source.read(buffer.view(-1), rank, size, row * self.shape[1])
        blocks = _quantized(buffer)
        values = _dequantized(blocks)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        bound = HALF_STEP * scale + np.maximum(SCALE_ERROR * scale, SMALLEST_ERROR)
        if not (np.abs(values - buffer.numpy().reshape(values.shape)) <= bound).all():
            raise UserError("a weight in q8_0 is further from its value than the format rounds; convert to fp16")
        return torch.from_numpy(values)


def _quantized(part: Tensor) -> np.ndarray:
    """Return blocks (N, 34) of bytes."""
    blocks = quants.quantize(part.numpy().reshape(-1, BLOCK), GGMLQuantizationType.Q8_0)
    if not np.isfinite(blocks[:, :2].copy().view(np.float16)).all():
        raise UserError("a weight is too large for q8_0, whose scales are fp16; convert with --dtype bf16")
    return blocks


def _dequantized(blocks: np.ndarray) -> np.ndarray:
    """Return the values (N, 32) in fp32."""
    return quants.dequantize(blocks, GGMLQuantizationType.Q8_0)
