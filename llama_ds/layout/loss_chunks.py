"""How many tokens' logits the loss holds at a time. Arithmetic, which memory plans read too."""

from __future__ import annotations

MIN_CHUNK = 512  # tokens: a product with fewer rows runs slower
MIN_LOGITS = 1 << 26  # 128 MiB in bf16: a GPU works off fewer as fast as the host asks for the next


def chunk_tokens(tokens: int, hidden_size: int, local_vocab: int) -> int:
    """Return how many tokens' logits exist at a time: as many numbers as the N x D hidden states, or MIN_LOGITS."""
    return min(tokens, max(MIN_CHUNK, max(tokens * hidden_size, MIN_LOGITS) // local_vocab))
