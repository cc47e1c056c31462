"""Arguments of all tools: every number states its range, and a wrong value is one line that names it."""

from __future__ import annotations

import argparse
import ast
import importlib
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

TOOLS = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "tools").glob("*.py"))
WRONG = ("-1", "nan", "inf", "-inf", "1e400", "9" * 5000, "1" * 400, "x", "", "0x10", "1.5.2")


@pytest.mark.parametrize("tool", TOOLS)
def test_an_interruption_of_the_imports_is_one_line(tool: str) -> None:
    """The module that makes it so is imported before the others, which take seconds on a slow disk."""
    tree = ast.parse((Path(__file__).resolve().parents[2] / "tools" / f"{tool}.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = [node for node in imports if "llama_ds" in ast.unparse(node)]
    assert "command_line" in ast.unparse(ours[0])


def commands(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.Action]]:
    """Yield each argument of a parser and of its subcommands, with the words that lead to it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from commands(command, (*words, name))
        else:
            yield words, action


def arguments(tool: str) -> Iterator[tuple[tuple[str, ...], argparse.Action]]:
    return commands(importlib.import_module(f"tools.{tool}").parser())


def numbers(tool: str) -> list[tuple[tuple[str, ...], argparse.Action]]:
    """The arguments with a declared range: their type is a function of llama_ds/command_line.py."""
    return [(words, a) for words, a in arguments(tool) if getattr(a.type, "__module__", "") == "llama_ds.command_line"]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_number_states_its_range(tool: str) -> None:
    for words, action in arguments(tool):
        assert action.type not in (int, float) or action.choices, (words, action.option_strings)
        if action.type and isinstance(action.default, int | float):
            assert action.type(str(action.default)) == action.default  # type: ignore[operator]


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if numbers(tool)])
def test_a_wrong_number_is_one_line(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"tools.{tool}").main
    for words, action in numbers(tool):
        if not action.option_strings:
            continue
        option = action.option_strings[0]
        for value in WRONG:
            assert main([*words, f"{option}={value}"]) == 2
            out, error = capsys.readouterr()
            begin = f"error: command line: {option}: {value[:40]!r}"[:-1]
            assert error.startswith(begin) and " is not a " in error and error.count("\n") == 1 and not out, (
                option,
                value,
            )


@given(st.text() | st.integers().map(str) | st.floats().map(str))
@example("٣")
def test_a_parsed_number_is_in_its_range(text: str) -> None:
    from llama_ds.command_line import MANY, real, whole

    for parse, least, most in (
        (whole(), 1, MANY),
        (whole(0, 9), 0, 9),
        (real(), 0, math.inf),
        (real(0, 1, True), 0, 1),
    ):
        try:
            value = parse(text)
        except argparse.ArgumentTypeError:
            continue
        assert math.isfinite(value) and least <= value <= most


def test_weights_of_sources_are_finite(capsys: pytest.CaptureFixture[str]) -> None:
    from tools import shards

    for value in ("a=nan", "a=inf", "a=0", "a=-1", "a=", "=1", "1"):
        assert shards.main(["unigram", value]) == 2
        assert capsys.readouterr().err.count("\n") == 1
