"""How the next token of a text is chosen. Without torch, for tasks that only say it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodingRule:
    """How a token is chosen: the most likely one if `temperature` is 0, else drawn from softmax(logits / temperature).

    As in transformers, first only the `top_k` most likely ids remain (0: all), then of these the fewest that together
    have the probability `top_p`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


GREEDY = DecodingRule()
