"""The files .deepspeed_env, from which DeepSpeed's launcher exports variables to the ranks.

`deepspeed` reads one in the home folder and then one in the current folder, with lines NAME=VALUE; DS_ENV_FILE gives
another name. It does so for several hosts only, and shows every value in its command. Here a single host counts too,
and secrets go to the ranks in a file of the job's folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llama_ds.errors import UserError, shortened
from llama_ds.launch import words

NAME = ".deepspeed_env"
# The launcher counts the ranks and finds their first host.
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class FileVariables:
    """Variables from .deepspeed_env: those that a command may show, secrets, and the files."""

    exports: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def remark(self, secrets: str = "{} (by the job's secrets file)") -> str:
        """Return a line for the user, "" without variables; `secrets` says what becomes of those named at {}."""
        parts = [", ".join(self.exports)] if self.exports else []
        parts += [secrets.format(", ".join(self.secrets))] if self.secrets else []
        return f"variables from {' and '.join(self.files)}: {'; '.join(parts)}" if parts else ""


def read_deepspeed_env(environment: Mapping[str, str], folders: tuple[str, ...] = ("~", ".")) -> FileVariables:
    """Return the variables of the files that `deepspeed` would read; a later file wins.

    Raises:
        UserError: a file cannot be read, or has a line that is neither NAME=VALUE, blank nor a comment (#).
    """
    name = environment.get("DS_ENV_FILE", NAME)
    paths = [os.path.realpath(os.path.join(os.path.expanduser(folder), name)) for folder in folders]
    found: dict[str, str] = {}
    read = [path for path in dict.fromkeys(paths) if os.path.isfile(path)]
    for path in read:
        found |= _variables(path)
    secrets = {name: value for name, value in found.items() if words.holds_secret(name, value)}
    exports = {name: value for name, value in found.items() if name not in secrets}
    return FileVariables(exports, secrets, read)


def _variables(path: str) -> dict[str, str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); make it a readable text file, or remove it") from None
    found = {}
    for number, line in enumerate(lines, 1):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not name or name.startswith("#"):
            if equals and not name:
                raise UserError(f"{path}:{number}: has no name before =; write NAME=VALUE")
            continue
        if not equals:  # the line is not shown: it may hold a secret
            raise UserError(f"{path}:{number}: is not NAME=VALUE; write that, or a # before it")
        if not words.is_variable(name):
            raise UserError(f"{path}:{number}: {shortened(repr(name))} is not a variable's name: letters, digits and _")
        if name in _OURS:
            raise UserError(f"{path}:{number}: {name} is set by the launcher; take it out")
        found[name] = value
    return found
