"""The one exception that stands for a mistake its reader can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a file, a flag or a machine that the user can fix.

    The message names the place, the value, the rule and the fix, in one line. Entry points print it
    without a traceback and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2
    kind = "mistake"


class Divergence(UserError):
    """The loss is no number any more: other data or another learning rate may help, the same again may not."""

    kind = "divergence"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest of `known`, or "" when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def listed(choices: Iterable[object]) -> str:
    """Return the choices as words: "1, 2 or 4"."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
