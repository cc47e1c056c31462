"""Shared command-line code of all tools: parsing, one-line user errors, quiet interrupts, clean JSON on stdout."""

from __future__ import annotations

import argparse
import errno
import io
import json
import math
import os
import select
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from llama_ds import log, shipped
from llama_ds.atomic_files import overwrite
from llama_ds.errors import UserError, is_out_of_memory

CLOSED_PIPE = 128 + signal.SIGPIPE  # exit codes that a shell reports for a process killed by the signal
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
MANY = 10**12  # largest count of anything
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Answer:
    """Result of a command: `data` is printed as JSON with --json, `text` without it."""

    data: Any
    text: str
    code: int = 0
    remarks: Sequence[str] = ()  # lines for stderr, after the answer


# Arguments that are text or addresses: in all others, a leading ~ is the home folder, as after a space in a shell.
NO_PATHS = frozenset(("text", "prompt", "comment", "separator", "overrides", "export", "launcher_args"))

Work = Callable[[argparse.Namespace], "Answer | int | None"]


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help in which the programs of tools/ are named as this user starts them."""

    def format_help(self) -> str:
        return shipped.as_typed(super().format_help())


def new_parser(work: Work | None, description: str | None, examples: str) -> argparse.ArgumentParser:
    """Return the parser of a tool; `work` is None if subcommands do the work. `examples` is the epilog of --help."""
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=_Help, exit_on_error=False
    )
    parser.set_defaults(work=work)
    return parser


def subcommands(parser: argparse.ArgumentParser) -> Callable[..., argparse.ArgumentParser]:
    """Return `add(name, work, summary, description=summary)`, which adds a subcommand with the same examples."""
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, work: Work, summary: str, description: str = "", examples: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=description or summary,
            epilog=examples or parser.epilog,
            formatter_class=_Help,
            exit_on_error=False,
        )
        command.set_defaults(work=work)
        return command

    return add


def add_json(parser: argparse.ArgumentParser, what: str = "the results") -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON, and nothing else, on stdout")


def add_results(parser: argparse.ArgumentParser) -> None:
    """Add the options --json and --out of a benchmark."""
    add_json(parser)
    parser.add_argument("--out", dest="results_file", metavar="FILE", help="write the results as JSON to FILE too")


def from_options(kind: type[Settings], args: argparse.Namespace) -> Settings:
    """Return a dataclass of this kind with the values of the options that are named like its fields."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def whole(least: int = 1, most: int = MANY) -> Callable[[str], int]:
    """Return the argument type of whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # also more digits than Python converts
            value = least - 1
        if not least <= value <= most:
            limit = f"of {least} or more" if most == MANY else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{_shortened(text)} is not a whole number {limit}")
        return value

    return parse


def real(least: float = 0.0, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Return the argument type of finite numbers from `least`, or `above` it, to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most) or (above and value == least):
            begin = f"above {least:g}" if above else f"from {least:g}"
            end = "" if most == math.inf else f" {'and at most' if above else 'to'} {most:g}"
            raise argparse.ArgumentTypeError(f"{_shortened(text)} is not a finite number {begin}{end}")
        return value

    return parse


# Upper bounds only refuse what no machine could do, or what would overflow in a library.
processes = whole(1, 4096)  # count of worker processes or threads
port = whole(1, 65535)
seconds = real(0, 1e8, above=True)
delay = real(0, 1e8)
size = real(0, 1e9, above=True)  # MB or GiB


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def end_on_interrupt() -> None:
    """Let Ctrl-C end the program with one line while it imports its modules; `run` handles it until it returns.

    The handler exits, because an import can turn KeyboardInterrupt into another exception, or ignore it.
    """
    signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parse a command line, run the command and return the exit code.

    A UserError prints one line to stderr and gives exit code 2. With --json, stdout contains only the answer.
    Closed pipes and Ctrl-C are handled as in `ending_quietly`.
    """
    _open_missing_streams()
    log.silence_libraries()
    for stream in (sys.stdout, sys.stderr):  # paths and texts may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return ending_quietly(lambda: _outcome(parser, argv))


def ending_quietly(main: Callable[[], int]) -> int:
    """Return the exit code of `main`, 141 if the reader of its output (such as `head`) has exited, or 130 for Ctrl-C.

    A closed pipe prints nothing, Ctrl-C one line.
    """
    try:
        return _flushed(main())
    except BrokenPipeError:
        closed = [stream for stream in (1, 2) if _has_no_reader(stream)]
        if not closed:  # another pipe broke, which is a real error
            raise
        for stream in closed:
            _discard(stream)
        return CLOSED_PIPE
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C kills the process during interpreter shutdown
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return INTERRUPTED


