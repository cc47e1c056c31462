"""Which words may stand in the command of a launcher.

DeepSpeed hands words to shells without quoting them: pdsh's ssh joins them with spaces and a shell of the host reads
the line, after pdsh has replaced %h, %n and %u. So a word is made of characters that no shell reads, or is refused.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from llama_ds.errors import UserError, did_you_mean

PLAIN = frozenset(string.ascii_letters + string.digits + "_@%+=:,./-")  # what DeepSpeed's add_export leaves unquoted
_IN_QUOTES = frozenset(string.printable[:95]) - frozenset('"$\\`!')  # and what may stand between double quotes
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_ADDRESS = re.compile(r"[A-Za-z0-9:]([A-Za-z0-9_.:-]*[A-Za-z0-9:])?")  # of IPv6 too
_NIC = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}(,[A-Za-z0-9][A-Za-z0-9_.-]{0,14})*")  # Linux: 15 characters
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(TOKEN|SECRETS?|PASSW(OR)?D|PASSPHRASE|CREDENTIALS?|KEY)(_ID)?(_(?!FILE$|PATH$)|$)", re.I)
_SECRET_VALUE = re.compile(r"://[^/\s]*:[^/\s]*@")  # a password in a URL
_KEPT_IN_FILES = ("GOOGLE_APPLICATION_CREDENTIALS",)  # smell of a secret and hold a path

# Options a user may hand to the launcher itself, and how many values follow: what follows them all would be taken for
# the program to start. Hosts, their ranks and the ranks' environment are ours. Slurm has hundreds, so it is read by
# form, one word an option.
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


def plain(place: str, value: str, launcher: str) -> str:
    """Return a word that no shell reads anything into.

    Raises:
        UserError: `value` is empty or has another character, or a % under pdsh.
    """
    if not value:
        raise UserError(f"{place}: is empty; give a value")
    return _only(place, value, PLAIN - frozenset("%" if launcher == "pdsh" else ""), repr(value))


def path(place: str, value: str, launcher: str) -> str:
    """Return an absolute path that no shell reads anything into.

    Nor PYTHONPATH, into which the runner writes its folder, or srun and mpirun, which cut lists at commas.
    """
    plain(place, value, launcher)
    _only(place, value, PLAIN - {":", ","}, repr(value))
    before, *parts = value.split("/")
    if before or not parts or {"", ".", ".."} & set(parts):
        raise UserError(f"{place}: {value!r} is not an absolute path without . .. // and a / at its end; give the path")
    return value


def host(place: str, value: str) -> str:
    """Return a host's name: pdsh reads - ^ / [ ] @ : in one as its own language, and ssh a leading - as an option."""
    rule = "letters, digits and . _ - between them; give hosts of other names a name in ssh's config"
    return _match(place, value, _HOST, rule)


def address(place: str, value: str) -> str:
    """Return the name or IP address of a host."""
    return _match(place, value, _ADDRESS, "a host's name or its IP address, as in 10.0.0.1")


def nic(place: str, value: str) -> str:
    """Return the name of a network interface, or several with commas between them."""
    return _match(place, value, _NIC, "interfaces' names as `ip link` lists them, as in eth0 or ib0,ib1")


def variable(place: str, name: str) -> str:
    """Return the name of a variable whose value may be seen: argv of every host shows it."""
    _match(place, name, _VARIABLE, "a variable's name: letters, digits and _")
    if is_secret(name):
        raise UserError(
            f"{place}: {name} looks like a secret, and what is exported can be read in every host's list of processes;"
            " put it in a file that only you can read and export the file's path as NAME_FILE"
        )
    return name


def value_of(place: str, name: str, value: str, launcher: str) -> str:
    """Return the value of an exported variable if it arrives as it is.

    DeepSpeed puts double quotes around a value that is not plain. pdsh's shell takes them off; the MPI launchers start
    no shell, and the quotes would be in the value. Slurm and the local launcher hand on their own environment.

    Raises:
        UserError: naming the character and not the value, which may be secret.
    """
    _no_password(place, name, value)
    if launcher in ("local", "slurm"):
        return _only(place, value, None, name)
    allowed = _IN_QUOTES - frozenset("%") if launcher == "pdsh" else PLAIN
    if value != value.strip():
        raise UserError(f"{place}: the value of {name} begins or ends with a space, which DeepSpeed strips; remove it")
    return _only(place, value, allowed, f"the value of {name}")


