"""`~` and `$NAME` in the paths of a run file: the user's home folder, and environment variables."""

from __future__ import annotations

import os
import re

COMMAND = "pipe:"  # prefix of a source that is a shell command: its own shell expands it

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([^{}]*)\})")


def variables(path: str) -> list[str]:
    """Return the names of the environment variables in a path, in their order."""
    if path.startswith(COMMAND):
        return []
    return [match[1] or match[2] for match in _VARIABLE.finditer(path)]


def text_problem(text: str) -> str | None:
    """Return why a text can be neither a path nor part of a line, and a fix; None if it can."""
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        return "it holds a control character; take it out"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "it is not Unicode text; write it in UTF-8"
    return None


def expanded(path: str) -> str:
    """Return a path with `~`, `~user`, `$NAME` and `${NAME}` replaced; a shell command is returned unchanged.

    Raises:
        ValueError: it is no path, a variable is not set or is empty, or there is no such user; the message is a reason
            and a fix.
    """
    if problem := text_problem(path):
        raise ValueError(problem)
    if path.startswith(COMMAND):
        return path
    for name in variables(path):
        if not os.environ.get(name):
            state = "empty" if name in os.environ else "not set"
            raise ValueError(f"the environment variable {name} is {state}; set it, or write the path out")
    path = _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], path)
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(f"there is no home folder of {found.partition('/')[0]}; write the path out (./~x for a name)")
    return found
