"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from llama_ds.config.schema import OptimizerConfig


def learning_rate(step: int, optimizer: OptimizerConfig, total_steps: int) -> float:
    """Return the learning rate of the 0-based `step` of a run of `total_steps`.

    Warm-up is linear: step 0 uses lr / warmup_steps, step warmup_steps - 1 the peak lr. Then
    - "cosine" decays along half a cosine (LLaMA, arXiv 2302.13971, section 2.3);
    - "wsd" stays at lr and decays over the last decay_steps as 1 - sqrt (MiniCPM, arXiv 2404.06395;
      the shape: Haegele et al., arXiv 2405.18392, section 3).
    The last step, total_steps - 1, uses exactly lr * min_lr_ratio, as would any later step.
    """
    warmup = optimizer.warmup_steps
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    if optimizer.schedule == "cosine":
        share = (1 + math.cos(math.pi * _progress(step, warmup, total_steps))) / 2
    else:
        share = 1 - math.sqrt(_progress(step, total_steps - optimizer.decay_steps, total_steps))
    return optimizer.lr * (optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * share)


def _progress(step: int, start: int, end: int) -> float:
    """Return the fraction of the steps start .. end - 1 that is done after `step`, clamped to [0, 1]."""
    return min(max((step + 1 - start) / (end - start), 0.0), 1.0)
