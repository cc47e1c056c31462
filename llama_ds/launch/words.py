"""Checks of the words in a launcher's command.

DeepSpeed passes words to shells without quoting: pdsh's ssh joins them with spaces, and a shell of the host parses the
line after pdsh has replaced %h, %n and %u. So words with characters that a shell interprets are rejected.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from llama_ds.errors import UserError, did_you_mean
from llama_ds.layout.nodelist import check_host

PLAIN = frozenset(string.ascii_letters + string.digits + "_@%+=:,./-")  # DeepSpeed's add_export does not quote these
_IN_QUOTES = frozenset(string.printable[:95]) - frozenset('"$\\`!')  # safe between double quotes
_ADDRESS = re.compile(r"[A-Za-z0-9:]([A-Za-z0-9_.:-]*[A-Za-z0-9:])?")  # IPv6 included
_NIC = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}(,[A-Za-z0-9][A-Za-z0-9_.-]{0,14})*")  # Linux: 15 characters
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(TOKEN|SECRETS?|PASSW(OR)?D|PASSPHRASE|CREDENTIALS?|KEY)(_ID)?(_(?!FILE$|PATH$)|$)", re.I)
_SECRET_VALUE = re.compile(r"://[^/\s]*:[^/\s]*@")  # a password in a URL
_KEPT_IN_FILES = ("GOOGLE_APPLICATION_CREDENTIALS",)  # named like a secret, but holds a path

# Options that a user may pass to the launcher itself, with their numbers of values: any further word would be taken
# for the program to start. Options for hosts, ranks and the ranks' environment are reserved. Slurm has hundreds of
# options, so they are checked by form: one word per option.
_HYDRA = {"iface": 1, "bind-to": 1, "genv": 2, "genvlist": 1, "rmk": 1, "launcher": 1, "bootstrap": 1}
_HYDRA |= dict.fromkeys(("verbose", "v", "l", "prepend-rank", "print-all-exitcodes", "disable-auto-cleanup"), 0)
_OPTIONS = {
    "pdsh": {"f": 1, "l": 1, "t": 1, "u": 1, "b": 0, "d": 0, "k": 0, "N": 0},
    "openmpi": {"mca": 2, "prtemca": 2, "pmixmca": 2, "x": 1, "bind-to": 1, "prefix": 1, "output": 1, "display": 1}
    | dict.fromkeys(("oversubscribe", "allow-run-as-root", "tag-output", "report-bindings", "verbose", "v"), 0),
    "mpich": _HYDRA,
    "impi": _HYDRA,
}
_OURS_OF_OPENMPI = {"btl": "DeepSpeed sets it", "btl_tcp_if_include": "give --nic NIC"}
_OURS_OF_SLURM = (
    *("ntasks", "ntasks-per-node", "nodes", "nodelist", "nodefile", "exclude", "relative", "distribution"),
    *("export", "chdir", "multi-prog"),
)


def plain(where: str, value: str, launcher: str) -> str:
    """Return `value` if no shell interprets it.

    Raises:
        UserError: `value` is empty or has a special character, or a % under pdsh.
    """
    if not value:
        raise UserError(f"{where}: is empty; give a value")
    return _only(where, value, PLAIN - frozenset("%" if launcher == "pdsh" else ""), repr(value))


def path(where: str, value: str, launcher: str) -> str:
    """Return `value` if it is an absolute path that no shell interprets.

    Colons are rejected because the runner puts the folder into PYTHONPATH, commas because srun and mpirun split there.
    """
    plain(where, value, launcher)
    _only(where, value, PLAIN - {":", ","}, repr(value))
    before, *parts = value.split("/")
    if before or not parts or {"", ".", ".."} & set(parts):
        raise UserError(f"{where}: {value!r} is not an absolute path without . .. // and a / at its end; give the path")
    return value


def host(where: str, value: str) -> str:
    """Return `value` if it is a host name."""
    check_host(value, where)
    return value


def address(where: str, value: str) -> str:
    """Return `value` if it is the name or IP address of a host."""
    return _match(where, value, _ADDRESS, "a host's name or its IP address, as in 10.0.0.1")


def nic(where: str, value: str) -> str:
    """Return `value` if it is the name of a network interface, or several separated by commas."""
    return _match(where, value, _NIC, "interfaces' names as `ip link` lists them, as in eth0 or ib0,ib1")


def variable(where: str, name: str) -> str:
    """Return `name` if it is a variable's name and not a secret's: the argv on every host shows its value."""
    _match(where, name, _VARIABLE, "a variable's name: letters, digits and _")
    if is_secret(name):
        raise UserError(
            f"{where}: {name} looks like a secret, and what is exported can be read in every host's list of processes;"
            " put it in a file that only you can read and export the file's path as NAME_FILE"
        )
    return name


def value_of(where: str, name: str, value: str, launcher: str) -> str:
    """Return the value of an exported variable if it arrives unchanged.

    DeepSpeed puts double quotes around a value that is not plain. pdsh's shell removes them; the MPI launchers start
    no shell, so the quotes would stay in the value. Slurm and the local launcher pass on their own environment.

    Raises:
        UserError: names the character and not the value, which may be secret.
    """
    _no_password(where, name, value)
    if launcher in ("local", "slurm"):
        return _only(where, value, None, name)
    allowed = _IN_QUOTES - frozenset("%") if launcher == "pdsh" else PLAIN
    if value != value.strip():
        raise UserError(f"{where}: the value of {name} begins or ends with a space, which DeepSpeed strips; remove it")
    return _only(where, value, allowed, f"the value of {name}")


def is_secret(name: str) -> bool:
    """Return whether a variable is named like a secret: HF_TOKEN is, TOKENIZERS_PARALLELISM is not."""
    return name.upper() not in _KEPT_IN_FILES and bool(_SECRET.search(name))


def holds_secret(name: str, value: str) -> bool:
    """Return whether a variable must not appear in a command: its name is a secret's, or its URL has a password."""
    return is_secret(name) or bool(_SECRET_VALUE.search(value))


