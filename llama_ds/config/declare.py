"""Declarations of the keys of a run file's section, and the errors for values that break a declared rule."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from llama_ds.errors import UserError, did_you_mean, listed

POSITIVE, NOT_NEGATIVE = "positive", "not negative"


@dataclass(frozen=True)
class Key:
    """Meaning, unit and permitted values of a key.

    Signs and choices are enforced. The other fields are text for `docs/run_file.md`: `rule` describes a check made
    elsewhere, `default` replaces the field's own default, and `form` replaces the field's type. In a path, `~` at the
    start is expanded to the user's home folder.
    """

    meaning: str
    unit: str = ""
    sign: str = ""  # POSITIVE, NOT_NEGATIVE, or "" for any value
    choices: tuple[str, ...] = ()
    rule: str = ""
    default: str = ""
    form: str = ""
    is_path: bool = False


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


def _check_declared(section: Section, name: str, key: Key) -> None:
    value: Any = getattr(section, name)
    if value is None:
        return
    if key.is_path and value.startswith("~"):
        object.__setattr__(section, name, os.path.expanduser(value))  # the section is frozen
    dotted = f"{section.SECTION}.{name}" if section.SECTION else name
    if key.sign == POSITIVE and not value > 0:
        raise section.broken(f"{dotted} = {value} is not positive")
    if key.sign == NOT_NEGATIVE and not value >= 0:
        raise section.broken(f"{dotted} = {value} is negative")
    if key.choices and value not in key.choices:
        raise section.broken(
            f"{dotted} = {value!r} is not {listed(key.choices)}{did_you_mean(str(value), key.choices)}"
        )
