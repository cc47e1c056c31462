"""The rules of Chrome's trace format that Perfetto asks of a JSON trace."""

from __future__ import annotations

from typing import Any


def check_chrome_format(events: list[dict[str, Any]]) -> None:
    """Check what Perfetto asks of JSON traces: slices of a thread nest, arrows have two ends and bind to slices."""
    slices: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        assert event["ph"] in "XMsfti" and isinstance(event["pid"], int) and isinstance(event["tid"], int), event
        if event["ph"] == "X":
            assert event["dur"] >= 0, event
            slices.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for own in slices.values():
        open_: list[float] = []
        for begin, end in sorted(own, key=lambda s: (s[0], -s[1])):
            while open_ and open_[-1] <= begin + 2e-3:  # times are rounded to nanoseconds
                open_.pop()
            assert not open_ or end <= open_[-1] + 2e-3, (begin, end, open_[-1])
            open_.append(end)
    for ids in ({e["id"] for e in events if e["ph"] == kind and e["cat"] == "message"} for kind in "sf"):
        assert ids == {e["id"] for e in events if e["ph"] in "sf" and e["cat"] == "message"}
    for event in events:
        if event["ph"] in "sf":
            own = slices[event["pid"], event["tid"]]
            assert any(begin - 2e-3 <= event["ts"] <= end + 2e-3 for begin, end in own), event
