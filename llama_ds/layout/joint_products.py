"""Whether the weight gradients of several micro-batches are better computed as one product.

For N tokens of a micro-batch and a matrix (O, I), each product reads and writes an fp32 buffer of O I elements. One
product for k micro-batches does it once, and saves 8 O I (k - 1) bytes. Its factors are k pairs of (N, O) and (N, I),
which are copied side by side: 2 e N (O + I) k bytes for elements of e bytes.
"""

from __future__ import annotations

BUFFER_BYTES = 4


def copied_bytes(tokens: int, outputs: int, inputs: int, micro_batches: int, element_bytes: int) -> int:
    """Return the bytes that are read and written to place the factors of one product side by side."""
    return 2 * element_bytes * tokens * (outputs + inputs) * micro_batches


def multiplied_jointly(tokens: int, outputs: int, inputs: int, micro_batches: int, element_bytes: int) -> bool:
    """Return whether one product for all these micro-batches moves fewer bytes than one for each."""
    saved = 2 * BUFFER_BYTES * outputs * inputs * (micro_batches - 1)
    return saved > copied_bytes(tokens, outputs, inputs, micro_batches, element_bytes)
