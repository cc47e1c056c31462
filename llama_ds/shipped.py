"""Files that llama_ds ships with: beside the package in a checkout, within it where it was installed from a wheel.

`setup.py` puts the folders of `find` and of `folder` into the wheel, at the same paths within the package.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
TRAIN = str(PACKAGE / "train.py")  # the script that launchers start on every rank
INSTALLED = (PACKAGE / "tools").is_dir()  # whether this is a wheel, without a checkout
_TOOL = re.compile(r"(?:python )?tools/(\w+)\.py")
_TRAIN = re.compile(r"python llama_ds/train\.py")
_SCRIPT = re.compile(r"(?<![\w/])llama_ds/train\.py")  # as launchers take it


def folder(name: str) -> Path:
    """Return a folder of the checkout, such as ds_configs, wherever it is."""
    return (PACKAGE if INSTALLED else PACKAGE.parent) / name


def find(name: str, where: str) -> str:
    """Return the path of a file: `name` itself, or the shipped file `name` or `where`/`name` if there is none here."""
    if os.path.isabs(name) or (os.path.exists(name) and not os.path.isdir(name)):
        return name
    inside = Path(name).parts[1:] if Path(name).parts[:1] == (where,) else Path(name).parts
    shipped = folder(where).joinpath(*inside)
    return str(shipped) if len(inside) == 1 and shipped.is_file() else name


def command(tool: str) -> list[str]:
    """Return the command that runs a program of tools/ with this interpreter, also on another host by ssh."""
    return [sys.executable, str(PACKAGE / "__main__.py"), tool]


def as_typed(text: str) -> str:
    """Return a text for the user in which programs are spelled as the user types them.

    Texts in the code spell them as in a checkout: `tools/NAME.py`, `llama_ds/train.py`. Whoever prints calls this:
    errors of programs and of ranks, log lines, help.
    """
    if not INSTALLED:
        return text
    text = _TOOL.sub(lambda match: f"llama-ds {match[1].replace('_', '-')}", text)
    return _SCRIPT.sub(lambda _: TRAIN, _TRAIN.sub("llama-ds train", text))
