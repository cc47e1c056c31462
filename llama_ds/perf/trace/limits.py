"""Limits on a trace's metrics, for CI: `bubble>20` fails if the bubble exceeds 20 percent."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass

from llama_ds.errors import UserError, did_you_mean

_COMPARE = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}
_GRAMMAR = re.compile(r"\s*(\w+)\s*([<>]=?)\s*(-?\d+(?:\.\d+)?)\s*%?\s*")


@dataclass(frozen=True)
class Limit:
    """The condition under which a trace fails."""

    metric: str
    compare: str
    percent: float

    def broken(self, metrics: Mapping[str, float | None]) -> str | None:
        """Return the violation in one line, or None if the limit holds.

        Raises:
            UserError: The trace does not have the metric.
        """
        value = metrics[self.metric]
        if value is None:
            raise UserError(
                f"--fail-if {self.metric}: these traces do not have it; {_REMEDY.get(self.metric, 'use another one')}"
            )
        if _COMPARE[self.compare](value, self.percent):
            return f"{self.metric} is {value:.2f} percent: fails at {self.compare} {self.percent:g}"
        return None


_REMEDY = {"gemm": "record with logging.profile_ranks, or profile_run.py record --ranks first"}


def parse_limit(text: str, known: Mapping[str, str]) -> Limit:
    """Parse METRIC, an operator and a percentage; `known` has the metrics.

    Raises:
        UserError: The syntax is wrong, or the metric is unknown.
    """
    match = _GRAMMAR.fullmatch(text)
    if not match:
        raise UserError(f"--fail-if {text!r}: write METRIC, one of > < >= <=, and percent, as in --fail-if 'bubble>20'")
    metric, compare, percent = match.groups()
    if metric not in known:
        raise UserError(
            f"--fail-if {text!r}: {metric!r} is not a metric{did_you_mean(metric, known)}; use {', '.join(known)}"
        )
    return Limit(metric, compare, float(percent))
