"""Arithmetic of intervals that may nest or overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llama_ds.perf.trace.read import Event

Interval = tuple[float, float]


def own_times(outer: Event, inner: Sequence[Event]) -> tuple[float, list[float]]:
    """Return the durations of `outer` and of each of `inner`, both without their nested events.

    `inner` is sorted by begin, longer events first. An event that exceeds its enclosing event is truncated.
    """
    left = [outer.length, *[0.0] * len(inner)]
    open_: list[tuple[float, int]] = [(outer.end, 0)]
    for i, event in enumerate(inner, 1):
        while len(open_) > 1 and open_[-1][0] <= event.begin:
            open_.pop()
        around, parent = open_[-1]
        end = min(event.end, around)
        left[i] = max(0.0, end - event.begin)
        left[parent] -= left[i]
        open_.append((end, i))
    return max(0.0, left[0]), [max(0.0, time) for time in left[1:]]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of `intervals` as sorted, disjoint intervals."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def total(intervals: Iterable[Interval]) -> float:
    """Return the length of the union of `intervals`."""
    return sum(end - begin for begin, end in merged(intervals))


def common(a: Sequence[Interval], b: Sequence[Interval]) -> float:
    """Return the length of the intersection of two results of `merged`."""
    i = j = 0
    time = 0.0
    while i < len(a) and j < len(b):
        time += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return time
