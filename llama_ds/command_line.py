"""What the command lines of all tools share: parsing, one line for a mistake, quiet ends, an answer alone on stdout."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ds import log
from llama_ds.errors import UserError

CLOSED_PIPE = 128 + signal.SIGPIPE  # exit codes as a shell gives them to a process that the signal ended
INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Answer:
    """What a command found: `data` is printed as JSON with --json, `text` without it."""

    data: Any
    text: str
    code: int = 0
    remarks: Sequence[str] = ()  # lines for stderr, after the answer


Work = Callable[[argparse.Namespace], "Answer | int | None"]


def new_parser(work: Work | None, description: str | None, examples: str) -> argparse.ArgumentParser:
    """Return the parser of a tool, or of one whose subcommands do the work. `examples` end its --help."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=examples, formatter_class=formatter)
    parser.set_defaults(work=work)
    return parser


def subcommands(parser: argparse.ArgumentParser) -> Callable[..., argparse.ArgumentParser]:
    """Return `add(name, work, help, description=help)`, which adds a subcommand with the same examples."""
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, work: Work, words: str, description: str = "", examples: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=words,
            description=description or words,
            epilog=examples or parser.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(work=work)
        return command

    return add


def add_json(parser: argparse.ArgumentParser, what: str = "the results") -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON, and nothing else, on stdout")


def add_results(parser: argparse.ArgumentParser) -> None:
    """Add --json and --out of a measurement."""
    add_json(parser)
    parser.add_argument("--out", dest="results_file", metavar="FILE", help="write the results as JSON to FILE too")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError where one of the options `names` was given and is not above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"command line: --{name.replace('_', '-')} {value} is not positive")


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Do what a command line asks for; return the exit code.

    A UserError is one line on stderr and exit code 2. With --json nothing but the answer is written to stdout.
    Otherwise as `ending_quietly`.
    """
    log.silence_libraries()
    return ending_quietly(lambda: _outcome(parser, argv))


def ending_quietly(main: Callable[[], int]) -> int:
    """Return the exit code of `main`, 141 where the reader of its output has left, such as `head`, or 130 for Ctrl-C.

    The former says nothing, the latter one line.
    """
    try:
        code = main()
        print(end="", flush=True)
        return code
    except BrokenPipeError:
        closed = [stream for stream in (1, 2) if _has_no_reader(stream)]
        if not closed:  # another pipe than ours: not the end that its user wanted
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in closed:
            os.dup2(nowhere, stream)  # what is still buffered goes there when the interpreter ends
        return CLOSED_PIPE
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends what the interpreter still waits for
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return INTERRUPTED


def _outcome(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    try:
        args = _parse(parser, argv)
    except SystemExit as end:  # argparse has said why
        return int(end.code or 0)
    try:
        if getattr(args, "json", False):
            with _stdout_to_stderr():
                answer = args.work(args)
        else:
            answer = args.work(args)
        return _give(args, answer) if isinstance(answer, Answer) else answer or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides of a run file may stand anywhere."""
    args, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(args, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _give(args: argparse.Namespace, answer: Answer) -> int:
    """Print an answer, and write it where it was asked for."""
    if path := getattr(args, "results_file", None):
        _write(path, json.dumps(answer.data, indent=1) + "\n")
    if getattr(args, "json", False):
        print(json.dumps(answer.data, indent=1))
    elif answer.text:
        print(answer.text)
    for line in answer.remarks:
        print(line, file=sys.stderr)
    return answer.code


def _write(path: str, text: str) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); name another file") from None


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what Python, C libraries and child processes print on stdout."""
    printed = sys.stdout
    printed.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        printed.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _has_no_reader(stream: int) -> bool:
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
