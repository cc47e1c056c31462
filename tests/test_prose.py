"""Comments and names that a reader who knows the field understands at first reading."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FILES = sorted(p for top in ("llama_ds", "tools", "tests") for p in (REPO / top).rglob("*.py"))

# A trailing comment is a noun phrase or a clause of its own; it does not hang on the name before it.
BARE_CLAUSE = re.compile(
    r"#\s*(that|which|who|whom|whose|of|from|(after|at|before|by|for|from|in|into|of|on|over|to|with|within) "
    r"(which|whom|whose|what))\b",
    re.IGNORECASE,
)
COINED = ("dear to compute", "gone on with", "whatever dies", "that is none", "that are none", "put off until")


def bare_clauses(source: str) -> Iterator[tuple[int, str]]:
    """Yield the trailing comments that begin with a relative clause or a genitive: (line, comment)."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        trailing = token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
        if trailing and BARE_CLAUSE.match(token.string):
            yield token.start[0], token.string


def test_no_trailing_comment_is_a_bare_relative_clause() -> None:
    assert len(FILES) > 300
    found = [
        f"{path.relative_to(REPO)}:{line}: {comment}"
        for path in FILES
        for line, comment in bare_clauses(path.read_text(encoding="utf-8"))
    ]
    assert not found, "write a noun phrase or a whole clause:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("code", "bare"),
    [
        ("X = 5.0  # that a stranger may take", True),
        ("X = 5.0  # of the attempt", True),
        ("X = 5.0  # after which a rank ends", True),
        ("X = 5.0  # timeout for an unauthenticated connection", False),
        ("# of a whole line: prose that continues\nX = 1", False),
    ],
)
def test_bare_clauses_are_told_from_noun_phrases(code: str, bare: bool) -> None:
    assert bool(list(bare_clauses(code))) is bare


def test_coined_phrases_are_gone() -> None:
    texts = [*FILES, *(REPO / "docs").glob("*.md"), *REPO.glob("*.md")]
    texts.remove(Path(__file__).resolve())
    found = [
        f"{path.relative_to(REPO)}: {phrase}"
        for path in texts
        for phrase in COINED
        if phrase in path.read_text(encoding="utf-8")
    ]
    assert not found


def test_a_public_class_name_means_one_thing() -> None:
    owners: dict[str, list[str]] = defaultdict(list)
    for path in (REPO / "llama_ds").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners[node.name].append(path.relative_to(REPO).as_posix())
    assert {name: where for name, where in owners.items() if len(where) > 1} == {}
