"""The rule by which a rank is called slow. Pure arithmetic on the times of all ranks.

Like is compared with like: the ranks of one pipeline stage do the same work, those of different stages may not. In each
part of a step that is a rank's own (it waits for nobody in it) a rank is slow when its mean over the steps is above the
median of its stage by more than

    max(SHARE of the step, SPREADS times the spread of the stage)

SHARE, because less is not worth a person's time; SPREADS, so that noise accuses nobody. The spread is the robust
standard deviation, 1.4826 * median |x - median|, of the stage or of the stage in the middle, whichever is larger: that
of few ranks is small by chance. The median is the lower one of an even number, so that half of a stage may be slow.

Fewer ranks than FEW hardly tell their spread. Their share is larger, and the median over the steps must be as high as
the mean: one hiccup does not accuse. Of two ranks the faster one is the measure; one alone has none, and nothing is
said of it.

Tensor-parallel ranks compute in lockstep, so their computing is that of the slowest and they are judged as one: by the
least of their times, since one that waits for data has the others wait in what they take for computing.

A slow link shows as waits: all ranks of a pipeline wait longer for messages than those of the other pipelines, and none
of them has anything of its own that would explain half of it. Stages before the link then wait for later ones, those
after it for earlier ones.

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
OWN = (DATA, COMPUTE, OPTIMIZER, BETWEEN)  # parts in which a rank waits for nobody


@dataclass(frozen=True)
class Slow:
    """Ranks that are slow in a part, neighbours if several: a tensor-parallel group."""

    ranks: tuple[int, ...]
    stage: int
    part: int
    time: float
    median: float  # of the stage
    steady: bool  # in most steps, not in few of them


@dataclass(frozen=True)
class SlowLink:
    """A pipeline whose messages take long, and the stage after which; None where that cannot be told."""

    ranks: np.ndarray  # (P, T)
    after: int | None
    time: float  # that its ranks wait longer than the median


@dataclass(frozen=True)
class Found:
    """What was found in some steps, in the unit of the times."""

    step: float  # all parts but what is between steps
    medians: np.ndarray  # (P, K): of each stage
    slow: list[Slow]
    links: list[SlowLink]


def find(mean: np.ndarray, median: np.ndarray, layout: Sequence[int], one_way: bool) -> Found:
    """Judge the ranks by the mean and the median of their times over the steps, both (P * D * T, K).

    `layout` is (P, D, T), ranks in that order; `one_way`: each rank has one stage, not several.
    """
    means, medians = mean.reshape(*layout, -1), median.reshape(*layout, -1)
    step = float(np.median(mean.sum(1) - mean[:, BETWEEN]))
    ranks = np.arange(len(mean)).reshape(layout)
    slow: list[Slow] = []
    own = np.zeros(layout[:2])  # what each pipeline's ranks do longer than the median of their stage, in all parts
    for part in OWN:
        usual = _units(part, medians[..., part])
        # Evaluations and saves are between few of the steps; they are no rank's own.
        average = usual if part == BETWEEN else _units(part, means[..., part])
        units = ranks if part == COMPUTE else ranks.reshape(layout[0], -1, 1)
        slow += _slow(part, units, average, usual, step)
        own += _excess(average).clip(0).reshape(*layout[:2], -1).max(2)
    stages = np.median(means.reshape(layout[0], -1, means.shape[-1]), 1)
    return Found(step, stages, slow, _links(means, medians, own, ranks, step, one_way))


def _units(part: int, times: np.ndarray) -> np.ndarray:
    """Return what is compared within the stages, (P, n), of the times (P, D, T) of one part."""
    return times.min(2) if part == COMPUTE else times.reshape(len(times), -1)


def _slow(part: int, units: np.ndarray, average: np.ndarray, usual: np.ndarray, step: float) -> list[Slow]:
    """Return the slow ones of `units` (P, n, ranks) by their times (P, n)."""
    reference, often = _lower_median(average), _above(usual, step)
    over = _above(average, step)
    if average.shape[1] < FEW:
        over &= often
    return [
        Slow(tuple(units[s, i].tolist()), int(s), part, float(average[s, i]), float(reference[s]), bool(often[s, i]))
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
    late = (_above(waits, step) & _above(usual, step)).mean(0) > 0.5  # most of its stages
    excess = np.median(_excess(waits), 0)
    late &= own.sum(0) < excess / 2
    links = []
    for d in np.flatnonzero(late):
        before, after = (_excess(x)[:, d] for x in (later, earlier))
        # The cut that has most of the waiting for later stages before it, and for earlier ones after it.
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
