"""The schema of a host's answer, and its validation: a broken host may send anything."""

from __future__ import annotations

import json
from typing import Any

# A type; None; a tuple: any of its shapes; [x]: a list of x; {str: x}: any keys; {"a": x, ...}: at least these keys.
ANSWER = {
    **dict.fromkeys(("address", "hostname", "python", "executable", "code"), str),
    "time": float,
    "packages": {str: str},
    "free": {str: (float, None)},
    "unwritable": {str: str},
    "shared": {str: str},
    "missing": [str],
    "nics": {str: str},
    "cores": (float, None),
    "gpus": (None, {"problem": str}, {"devices": [{str: str}]}),
    "xids": [{"age_s": (float, None), "text": str}],
}
SPEEDS = [{"tflops": float, "groups": {str: (float, None)}}]


def read(text: str, tag: str, shape: Any) -> Any:
    """Return the JSON between <tag> and </tag> at the end of a host's output, None if it does not match `shape`."""
    inside, end, _ = text.rpartition(f"<{tag}>")[2].partition(f"</{tag}>")
    try:
        value = json.loads(inside)
    except (ValueError, RecursionError):
        return None
    return value if end and fits(value, shape) else None


def fits(value: Any, shape: Any) -> bool:
    """Return whether a value matches a shape. Numbers must be finite."""
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(one, shape[0]) for one in value)
    if isinstance(shape, dict) and str in shape:
        return isinstance(value, dict) and all(fits(one, shape[str]) for one in value.values())
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], one) for key, one in shape.items())
    if shape is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
    return value is None if shape is None else isinstance(value, shape)
