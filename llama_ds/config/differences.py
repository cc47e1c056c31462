"""Differences between two configurations by dotted key: a run and the one that it continues, a model and its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

ABSENT: Final = object()  # stands for the value of a key that one side lacks
FLOAT32 = 2.0**-23  # relative spacing of float32, in which some formats store their numbers

Difference = tuple[str, Any, Any]  # dotted key, value on the first side, value on the second


def differences(first: Mapping[str, Any], second: Mapping[str, Any], at: str = "") -> Iterator[Difference]:
    """Yield the keys of two plain mappings whose values differ, in their order.

    Mappings are compared key by key. Sections of a list that have names are compared by name, so that their order does
    not count: `data.sources[web].weight`. Other lists are values.
    """
    for name in {**first, **second}:
        yield from _compared(f"{at}{name}", first.get(name, ABSENT), second.get(name, ABSENT))


def model_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Return the keys in which two models, as plain data, differ. Numbers that are equal as float32 do not differ."""
    names = [name for name in {**first, **second} if not _same(first.get(name), second.get(name))]
    return [(f"model.{name}", first.get(name), second.get(name)) for name in names]


def shown(value: object) -> str:
    """Return a value as in a run file."""
    if value is ABSENT:
        return "absent"
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value).replace('"', "")


def _compared(key: str, first: Any, second: Any) -> Iterator[Difference]:
    named = _by_name(first), _by_name(second)
    if named[0] and named[1]:
        for name in {**named[0], **named[1]}:
            yield from _compared(f"{key}[{name}]", *(side.get(name, ABSENT) for side in named))
    elif isinstance(first, Mapping) and isinstance(second, Mapping):
        yield from differences(first, second, f"{key}.")
    elif first != second:
        yield key, first, second


def _by_name(value: Any) -> dict[str, Any]:
    """Return the sections of a list by their names; {} for anything else."""
    if not isinstance(value, list) or not all(isinstance(item, Mapping) and "name" in item for item in value):
        return {}
    return {item["name"]: {key: part for key, part in item.items() if key != "name"} for item in value}


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return all(_same(first.get(name), second.get(name)) for name in {**first, **second})
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=FLOAT32)
    return bool(first == second)
