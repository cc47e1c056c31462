"""How many tokens' logits the loss holds at a time. Arithmetic, which memory plans read too."""

from __future__ import annotations

MIN_CHUNK = 512  # tokens: a product with fewer rows runs slower


def chunk_tokens(tokens: int, hidden_size: int, local_vocab: int) -> int:
    """Return how many tokens' logits exist at a time: about as many numbers as the N x D hidden states have."""
    return min(tokens, max(MIN_CHUNK, -(-tokens * hidden_size // local_vocab)))
