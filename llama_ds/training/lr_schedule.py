"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from llama_ds.config.schema import OptimizerConfig


def learning_rate(step: int, optimizer: OptimizerConfig, total_steps: int) -> float:
    """Return the learning rate of the 0-based `step` of a run of `total_steps`.

    Warm-up is linear: step 0 uses lr / warmup_steps, step warmup_steps - 1 the peak lr. Then
    - "cosine" decays along half a cosine (LLaMA, arXiv 2302.13971, section 2.3);
    - "linear" decays in proportion to the steps done (Bergsma et al., arXiv 2502.15938);
    - "wsd" stays at lr and decays over the last decay_steps (MiniCPM, arXiv 2404.06395) as 1 - sqrt, or linearly
      (the shapes: Haegele et al., arXiv 2405.18392, section 3);
    - "inverse_sqrt" is lr * sqrt(warmup_steps / (step + 1)), and not below lr * min_lr_ratio (Vaswani et al., arXiv
      1706.03762, section 5.3); it does not depend on the length of the run;
    - "constant" stays at lr.
    With the first three, the last step, total_steps - 1, uses exactly lr * min_lr_ratio, as would any later step.
    """
    warmup = optimizer.warmup_steps
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    if optimizer.schedule == "inverse_sqrt":
        return optimizer.lr * max(optimizer.min_lr_ratio, math.sqrt(max(warmup, 1) / (step + 1)))
    share = _share(step, optimizer, total_steps)
    return optimizer.lr * (optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * share)


def _share(step: int, optimizer: OptimizerConfig, total_steps: int) -> float:
    """Return how much of the way from the final to the peak learning rate is left, from 1 to 0."""
    if optimizer.schedule == "constant":
        return 1.0
    if optimizer.schedule == "wsd":
        done = _progress(step, total_steps - optimizer.decay_steps, total_steps)
        return 1 - (math.sqrt(done) if optimizer.decay_shape == "sqrt" else done)
    done = _progress(step, optimizer.warmup_steps, total_steps)
    return (1 + math.cos(math.pi * done)) / 2 if optimizer.schedule == "cosine" else 1 - done


def _progress(step: int, start: int, end: int) -> float:
    """Return the fraction of the steps start .. end - 1 that is done after `step`, clamped to [0, 1]."""
    return min(max((step + 1 - start) / (end - start), 0.0), 1.0)
