"""Declarations of the keys of a run file's section, and the errors for values that break a declared rule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from llama_ds.config.paths import expanded, text_problem
from llama_ds.errors import UserError, did_you_mean, listed, shortened

POSITIVE, NOT_NEGATIVE = "positive", "not negative"
# Upper bounds are far above what anybody trains; they refuse slips of the pen, and what would overflow or hang.
MOST = 10**9  # default bound
MOST_TOKENS = 10**16  # tokens of a run
MOST_LENGTH = 10**8  # tokens of a row
MOST_INT64 = 2**63 - 1


@dataclass(frozen=True)
class Key:
    """Meaning, unit and permitted values of a key.

    Signs, bounds (`least` and `most`, of each entry in lists and mappings) and choices are enforced. The other fields
    are text for `docs/run_file.md`: `rule` describes a check made elsewhere, `default` replaces the field's own
    default, and `form` replaces the field's type. A path is expanded (`config/paths.py`), and must not be empty unless
    that is the field's default.
    """

    meaning: str
    unit: str = ""
    sign: str = ""  # POSITIVE, NOT_NEGATIVE, or "" for any value
    least: float | None = None
    most: float = MOST
    choices: tuple[str, ...] = ()
    rule: str = ""
    default: str = ""
    form: str = ""
    is_path: bool = False
    is_foreign: bool = False  # whether the value is checked elsewhere only


class SectionError(UserError):
    """A value breaks a rule of its section; the message names keys as `section.key`."""

    def __init__(self, section: str, rule: str) -> None:
        super().__init__(rule)
        self.section = section

    def placed(self, path: str, key: str) -> UserError:
        """Return the error for the file `path`, where the section is called `key`; "" is the top level."""
        rule = str(self)
        if self.section != key:
            rule = rule.replace(f"{self.section}.", f"{key}." if key else "")
        return UserError(f"{path}: {rule}")


class Section:
    """Base class of the run file's sections; construction validates the keys.

    Raises:
        SectionError: for the first rule that a value breaks.
    """

    SECTION: ClassVar[str] = ""  # dotted key of the section in a run file

    def __post_init__(self) -> None:
        kind: type = type(self)
        for name, key in declared(kind).items():
            _check_declared(self, name, key)
        self.check()

    def check(self) -> None:
        """Check the rules that declarations cannot express."""

    def broken(self, rule: str) -> SectionError:
        """Return the error for a broken `rule`, whose text names keys in full."""
        return SectionError(self.SECTION, rule)


@cache
def declared(kind: type) -> dict[str, Key]:
    """Return the declarations of a section's fields by name, in their order."""
    hints = get_type_hints(kind, include_extras=True)
    notes = {name: get_args(hint)[1:] for name, hint in hints.items() if get_origin(hint) is Annotated}
    return {name: key for name, found in notes.items() for key in found if isinstance(key, Key)}


def shown_bound(bound: float) -> str:
    """Return a bound as in a run file: 65536, 1e6."""
    short = f"{bound:g}".replace("e+0", "e").replace("e+", "e")
    return short if float(short) == bound else str(bound)


def number_problem(key: Key, dotted: str, value: Any) -> str | None:
    """Return the sentence on a number outside of its key's sign and bounds, None for any other value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    place = f"{dotted} = {shortened(str(value))}"
    if key.sign == POSITIVE and not value > 0:
        return f"{place} is not positive"
    if key.sign == NOT_NEGATIVE and not value >= 0:
        return f"{place} is negative"
    if key.least is not None and not value >= key.least:
        return f"{place} is below {shown_bound(key.least)}"
    if isinstance(value, float) and math.isnan(value):
        return f"{place} is not a number"
    if value > key.most:
        return f"{place} is above {shown_bound(key.most)}, the largest that is accepted"
    if value < -key.most:
        return f"{place} is below -{shown_bound(key.most)}, the smallest that is accepted"
    return None


def path_texts(kind: type, data: object, skipping: str) -> Iterator[str]:
    """Yield the texts of the path keys, except those called `skipping`, in the plain data of a section."""
    if not isinstance(data, dict):
        return
    keys = declared(kind).items()
    yield from (data[name] for name, key in keys if key.is_path and name in data and name != skipping)
    for name, hint in get_type_hints(kind).items():
        found = data.get(name)
        for arm in (hint, *get_args(hint)):
            if isinstance(arm, type) and issubclass(arm, Section):
                for item in found if isinstance(found, list) else [found]:
                    yield from path_texts(arm, item, skipping)


def _check_declared(section: Section, name: str, key: Key) -> None:
    if key.is_foreign:
        return
    dotted = f"{section.SECTION}.{name}" if section.SECTION else name
    for part, value in _parts(dotted, getattr(section, name)):
        if problem := number_problem(key, part, value):
            raise section.broken(problem)
        if isinstance(value, str) and (problem := text_problem(value)):
            raise section.broken(f"{part} = {shortened(repr(value))}: {problem}")
    if key.is_path:
        _expand(section, name, dotted)
    value = getattr(section, name)
    if key.choices and value is not None and value not in key.choices:
        guess = did_you_mean(shortened(str(value)), key.choices)
        raise section.broken(f"{dotted} = {shortened(repr(value))} is not {listed(key.choices)}{guess}")


def _parts(dotted: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the numbers and texts in a value with their dotted keys."""
    if isinstance(value, dict):
        yield from ((f"{dotted}.{name}", item) for name, item in value.items())
    elif isinstance(value, tuple):
        yield from ((f"{dotted}.{i}", item) for i, item in enumerate(value))
    else:
        yield dotted, value


def _expand(section: Section, name: str, dotted: str) -> None:
    value = getattr(section, name)
    may_be_empty = any(field.name == name and field.default == "" for field in fields(section))  # type: ignore[arg-type]
    if not value and not may_be_empty:
        raise section.broken(f'{dotted} = "" is empty; write a path')
    try:
        object.__setattr__(section, name, expanded(value))  # the section is frozen
    except ValueError as error:
        raise section.broken(f"{dotted} = {shortened(repr(value))}: {error}") from None
