"""The rule for slow ranks and links. Pure arithmetic on the times of all ranks.

Ranks are compared within a pipeline stage, because ranks of different stages may do different work. Only parts of a
step in which a rank waits for no other rank count as its own. In such a part a rank is slow when its mean over the
steps exceeds the median of its stage by more than

    max(SHARE of the step, SPREADS times the spread of the stage)

A smaller share is not worth a person's time, and a smaller multiple of the spread may be noise. The spread is the
robust standard deviation, 1.4826 * median |x - median|, of the stage, or the median of all stages' spreads if that is
larger, because the spread of few ranks is small by chance. The median of an even number is the lower one, so that half
of a stage may be slow.

Fewer ranks than FEW do not give a reliable spread. Their share is larger, and the median over the steps must exceed the
threshold too, so that a single long step does not count. Of two ranks, the faster one is the reference; a single rank
has no reference and is not judged.

Tensor-parallel ranks compute in lockstep and are judged as one, by the least of their times: when one waits for data,
the others' wait for it appears as their compute time.

A slow link shows as waits: all ranks of a pipeline wait longer for messages than the other pipelines' ranks, and their
own parts explain less than half of it. Stages before the link then wait for later stages, stages after it for earlier
ones.

Shapes: P stages, D pipelines of tensor-parallel groups, T tensor-parallel ranks, K parts of a step; n ranks that are
compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_ds.job.robust_stats import NORMAL
from llama_ds.parallel.step_times import BETWEEN, COMPUTE, DATA, EARLIER, LATER, OPTIMIZER

SHARE, SPREADS = 0.05, 6.0
FEW, SHARE_OF_FEW = 16, 0.1
OWN = (DATA, COMPUTE, OPTIMIZER, BETWEEN)  # parts in which a rank waits for no other rank


@dataclass(frozen=True)
class SlowRanks:
    """One rank that is slow in a part of the step, or a tensor-parallel group."""

    ranks: tuple[int, ...]
    stage: int
    part: int
    time: float
    median: float  # median of the stage
    steady: bool  # slow in most steps, not only in few


@dataclass(frozen=True)
class SlowLink:
    """A pipeline with slow messages."""

    ranks: np.ndarray  # (P, T)
    after: int | None  # the stage before the link; None if unknown
    time: float  # how much longer its ranks wait than the median


@dataclass(frozen=True)
class Outliers:
    """The slow ranks and links of some steps, and the medians they exceed; in the unit of the times."""

    step: float  # median over the ranks of a step without the time between steps
    medians: np.ndarray  # (P, K): median of each stage
    slow: list[SlowRanks]
    links: list[SlowLink]


def find(mean: np.ndarray, median: np.ndarray, layout: Sequence[int], one_way: bool) -> Outliers:
    """Judge the ranks by the mean and the median of their times over the steps, both (P * D * T, K).

    `layout` is (P, D, T), ranks in that order; `one_way`: each rank has one stage, not several.
    """
    means, medians = mean.reshape(*layout, -1), median.reshape(*layout, -1)
    step = float(np.median(mean.sum(1) - mean[:, BETWEEN]))
    ranks = np.arange(len(mean)).reshape(layout)
    slow: list[SlowRanks] = []
    own = np.zeros(layout[:2])  # each tensor-parallel group's excess over the median of its stage, over all parts
    for part in OWN:
        usual = _units(part, medians[..., part])
        # Evaluations and saves fall between a few of the steps; the median leaves them out.
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
    """Return the slow of `units` (P, n, ranks) by their mean times and their median times, (P, n) each."""
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
    """Return the pipelines whose messages are slow, tensor-parallel ranks taken together: (P, D)."""
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
        # The cut with the most waiting for later stages before it plus waiting for earlier stages after it.
        cut = int(np.argmax(np.cumsum(before)[:-1] + np.cumsum(after[::-1])[::-1][1:]))
        links.append(SlowLink(ranks[:, d], cut if one_way else None, float(excess[d])))
    return links


def _above(times: np.ndarray, step: float) -> np.ndarray:
    """Tell which times (P, n) are above their stage's median by more than the rule allows."""
    excess = _excess(times)
    spread = NORMAL * _lower_median(np.abs(excess))
    spread = np.maximum(spread, np.median(spread))[:, None]
    share = SHARE_OF_FEW if times.shape[1] < FEW else SHARE
    return excess > np.maximum(share * step, SPREADS * spread)


def _excess(times: np.ndarray) -> np.ndarray:
    """Return by how much the times (P, n) are above their stage's median."""
    return times - _lower_median(times)[:, None]


def _lower_median(times: np.ndarray) -> np.ndarray:
    """Return the medians of the rows of (P, n)."""
    middle = (times.shape[1] - 1) // 2
    return np.partition(times, middle, 1)[:, middle]