def _flushed(code: int) -> int:
    """Write what is left of stdout; return `code`, or that of an error if it cannot be written, as on a full disk."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(1)
        if not code:
            print(f"error: stdout: cannot be written ({error.strerror})", file=sys.stderr)
        return code or UserError.EXIT_CODE
    return code


def _discard(stream: int) -> None:
    """Let an output of this process go nowhere; the interpreter flushes its buffers there at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream)
    os.close(devnull)


def _open_missing_streams() -> None:
    """Open /dev/null for a stdin, stdout or stderr that the shell closed (>&-): else a file would take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the least number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def _outcome(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Return the exit code of a command; while it runs, Ctrl-C is KeyboardInterrupt, so that it can clean up."""
    ends_at_once = signal.getsignal(signal.SIGINT) is _end_at_once
    if ends_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _result(parser, argv)
    finally:
        if ends_at_once:
            end_on_interrupt()


def _result(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    try:
        try:
            args = _parse(parser, argv)
        except SystemExit as error:  # argparse has printed the reason
            return int(error.code or 0)
        if (path := getattr(args, "results_file", None)) is not None:
            check_file("--out", path)
        if getattr(args, "json", False):
            with _stdout_to_stderr():
                answer = args.work(args)
        else:
            answer = args.work(args)
        return _print_answer(args, answer) if isinstance(answer, Answer) else answer or 0
    except UserError as error:
        print(shipped.as_typed(f"error: {error}"), file=sys.stderr)
    except OSError as error:
        if not _is_about_files(error):
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {place}{error.strerror}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: memory is not enough: {' '.join(str(error).split())}; give smaller sizes", file=sys.stderr)
    return UserError.EXIT_CODE


def _is_about_files(error: OSError) -> bool:
    """Return whether the user can fix an error: a path is wrong, or a disk is full, read-only or broken."""
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides of a run file may appear at any position."""
    words = sys.argv[1:] if argv is None else argv
    if bad := [word for word in words if "\0" in word]:  # no path may hold it
        raise UserError(f"command line: {_shortened(bad[0])} holds a NUL character; leave it out")
    try:
        args, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"command line: {error.argument_name}: {error.message}") from None
    if rest and not (hasattr(args, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    for name, value in vars(args).items():
        if name not in NO_PATHS:
            setattr(args, name, _expanded(value))
    return args


def _expanded(value: Any) -> Any:
    """Expand ~ in an argument, or in each item of a list or a pair; a shell does not in --out=~/x."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_expanded, value))
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _print_answer(args: argparse.Namespace, answer: Answer) -> int:
    """Print an answer, and write it to the file of --out."""
    if getattr(args, "json", False):
        print(json.dumps(answer.data, indent=1))
    elif answer.text:
        print(answer.text)
    if (path := getattr(args, "results_file", None)) is not None:
        with _reporting("--out", path, "file"):
            overwrite(path, json.dumps(answer.data, indent=1) + "\n")
    for line in answer.remarks:
        print(line, file=sys.stderr)
    return answer.code


def check_file(option: str, path: str) -> None:
    """Raise UserError if a file cannot be written: before the work, whose results would be lost."""
    with _reporting(option, path, "file"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        is_new = not os.path.lexists(path)
        with open(path, "ab"):
            pass
        if is_new:
            os.remove(path)


def check_folder(option: str, path: str) -> None:
    """Raise UserError if no file can be written to a folder, which is made if it is missing: before the work."""
    if not path:
        raise UserError(f"{option}: the name of the folder is empty; give one")
    with _reporting(option, path, "folder"):
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


def given(args: argparse.Namespace, names: Iterable[str]) -> Iterator[str]:
    """Yield those of these options that differ from their default, as they are typed: "--gpus 8".

    The parser has set `default_of` to its `get_default`.
    """
    for name in names:
        value = getattr(args, name)
        if value != args.default_of(name):
            yield f"--{name.replace('_', '-')} {value}"


@contextmanager
def _reporting(option: str, path: str, kind: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}); name another {kind}") from None


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect to stderr everything that Python, C libraries and child processes print to stdout."""
    stdout = sys.stdout
    stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def _has_no_reader(stream: int) -> bool:
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
