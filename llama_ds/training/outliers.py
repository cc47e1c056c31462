"""Detection of slow ranks and links: pure arithmetic on the times of all ranks.

Ranks are compared within a pipeline stage, because ranks of different stages may do different work. Only parts of a
step in which a rank does not wait for another rank count as its own. In such a part a rank is slow when its mean over
the steps exceeds the median of its stage by more than

    max(SHARE of the step, SPREADS times the spread of the stage)

A smaller share is not worth investigating, and a smaller multiple of the spread may be noise. The spread is the
robust standard deviation, 1.4826 * median |x - median|, of the stage, or the median of all stages' spreads if that is
larger, because the spread of few ranks is small by chance. The median of an even number is the lower one, so that half
of a stage may be slow.

Fewer than FEW ranks do not give a reliable spread. Their threshold is SHARE_OF_FEW, and the median over the steps must
exceed it too, so that a single long step does not count. Of two ranks, the faster one is the reference; a single rank
has no reference and is not judged.

Tensor-parallel ranks compute in lockstep and are judged as one unit, by the minimum of their times: when one waits for
data, the others' wait for it appears as their compute time.

A slow link shows as waits: all ranks of a pipeline wait longer for messages than the other pipelines' ranks, and their
own parts explain less than half of it. Stages before the link then wait for later stages, stages after it for earlier
ones.

Shapes: P stages, D pipelines of tensor-parallel groups, T tensor-parallel ranks, K parts of a step; n compared ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_ds.job.robust_stats import NORMAL
from llama_ds.parallel.step_times import BETWEEN, COMPUTE, DATA, EARLIER, LATER, OPTIMIZER

SHARE, SPREADS = 0.05, 6.0
FEW, SHARE_OF_FEW = 16, 0.1
OWN = (DATA, COMPUTE, OPTIMIZER, BETWEEN)  # parts in which a rank does not wait for another rank


@dataclass(frozen=True)
class SlowRanks:
    """A rank, or a tensor-parallel group, that is slow in a part of the step."""

    ranks: tuple[int, ...]
    stage: int
    part: int
    time: float
    median: float  # median of the stage
    steady: bool  # slow in most steps, not only in a few


@dataclass(frozen=True)
class SlowLink:
    """A pipeline with slow messages."""

    ranks: np.ndarray  # (P, T)
    after: int | None  # stage before the link; None if unknown
    time: float  # extra wait of its ranks over the median


@dataclass(frozen=True)
class Outliers:
    """The slow ranks and links over an interval of steps, and the reference medians, in the unit of the times."""

    step: float  # median over the ranks of the step time, without the time between steps
    medians: np.ndarray  # (P, K): median of each stage
    slow: list[SlowRanks]
    links: list[SlowLink]


def find(mean: np.ndarray, median: np.ndarray, layout: Sequence[int], one_way: bool) -> Outliers:
    """Find the outliers from the mean and the median of each rank's times over the steps, both (P * D * T, K).

    `layout` is (P, D, T), with ranks in that order; `one_way`: each rank has one stage, not several.
    """
    means, medians = mean.reshape(*layout, -1), median.reshape(*layout, -1)
    step = float(np.median(mean.sum(1) - mean[:, BETWEEN]))
    ranks = np.arange(len(mean)).reshape(layout)
    slow: list[SlowRanks] = []
    own = np.zeros(layout[:2])  # each tensor-parallel group's excess over the median of its stage, over all parts
    for part in OWN:
        usual = _units(part, medians[..., part])
        # Evaluations and saves happen between few of the steps; the median ignores them.
        average = usual if part == BETWEEN else _units(part, means[..., part])
        units = ranks if part == COMPUTE else ranks.reshape(layout[0], -1, 1)
        slow += _slow(part, units, average, usual, step)
        own += _excess(average).clip(0).reshape(*layout[:2], -1).max(2)
    stages = np.median(means.reshape(layout[0], -1, means.shape[-1]), 1)
    return Outliers(step, stages, slow, _links(means, medians, own, ranks, step, one_way))


def _units(part: int, times: np.ndarray) -> np.ndarray:
    """Return the times to compare within each stage, (P, n), from the times (P, D, T) of one part."""
    return times.min(2) if part == COMPUTE else times.reshape(len(times), -1)


def _slow(part: int, units: np.ndarray, average: np.ndarray, usual: np.ndarray, step: float) -> list[SlowRanks]:
    """Return the slow ones among `units` (P, n, ranks) by their mean and median times, (P, n) each."""
    reference, often = _lower_median(average), _above(usual, step)
    over = _above(average, step)
    if average.shape[1] < FEW:
        over &= often
    return [
        SlowRanks(
            tuple(units[s, i].tolist()), int(s), part, float(average[s, i]), float(reference[s]), bool(often[s, i])
        )
        for s, i in np.argwhere(over)
    ]


def _links(
    means: np.ndarray, medians: np.ndarray, own: np.ndarray, ranks: np.ndarray, step: float, one_way: bool
) -> list[SlowLink]:
    """Return the pipelines whose messages are slow; the times of tensor-parallel ranks are averaged: (P, D)."""
    if ranks.shape[0] == 1:
        return []
    earlier, later = (means[..., part].mean(2) for part in (EARLIER, LATER))
    waits, usual = earlier + later, (medians[..., EARLIER] + medians[..., LATER]).mean(2)
    late = (_above(waits, step) & _above(usual, step)).mean(0) > 0.5  # in most of the stages
    excess = np.median(_excess(waits), 0)
    late &= own.sum(0) < excess / 2
    links = []
    for d in np.flatnonzero(late):
        before, after = (_excess(x)[:, d] for x in (later, earlier))
        # The cut that maximises waits for later stages before it plus waits for earlier stages after it.
        cut = int(np.argmax(np.cumsum(before)[:-1] + np.cumsum(after[::-1])[::-1][1:]))
        links.append(SlowLink(ranks[:, d], cut if one_way else None, float(excess[d])))
    return links


def _above(times: np.ndarray, step: float) -> np.ndarray:
    """Return a mask of the times (P, n) that exceed their stage's median by more than the threshold."""
    excess = _excess(times)
    spread = NORMAL * _lower_median(np.abs(excess))
    spread = np.maximum(spread, np.median(spread))[:, None]
    share = SHARE_OF_FEW if times.shape[1] < FEW else SHARE
    return excess > np.maximum(share * step, SPREADS * spread)


def _excess(times: np.ndarray) -> np.ndarray:
    """Return the excess of the times (P, n) over their stage's median."""
    return times - _lower_median(times)[:, None]


def _lower_median(times: np.ndarray) -> np.ndarray:
    """Return the lower medians of the rows of (P, n)."""
    middle = (times.shape[1] - 1) // 2
    return np.partition(times, middle, 1)[:, middle]
