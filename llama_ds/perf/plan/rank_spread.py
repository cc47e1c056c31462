"""Slowdown of a job by ranks that differ in speed: all wait for the slowest one.

GPUs of one kind differ in clock and temperature, and hosts in noise. If the step times of ranks that compute the same
have relative standard deviation s, the slowest of n independent ranks takes 1 + s E(n) times the mean, where E(n) is
the expected maximum of n standard normal values, about sqrt(2 ln n). Ranks wait for each other at every collective, and
all of them at the end of a step.
"""

from __future__ import annotations

from statistics import NormalDist

from llama_ds.perf.plan.hardware import Hardware


def expected_maximum(count: int) -> float:
    """Return the expected maximum of `count` standard normal values, by Blom's formula (within 0.02)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def slowdown(gpu: Hardware, ranks: int) -> float:
    """Return a step's time over that of a job whose ranks are as fast as the machine's description.

    The constants of a description that were fitted to runs include the wait for the slowest rank of a node; measured
    curves are those of the median rank.
    """
    described = 1 if gpu.curves and gpu.curves.products else gpu.links.gpus_per_node
    return 1 + gpu.rank_spread * (expected_maximum(max(ranks, described)) - expected_maximum(described))
