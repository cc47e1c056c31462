"""Rows of the embedding and of the head on tensor-parallel ranks: equal parts, padded where tp does not divide them.

As in Megatron-LM, every rank has ceil(V / tp) rows, and padding follows the V rows of the vocabulary in the last parts
(https://github.com/NVIDIA/Megatron-LM, `vocab_size_with_padding`). Padding exists only in the memory of ranks and in
files that DeepSpeed or Megatron-LM load part by part. It is zero, and the loss never computes its logits. So it has no
gradient, and weight decay and AdamW leave it at zero. `model.vocab_size`, parameter counts, FLOPs, indexes of
checkpoints and exports do not include it.
"""

from __future__ import annotations


def part_rows(rows: int, parts: int) -> int:
    """Return the number of rows of each part of a dimension of `rows`, including padding."""
    return -(-rows // parts)


def own_rows(rows: int, part: int, parts: int) -> range:
    """Return the rows of a dimension of `rows` that a part holds, without padding."""
    size = part_rows(rows, parts)
    return range(min(part * size, rows), min((part + 1) * size, rows))


def padding_rows(rows: int, parts: int) -> int:
    """Return the number of rows of padding in all parts together."""
    return parts * part_rows(rows, parts) - rows


def fits(vocab_size: int, tp: int) -> bool:
    """Return whether every rank gets a row of the vocabulary, and not only padding."""
    return len(own_rows(vocab_size, tp - 1, tp)) > 0