def is_secret(name: str) -> bool:
    """Tell whether a variable's name smells of a secret: HF_TOKEN does, TOKENIZERS_PARALLELISM does not."""
    return name.upper() not in _KEPT_IN_FILES and bool(_SECRET.search(name))


def launcher_arguments(words: Sequence[str], launcher: str) -> list[str]:
    """Return the user's own arguments for the launcher, which can only be options that leave hosts and ranks to us."""
    place = "--launcher_args"
    for word in words:
        if launcher == "openmpi":  # whose components are taken out by ^: --mca pml ^ucx
            _only(place, word, PLAIN | {"^"}, repr(word))
        else:
            plain(place, word, launcher)
        name, equals, value = word.partition("=")
        if is_secret(name.lstrip("-")) and (equals or launcher in ("mpich", "impi")):
            raise UserError(f"{place}: {name} looks like a secret, which every host would show; put it in a file")
        _no_password(place, name, value)
    check: Callable[[str, Sequence[str]], None] = _slurm_options if launcher == "slurm" else _known_options
    check(launcher, words)
    return list(words)


def _no_password(place: str, name: str, value: str) -> None:
    if _SECRET_VALUE.search(value):
        raise UserError(f"{place}: the URL in {name} holds a password that every host would show; put it in a file")


def _known_options(launcher: str, words: Sequence[str]) -> None:
    known = _OPTIONS[launcher]
    at = 0
    while at < len(words):
        word = words[at]
        name = word.lstrip("-")
        if name not in known or word not in (f"-{name}", f"--{name}"):
            listed = ", ".join(f"-{option}" if len(option) == 1 else f"--{option}" for option in known)
            raise UserError(
                f"--launcher_args: {word!r} is not an option to give to {launcher}{did_you_mean(name, known)};"
                f" give one of {listed}"
            )
        values = words[at + 1 : at + 1 + known[name]]
        if len(values) < known[name] or any(value.startswith("-") for value in values):
            raise UserError(f"--launcher_args: {word} of {launcher} needs {known[name]} value(s) after it; give them")
        if launcher == "openmpi" and name == "mca" and values[0] in _OURS_OF_OPENMPI:
            raise UserError(
                f"--launcher_args: --mca {values[0]} cannot be given twice: {_OURS_OF_OPENMPI[values[0]]}; take it out"
            )
        at += 1 + known[name]


def _slurm_options(launcher: str, words: Sequence[str]) -> None:
    for word in words:
        if not re.match(r"--[a-z]", word):  # short ones can hide others: -ln5
            raise UserError(f"--launcher_args: {word!r} may be the program to srun; write --option=value in one word")
        name = word.partition("=")[0].removeprefix("--")
        if any(ours.startswith(name) for ours in _OURS_OF_SLURM):  # srun takes the beginning of an option for it
            raise UserError(f"--launcher_args: {word!r}: hosts and ranks come from the hostfile; take it out")


def _match(place: str, value: str, pattern: re.Pattern[str], rule: str) -> str:
    if not pattern.fullmatch(value):
        raise UserError(f"{place}: {value!r} is refused, as shells and launchers read it in their own way; give {rule}")
    return value


def _only(place: str, value: str, allowed: frozenset[str] | None, shown: str) -> str:
    """Return `value` if it has only `allowed` characters, any but NUL if None."""
    wrong = [c for c in value if c == "\0" or (allowed is not None and c not in allowed)]
    if wrong:
        raise UserError(
            f"{place}: {shown} has {wrong[0]!r}, which a shell or a launcher on the way to the hosts may read as its"
            " own; use letters, digits and _@+=:,./- alone"
        )
    return value