def is_variable(name: str) -> bool:
    """Return whether `name` can be a variable's."""
    return bool(_VARIABLE.fullmatch(name))


def launcher_arguments(words: Sequence[str], launcher: str) -> list[str]:
    """Return the user's arguments for the launcher, after a check that they change neither hosts nor ranks."""
    where = "--launcher_args"
    for word in words:
        if launcher == "openmpi":  # ^ excludes a component, as in --mca pml ^ucx
            _only(where, word, PLAIN | {"^"}, repr(word))
        else:
            plain(where, word, launcher)
        name, equals, value = word.partition("=")
        if is_secret(name.lstrip("-")) and (equals or launcher in ("mpich", "impi")):
            raise UserError(f"{where}: {name} looks like a secret, which every host would show; put it in a file")
        _no_password(where, name, value)
    check: Callable[[str, Sequence[str]], None] = _slurm_options if launcher == "slurm" else _known_options
    check(launcher, words)
    return list(words)


def _no_password(where: str, name: str, value: str) -> None:
    if _SECRET_VALUE.search(value):
        raise UserError(f"{where}: the URL in {name} holds a password that every host would show; put it in a file")


def _known_options(launcher: str, words: Sequence[str]) -> None:
    known = _OPTIONS[launcher]
    index = 0
    while index < len(words):
        word = words[index]
        name = word.lstrip("-")
        if name not in known or word not in (f"-{name}", f"--{name}"):
            listed = ", ".join(f"-{option}" if len(option) == 1 else f"--{option}" for option in known)
            raise UserError(
                f"--launcher_args: {word!r} is not an option to give to {launcher}{did_you_mean(name, known)};"
                f" give one of {listed}"
            )
        values = words[index + 1 : index + 1 + known[name]]
        if len(values) < known[name] or any(value.startswith("-") for value in values):
            raise UserError(f"--launcher_args: {word} of {launcher} needs {known[name]} value(s) after it; give them")
        if launcher == "openmpi" and name == "mca" and values[0] in _OURS_OF_OPENMPI:
            raise UserError(
                f"--launcher_args: --mca {values[0]} cannot be given twice: {_OURS_OF_OPENMPI[values[0]]}; take it out"
            )
        index += 1 + known[name]


def _slurm_options(launcher: str, words: Sequence[str]) -> None:
    for word in words:
        if not re.match(r"--[a-z]", word):  # a short option can contain others, as in -ln5
            raise UserError(
                f"--launcher_args: srun may take {word!r} for the program; write --option=value in one word"
            )
        name = word.partition("=")[0].removeprefix("--")
        if any(ours.startswith(name) for ours in _OURS_OF_SLURM):  # srun accepts an unambiguous prefix of an option
            raise UserError(f"--launcher_args: {word!r}: hosts and ranks come from the hostfile; take it out")


def _match(where: str, value: str, pattern: re.Pattern[str], rule: str) -> str:
    if not pattern.fullmatch(value):
        raise UserError(f"{where}: {value!r} is refused, as shells and launchers may interpret it; give {rule}")
    return value


def _only(where: str, value: str, allowed: frozenset[str] | None, shown: str) -> str:
    """Return `value` if it has only `allowed` characters (None: all but NUL)."""
    wrong = [c for c in value if c == "\0" or (allowed is not None and c not in allowed)]
    if wrong:
        raise UserError(
            f"{where}: {shown} has {wrong[0]!r}, which a shell or a launcher may interpret on the way to the hosts;"
            " use only letters, digits and _@+=:,./-"
        )
    return value
