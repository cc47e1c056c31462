"""The median and a spread estimate that are robust to outliers."""

from __future__ import annotations

import statistics
from collections.abc import Collection

NORMAL = 1.4826  # ratio of the standard deviation to the median absolute deviation of normal noise


def median_and_deviation(values: Collection[float]) -> tuple[float, float]:
    """Return the median, and the standard deviation estimated from the median absolute deviation."""
    median = statistics.median(values)
    return median, NORMAL * statistics.median(abs(value - median) for value in values)
