"""Overrides that make a run go back before a loss spike, and skip the data that led to it."""

from __future__ import annotations

from collections.abc import Sequence


def skips_with(skips: Sequence[tuple[int, int]], back: int, steps: int) -> list[tuple[int, int]]:
    """Return the skips, as (step, steps of data), of a run that goes back to step `back` and skips `steps` of data.

    Data that was skipped before stays skipped: going back twice to one step skips twice as much there, not the same
    data again. From `back` on, step s reads the data that step s + `steps` read or would have read.
    """
    before = [(at, count) for at, count in skips if at < back]
    within = sum(count for at, count in skips if back <= at <= back + steps)
    after = [(at - steps, count) for at, count in skips if at > back + steps]
    return [*before, (back, steps + within), *after]


def rewind_overrides(skips: Sequence[tuple[int, int]], back: int, name: int) -> list[str]:
    """Return the overrides that make a run skip data and go back to step `back`, once for this rewind id."""
    entries = ", ".join(f"{{at_step: {at}, steps: {steps}}}" for at, steps in skips)
    return [f"checkpoint.rewind_to={back}", f"checkpoint.rewind_id={name}", f"data.skip=[{entries}]"]
