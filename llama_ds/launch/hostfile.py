"""The hostfile: its grammar, filters of its hosts, and a check of the path given to DeepSpeed's launcher.

If `--hostfile F` names no file, DeepSpeed's runner silently starts on local resources: a run meant for 256 nodes would
train on one. So the ranks look up the runner's arguments and check the file themselves.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from llama_ds import shipped
from llama_ds.atomic_files import overwrite
from llama_ds.errors import UserError, did_you_mean
from llama_ds.layout.nodelist import check_host, clip, expand

_LINE = re.compile(r"(\S+)[ \t]+slots=([0-9]+)(?:[ \t]+#.*)?")
_MAX_DIGITS = 6  # limit for a slot count: int() rejects more than 4300 digits, and a million devices are a typo
_SLOT = re.compile(r"[0-9]{1,6}")
_RUNNER_NAMES = ("deepspeed", "ds")  # DeepSpeed's console scripts
_RUNNER_MODULE = "deepspeed.launcher.runner"


def parse_hostfile(path: str) -> dict[str, int]:
    """Return the slots of each host in the hostfile `path`, in the order of the file.

    `path` may also be the name of a shipped hostfile, such as 2x8 or hostfiles/2x8.

    A line is `host slots=N`, a `#` comment or blank; a comment may also follow a host. DeepSpeed reads every accepted
    file the same way. It accepts more host names, and passes their special characters to ssh and to shells.

    Raises:
        UserError: the file is missing or empty, or a line is malformed, repeats a host or has no slots.
    """
    slots: dict[str, int] = {}
    path = shipped.find(path, "hostfiles")
    for number, line in enumerate(_read(path).split("\n"), start=1):  # splitlines would split where DeepSpeed does not
        text = line.strip(" \t")
        if not text or text.startswith("#"):
            continue
        host, count = _read_line(text, f"{path}:{number}")
        if host in slots:
            raise UserError(f"{path}:{number}: host {host} is listed twice; keep one line with all of its slots")
        slots[host] = count
    if not slots:
        raise UserError(f"{path}: lists no host; write one HOST slots=N per line, as in node001 slots=8")
    return slots


def write_hostfile(path: str, hosts: Mapping[str, int], comment: str = "") -> None:
    """Write a hostfile whole or not at all, with the lines of `comment` before its hosts."""
    content = hostfile_text(hosts, comment, path).encode(errors="replace")  # an argument may hold lone surrogates
    try:
        overwrite(path, content)
    except OSError as error:
        raise UserError(f"{path}: the hostfile cannot be written: {error.strerror}; name another file") from None


def hostfile_text(hosts: Mapping[str, int], comment: str = "", where: str = "hosts") -> str:
    """Return the content of a hostfile, after the checks of `parse_hostfile`."""
    for host, count in hosts.items():
        check_host(host, where)
        _check_slots(host, str(count), where)
    if not hosts:
        raise UserError(f"{where}: a hostfile without hosts would start nothing; name at least one")
    comments = [f"# {line}".rstrip() for line in comment.splitlines()]
    return "\n".join([*comments, *(f"{host} slots={count}" for host, count in hosts.items()), ""])


def select(
    hosts: Mapping[str, int], include: str = "", exclude: str = "", where: str = "command line"
) -> dict[str, list[int]]:
    """Return the remaining slots of each host after DeepSpeed's --include or --exclude, in the order of `hosts`.

    A filter is NODE[:SLOT,SLOT...][@NODE...]; a node without slots means all of its slots. A node may be a range, as in
    node[001-004]:0,1, which DeepSpeed does not support. If several items name one node, their slots are merged, and an
    item without slots adds none (as in DeepSpeed: a@a:0 means slot 0).

    Raises:
        UserError: the filter is malformed, names an unknown host or slot, or leaves no host; or both filters are given.
    """
    if include and exclude:
        raise UserError(f"{where}: --include and --exclude cannot be given both; keep one")
    if not include and not exclude:
        return {host: list(range(count)) for host, count in hosts.items()}
    name = f"{where}: --include" if include else f"{where}: --exclude"
    named = _read_filter(include or exclude, hosts, name)
    left = {host: _left(count, named.get(host), bool(include)) for host, count in hosts.items()}
    if not any(left.values()):
        raise UserError(f"{name} {clip(include or exclude)} leaves no host; take an item out of it")
    return {host: slots for host, slots in left.items() if slots}


def launcher_hostfile() -> str | None:
    """Return the absolute path of the hostfile given to the DeepSpeed runner that started this process.

    The result is None if no ancestor is DeepSpeed's runner (torchrun, mpirun, a remote node), if the runner was given
    no hostfile, or without /proc.
    """
    pid = os.getppid()
    while pid > 0:  # the runner may be process 1 of a container
        process = Path("/proc", str(pid))
        try:
            argv = process.joinpath("cmdline").read_text(errors="surrogateescape").split("\0")
            arguments = _runner_arguments(argv)
            if arguments is not None:
                given = _hostfile_argument(arguments)
                return os.path.join(os.readlink(process / "cwd"), given) if given is not None else None
            pid = _parent(process)
        except OSError:
            return None
    return None


def check_launcher_hostfile() -> None:
    """Raise UserError if DeepSpeed's runner was given a hostfile that is missing or malformed."""
    path = launcher_hostfile()
    if path is not None:
        parse_hostfile(path)


