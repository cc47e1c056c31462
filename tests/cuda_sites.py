"""The places of the program that depend on CUDA, read off its syntax trees.

A place is a line with a marker: `is_cuda`, `torch.cuda.*`, a name for the answer (`on_cuda`, `_cuda`, `_defers`), a
comparison of a device's type with "cuda" or "cpu", or a call that lets the host run ahead of the device.
Of an `if`, the first line of what runs on CUDA belongs to it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "llama_ds"
NAMES = {"is_cuda", "on_cuda", "_cuda", "_defers", "cuda"}
ASYNCHRONOUS = {"non_blocking", "pin_memory", "record_stream", "record_event"}
DEVICES = {"cuda", "cpu"}


class Site(NamedTuple):
    """A function that depends on CUDA; all of `lines` run on CUDA."""

    name: str  # file, a colon, function
    lines: tuple[int, ...]


def sites() -> list[Site]:
    """Return the places of all files of `llama_ds`, one for each function."""
    found: dict[str, set[int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                name = f"{path.relative_to(PACKAGE)}:{function.name}"
                if lines := set(_lines(function)):
                    found.setdefault(name, set()).update(lines)
    return [Site(name, tuple(sorted(lines))) for name, lines in found.items()]


def _lines(function: ast.FunctionDef) -> Iterator[int]:
    for statements in _blocks(function):
        for statement, following in zip(statements, [*statements[1:], None], strict=True):
            if any(map(_marks, _own(statement))):
                yield statement.lineno
                if isinstance(statement, ast.If) and (line := _taken_on_cuda(statement, following)):
                    yield line


def _blocks(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    """Yield the lists of statements of a function, not those of functions within it."""
    todo: list[ast.AST] = [function]
    while todo:
        node = todo.pop()
        for name in ("body", "orelse", "finalbody", "handlers"):
            part = getattr(node, name, None)
            if isinstance(part, list) and part and isinstance(part[0], ast.stmt):
                yield part
            todo += [x for x in part if not isinstance(x, ast.FunctionDef)] if isinstance(part, list) else []


def _own(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yield the nodes of a statement without those of the statements in it."""
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        todo += [x for x in ast.iter_child_nodes(node) if not isinstance(x, (ast.stmt, ast.ExceptHandler))]


def _marks(node: ast.AST) -> bool:
    if isinstance(node, ast.keyword):
        return node.arg in ASYNCHRONOUS
    if isinstance(node, ast.Attribute):
        return node.attr in NAMES | ASYNCHRONOUS
    if isinstance(node, ast.Name):
        return node.id in NAMES
    return isinstance(node, ast.Compare) and bool(_device(node))


def _device(test: ast.Compare) -> str | None:
    """Return the device that a comparison names; other settings may be called "cpu" too."""
    about = ast.unparse(test.left)
    if not any(word in about for word in ("device", "where", ".type")):
        return None
    values = (x.value for x in test.comparators if isinstance(x, ast.Constant))
    return next((value for value in values if value in DEVICES), None)


def _taken_on_cuda(statement: ast.If, following: ast.stmt | None) -> int | None:
    """Return the first line of what an `if` runs on CUDA, None if its test says more than the device."""
    test, negated = statement.test, False
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, negated = test.operand, True
    if isinstance(test, ast.Compare):
        negated ^= isinstance(test.ops[0], ast.NotEq) ^ (_device(test) == "cpu")
    elif not isinstance(test, (ast.Attribute, ast.Name, ast.Call)):
        return None
    if not negated:
        return statement.body[0].lineno
    other = statement.orelse[0] if statement.orelse else following
    return other.lineno if other else None
