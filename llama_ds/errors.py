"""Exceptions for mistakes that the user can fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A mistake in a file, a flag or a machine that the user can fix.

    The one-line message names the source, the value, the rule and the fix. Entry points print it without a traceback
    and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2
    kind = "mistake"
    ranks: Sequence[int] = ()  # the ranks that caused it, if it names any


class Divergence(UserError):
    """The loss became NaN or infinite: other data or another learning rate may help, a plain restart does not."""

    kind = "divergence"


class Corruption(UserError):
    """Numbers that must be equal differ: `ranks` computed or stored them wrongly, and other hosts may do better.

    `good_step`: the states after this step and earlier ones are known to be good, later ones in the memory of hosts are
    not to be used; -1: none is.
    """

    kind = "corruption"

    def __init__(self, text: str, ranks: Sequence[int], good_step: int = -1) -> None:
        super().__init__(text)
        self.ranks, self.good_step = ranks, good_step


class OutOfMemory(UserError):
    """A rank's memory is too small: the message names what it holds and the setting that helps.

    In the first step after a start it would come again; after steps that passed, a restart may help.
    """

    def __init__(self, text: str, first_step: bool) -> None:
        super().__init__(text)
        self.kind = "mistake" if first_step else "failure"


# CUDA's allocator and NCCL, and torch's allocator for a CPU.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory")


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an allocation failed: Python's or numpy's, or one of torch, which raises a RuntimeError."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


class NotJoined(UserError):
    """The ranks did not find each other: a restart, at another port or on other hosts, may help."""

    kind = "failure"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest of `known`, or "" if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def shortened(text: str, limit: int = 80) -> str:
    """Return a user's value for a message, cut after `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def first_of(values: Sequence[object], most: int) -> str:
    """Return the first `most` values, and how many others there are: "1, 2 and 5 more"."""
    shown = ", ".join(map(str, values[:most]))
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown


def listed(choices: Iterable[object]) -> str:
    """Return the choices as an English list: "1, 2 or 4"."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
