"""The middle of some numbers and their spread about it, which a few wild ones do not move."""

from __future__ import annotations

import statistics
from collections.abc import Collection

NORMAL = 1.4826  # from the median absolute deviation to the standard deviation, of normal noise


def median_and_deviation(values: Collection[float]) -> tuple[float, float]:
    """Return the median, and the standard deviation as the median absolute deviation estimates it."""
    median = statistics.median(values)
    return median, NORMAL * statistics.median(abs(value - median) for value in values)
