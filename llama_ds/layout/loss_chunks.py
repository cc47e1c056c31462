"""Chunk size of the loss: the number of tokens whose logits exist at a time. The memory estimates use it too."""

from __future__ import annotations

MIN_CHUNK = 512  # tokens; a product with fewer rows is slower
MIN_LOGITS = 1 << 26  # elements, 128 MiB in bf16; smaller chunks become launch-bound


def chunk_tokens(tokens: int, hidden_size: int, local_vocab: int) -> int:
    """Return the tokens of a chunk; its logits are as large as the N x D hidden states, and at least MIN_LOGITS."""
    return min(tokens, max(MIN_CHUNK, max(tokens * hidden_size, MIN_LOGITS) // local_vocab))