def _read_line(text: str, where: str) -> tuple[str, int]:
    match = _LINE.fullmatch(text)
    if not match:
        raise UserError(f"{where}: {clip(text)} is not a host; write HOST slots=N, as in node001 slots=8")
    check_host(match[1], where)
    _check_slots(match[1], match[2], where)
    return match[1], int(match[2])


def _check_slots(host: str, count: str, where: str) -> None:
    if len(count) > _MAX_DIGITS or int(count) < 1:
        raise UserError(f"{where}: host {host} has slots={count[:80]}; give its number of devices or take it out")


def _read_filter(text: str, hosts: Mapping[str, int], where: str) -> dict[str, list[int]]:
    """Return the slots that a filter names, by host; an empty list means all slots."""
    named: dict[str, list[int]] = {}
    for item in text.split("@"):
        node, colon, numbers = item.partition(":")
        slots = [_read_slot(number, item, where) for number in numbers.split(",")] if colon else []
        for host in expand(node, where) if "[" in node else [node]:
            if host not in hosts:
                raise UserError(
                    f"{where} {clip(item)}: host {clip(host)} is not in the hostfile{did_you_mean(host, hosts)}; "
                    "write NODE, NODE:SLOT,SLOT or several of them with @ between"
                )
            if slots and max(slots) >= hosts[host]:
                raise UserError(
                    f"{where} {clip(item)}: host {host} has no slot {max(slots)}; use 0 to {hosts[host] - 1}"
                )
            named.setdefault(host, []).extend(slots)
    return named


def _read_slot(text: str, item: str, where: str) -> int:
    if not _SLOT.fullmatch(text.strip(" ")):
        raise UserError(f"{where} {clip(item)}: {clip(text)} is not a slot; write numbers from 0, as in node001:0,2")
    return int(text)


def _left(count: int, named: list[int] | None, included: bool) -> list[int]:
    """Return the remaining slots of a host; the filter names the slots `named` (empty: all), or not the host (None)."""
    if named is None:
        return [] if included else list(range(count))
    chosen = set(named or range(count))
    return [slot for slot in range(count) if (slot in chosen) == included]


def _read(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the hostfile cannot be read: {error.strerror}; correct --hostfile") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the hostfile is not UTF-8 text; write one HOST slots=N per line") from None
    if text.startswith("\ufeff"):
        raise UserError(
            f"{path}:1: begins with a byte order mark, which DeepSpeed takes for a part of the first host's name; save "
            "it as UTF-8 without one"
        )
    return text


def _runner_arguments(argv: list[str]) -> list[str] | None:
    """Return the runner's own arguments in a process's `argv`, None if the process is not the runner."""
    for i, word in enumerate(argv[:6]):  # the interpreter and its options come first
        script = Path(word).name in _RUNNER_NAMES or word.endswith(_RUNNER_MODULE.replace(".", "/") + ".py")
        if script or (word == _RUNNER_MODULE and argv[i - 1] == "-m"):
            return argv[i + 1 :]
    return None


def _hostfile_argument(arguments: list[str]) -> str | None:
    """Return the value of the last -H / --hostfile before the training script, as the runner's argparse reads it."""
    script = next((i for i, word in enumerate(arguments) if word.endswith(".py")), len(arguments))
    value = None
    for i, word in enumerate(arguments[:script]):
        option, equals, rest = word.partition("=")
        if word == "-H" or (len(option) > 3 and "--hostfile".startswith(option) and not equals):
            value = arguments[i + 1]
        elif len(option) > 3 and "--hostfile".startswith(option):
            value = rest
        elif word.startswith("-H"):
            value = word[2:]
    return value


def _parent(process: Path) -> int:
    status = process.joinpath("status").read_text()
    return int(status.partition("\nPPid:")[2].split()[0])
