"""The hostfile: its grammar, and the one that DeepSpeed's launcher was given.

DeepSpeed's runner starts on local resources, silently, when `--hostfile F` names no file: a run meant for 256 nodes
would train on one. So the ranks look up what the runner was told and check it themselves.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from llama_ds.errors import UserError

_LINE = re.compile(r"(\S+)\s+slots=([0-9]+)(?:\s+#.*)?")
_RUNNER_NAMES = ("deepspeed", "ds")  # DeepSpeed's console scripts
_RUNNER_MODULE = "deepspeed.launcher.runner"


def parse_hostfile(path: str) -> dict[str, int]:
    """Return the slots of each host of the hostfile `path`, in its order.

    A line is `host slots=N`, a `#` comment or blank.

    Raises:
        UserError: missing or empty file, another line, a host twice, or no slots, with file and line.
    """
    slots: dict[str, int] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if not match:
            raise UserError(f"{path}:{number}: {text!r} is not a host; write HOST slots=N, as in node001 slots=8")
        host, count = match[1], int(match[2])
        if host in slots:
            raise UserError(f"{path}:{number}: host {host} is listed twice; keep one line with all of its slots")
        if count == 0:
            raise UserError(f"{path}:{number}: host {host} has slots=0; give its number of devices or take it out")
        slots[host] = count
    if not slots:
        raise UserError(f"{path}: lists no host; write one HOST slots=N per line, as in node001 slots=8")
    return slots


def launcher_hostfile() -> str | None:
    """Return the absolute path of the hostfile given to the DeepSpeed runner that started this process.

    None when no ancestor is DeepSpeed's runner (torchrun, mpirun, a remote node), when it was given no hostfile, or
    where there is no /proc to tell.
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


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the hostfile cannot be read: {error.strerror}; correct --hostfile") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the hostfile is not UTF-8 text; write one HOST slots=N per line") from None


def _runner_arguments(argv: list[str]) -> list[str] | None:
    """Return the runner's own arguments in a process's `argv`, None where the process is not the runner."""
    for i, word in enumerate(argv[:6]):  # after the interpreter and its options
        script = Path(word).name in _RUNNER_NAMES or word.endswith(_RUNNER_MODULE.replace(".", "/") + ".py")
        if script or (word == _RUNNER_MODULE and argv[i - 1] == "-m"):
            return argv[i + 1 :]
    return None


def _hostfile_argument(arguments: list[str]) -> str | None:
    """Return the value of the last -H / --hostfile before the training script, as the runner's argparse takes it."""
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
