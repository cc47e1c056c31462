"""What log-likelihoods of choices mean: scores by normalization, after the LLaMA paper (arXiv 2302.13971, section 3).

Standard library only: `harness_tasks.py` copies this file to where lm-evaluation-harness runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PLAIN = "plain"
NORMALIZATIONS = (PLAIN, "characters", "answer")


def choice_scores(completions: Sequence[str], log_likelihoods: Sequence[float]) -> dict[str, list[float]]:
    """Return the scores of a question's choices by normalization.

    plain: log P(completion | context). characters: that divided by the characters of the completion. answer: that minus
    log P(completion | "Answer:"), where the task asked for it.

    Args:
        completions: texts of the choices.
        log_likelihoods: in nats, of every completion after its context, then of every one after "Answer:" or none.
    """
    count = len(completions)
    own, alone = list(log_likelihoods[:count]), log_likelihoods[count:]
    scores = {PLAIN: own}
    scores["characters"] = [value / max(1, len(text)) for value, text in zip(own, completions, strict=True)]
    if alone:
        scores["answer"] = [value - bare for value, bare in zip(own, alone, strict=True)]
    return scores


def chosen_is_right(scores: Sequence[float], gold: int) -> float:
    """Return 1 if choice `gold` has the largest score, of equal ones the first, else 0."""
    return float(scores.index(max(scores)) == gold)


def probability(scores: Sequence[float], gold: int) -> float:
    """Return the share of the right choice among the choices: it moves before the accuracy of a small model does."""
    top = max(scores)
    shares = [math.exp(score - top) for score in scores]
    return shares[gold] / sum(shares)
