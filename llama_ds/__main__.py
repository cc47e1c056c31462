"""Train a LLaMA on DeepSpeed, and run every program around it.

llama-ds COMMAND --help describes a command; python -m llama_ds COMMAND is the same.
"""

from __future__ import annotations

import ast
import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":  # started as a script or by -m: this folder or the user's must shadow no package
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from llama_ds import __version__, shipped
from llama_ds.errors import did_you_mean

NAME = "llama-ds"
HELP = ("-h", "--help", "help")


def main() -> int:
    """Run the command line and return the exit code."""
    word, *arguments = sys.argv[1:] or ["--help"]
    known = programs()
    if word in HELP:
        print(overview(known))
        return 0
    if word == "--version":
        print(f"{NAME} {__version__}")
        return 0
    name = word.replace("_", "-")
    if name not in known:
        choices = ", ".join(known)
        print(f"error: {NAME}: no command {word!r}{did_you_mean(name, known)}; use one of {choices}", file=sys.stderr)
        return 2
    sys.argv = [f"{NAME} {name}", *arguments]
    runpy.run_module(module_of(known[name]), run_name="__main__")  # as a script, which sees to signals first
    return 0


def programs() -> dict[str, Path]:
    """Return the file of each command."""
    tools = sorted(shipped.folder("tools").glob("[!_]*.py"))
    return {"train": Path(shipped.TRAIN)} | {path.stem.replace("_", "-"): path for path in tools}


def module_of(path: Path) -> str:
    """Return the name by which a program is imported."""
    if path.parent == shipped.PACKAGE:
        return f"llama_ds.{path.stem}"
    if shipped.INSTALLED:
        return f"llama_ds.tools.{path.stem}"
    sys.path.insert(0, str(path.parents[1]))
    return f"tools.{path.stem}"


def overview(known: dict[str, Path]) -> str:
    """Return the help: every command with the first sentence of its file, without importing any."""
    lines = [(__doc__ or "").strip(), "", "commands:"]
    width = max(map(len, known)) + 2
    for name, path in known.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:{width}}{text.partition(chr(10))[0]}")
    files = ", ".join(path.name for path in sorted(shipped.folder("ds_configs").glob("*.yaml")))
    hosts = ", ".join(path.name for path in sorted(shipped.folder("hostfiles").glob("[!R]*")))
    lines += ["", f"run files, by name from any folder: {files}", f"hostfiles: {hosts}"]
    return "\n".join([*lines, f"They are in {shipped.folder('ds_configs')} and {shipped.folder('hostfiles')}."])


if __name__ == "__main__":
    sys.exit(main())
