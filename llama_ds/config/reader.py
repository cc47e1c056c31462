"""Strict reading of plain data (dicts, lists, scalars) into the frozen dataclasses of `schema`.

Generic: it walks the dataclass fields and their type hints, so a new key needs no code here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from decimal import Decimal
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from llama_ds.config.declare import SectionError, declared
from llama_ds.errors import UserError, did_you_mean, listed, shortened

T = TypeVar("T")

_SUFFIX = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# No leading zeros: YAML 1.1 reads 010 as 8, YAML 1.2 as 10. The number of digits keeps `Decimal` exact.
_NUMBER = re.compile(r"([+-]?(?:0|[1-9][0-9_]{0,19})(?:\.[0-9_]{1,20})?(?:[eE][+-]?[0-9]{1,2})?) ?([KMBT]?)")
_FLOAT = re.compile(r"[+-]?(?:0|[1-9][0-9_]*|(?=\.[0-9]))(?:\.[0-9_]*)?(?:[eE][+-]?[0-9]+)?")
_WANTED = {
    int: "an integer (4194304, 4_194_304, 4M, 1.4T and 1.4e12 are)",
    float: "a finite number",
    str: "a string",
    bool: "true or false",
    dict: "a mapping",
}


@dataclass(frozen=True)
class ConfigSource:
    """Origin of a value: the run file, or the command line for overridden keys."""

    path: str
    overridden: frozenset[str] = frozenset()

    def error(self, key: str, rule: str) -> UserError:
        """Return the error that `key` breaks `rule`, naming the file or command line that set it."""
        overridden = any(key == o or o.startswith(f"{key}.") or key.startswith(f"{o}.") for o in self.overridden)
        return UserError(f"{'command line' if overridden else self.path}: {key} {rule}")


def read(kind: type[T], data: object, source: ConfigSource, key: str = "") -> T:
    """Return `data` as an instance of `kind`, a dataclass or a type its fields may have.

    Raises:
        UserError: a key is unknown, missing or of the wrong type, or a value breaks a rule of its section; the message
            names it by its dotted key under `key`.
    """
    return _read(kind, data, source, key)


def plain(section: Any) -> dict[str, Any]:
    """Return a dataclass as plain data (dicts, lists, scalars), the inverse of `read`."""
    return _plain(asdict(section))


def check_keys(data: dict, known: Iterable[str], source: ConfigSource, key: str = "") -> None:
    """Raise UserError for a key of `data` that is not `known`, suggesting the closest known one."""
    names = list(known)
    for name in data:
        if name not in names:
            shown = shortened(name if isinstance(name, str) and name.isprintable() else repr(name))
            raise source.error(_join(key, shown), f"is not a known key{did_you_mean(shown, names)}")


def integer(text: str) -> int | None:
    """Return the integer that `text` denotes (`4_194_304`, `4M`, `1.4T`, `1.4e12`), None if it denotes none."""
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    number = Decimal(match[1].replace("_", "")) * _SUFFIX.get(match[2], 1)
    return int(number) if number == number.to_integral_value() else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read(kind: Any, data: object, source: ConfigSource, key: str) -> Any:
    if get_origin(kind) in (Union, UnionType):
        if data is None and NoneType in get_args(kind):
            return None
        (kind,) = (arm for arm in get_args(kind) if arm is not NoneType)
    if is_dataclass(kind):
        return _read_dataclass(kind, data, source, key)
    if get_origin(kind) is tuple:
        return _read_tuple(get_args(kind), data, source, key)
    if get_origin(kind) is dict:
        return _read_mapping(get_args(kind)[1], data, source, key)
    if kind is object:  # whatever the file holds
        return data
    value = _scalar(kind, data)
    if value is None:
        null = "; YAML reads ~ and an empty value as null, so write them in quotes" if data is None else ""
        raise source.error(key, f"= {_shown(data)} is not {_WANTED[kind]}{null}")
    return value


def _read_dataclass(kind: Any, data: object, source: ConfigSource, key: str) -> Any:
    if not isinstance(data, dict):
        raise source.error(key, f"= {_shown(data)} is not a section of keys")
    known, hints = fields(kind), _hints(kind)
    check_keys(data, (f.name for f in known), source, key)
    missing = [f.name for f in known if f.name not in data and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise source.error(_join(key, missing[0]), "is missing and has no default")
    given = [f.name for f in known if f.name in data]
    for name, found in declared(kind).items():
        if found.choices and isinstance(data.get(name), (bool, int, float)):
            raise source.error(_join(key, name), f"= {_shown(data[name])} is not {listed(found.choices)}")
    values = {name: _read(hints[name], data[name], source, _join(key, name)) for name in given}
    try:
        return kind(**values)
    except SectionError as error:
        raise error.placed(source.path, key) from None


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read_tuple(arms: tuple[Any, ...], data: object, source: ConfigSource, key: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise source.error(key, f"= {_shown(data)} is not a list")
    if arms[-1] is Ellipsis:
        arms = (arms[0],) * len(data)
    if len(data) != len(arms):
        raise source.error(key, f"= {_shown(data)} has {len(data)} entries, not {len(arms)}")
    return tuple(_read(arm, item, source, f"{key}.{i}") for i, (arm, item) in enumerate(zip(arms, data, strict=True)))


def _read_mapping(kind: Any, data: object, source: ConfigSource, key: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise source.error(key, f"= {_shown(data)} is not {_WANTED[dict]}")
    return {str(name): _read(kind, item, source, f"{key}.{name}") for name, item in data.items()}


def _scalar(kind: Any, data: object) -> Any:
    """Return `data` as a `kind`, or None if it is not one. Booleans do not count as numbers."""
    if kind is int and isinstance(data, str):
        return integer(data)
    if kind is int and isinstance(data, float):
        return int(data) if data.is_integer() else None
    if kind is float and isinstance(data, (int, float, str)) and not isinstance(data, bool):
        return _finite(data)
    if isinstance(data, bool) and kind is not bool:
        return None
    return data if isinstance(data, kind) else None


def _finite(data: int | float | str) -> float | None:
    if isinstance(data, str) and not _FLOAT.fullmatch(data):  # float() also reads " 1", "1__0" and other digits
        return None
    try:
        number = float(data)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(data: object) -> str:
    """Return a value of any kind and size for a message."""
    return shortened(repr(data))


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
