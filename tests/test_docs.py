"""The documentation agrees with the repository: links, file names, commands, lengths and the architecture diagram."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import architecture

REPO = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path for path in (*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("hostfiles/*.md")) if path.is_file()
)
MAX_LINES = {"README.md": 120, "docs/tour.md": 80}

COMMAND = re.compile(r"^ +(?:\$ )?(?:python +)?tools/(\w+)\.py +(.*)$", re.MULTILINE)
PLACEHOLDERS = ("...", "|")  # marks of a command that shows only its syntax


def names_of(pages: list[Path]) -> list[str]:
    return [page.relative_to(REPO).as_posix() for page in pages]


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", names_of(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, section = target.partition("#")
        if "://" in path:
            continue
        linked = (REPO / page).parent / path if path else REPO / page
        assert linked.exists(), f"{page} links to {target}, which does not exist"
        if section:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in map(anchor, headings), f"{page} links to {target}, which has no such section"


@pytest.mark.parametrize("page", names_of(PAGES))
def test_source_files_that_pages_name_exist(page: str) -> None:
    """Pages name files relative to llama_ds (`model/loss.py`) or to the repository root."""
    text = (REPO / page).read_text(encoding="utf-8")
    for name in re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)*/[a-z_0-9]+\.py)`", text):
        assert any((top / name).exists() for top in (REPO, REPO / "llama_ds")), f"{page} names {name}"


def commands_of(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the tool and the arguments of each command on a page."""
    text = (REPO / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for tool, words in COMMAND.findall(text):
        if not any(placeholder in words for placeholder in PLACEHOLDERS):
            yield tool, shlex.split(words.partition(";")[0], comments=True)


@pytest.mark.parametrize("page", names_of(PAGES))
def test_commands_parse(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for tool, arguments in commands_of(page):
        module = importlib.import_module(f"tools.{tool}")
        reports = tool == "launch" and arguments[:1] == ["report"]
        parser: argparse.ArgumentParser = module.report_parser() if reports else module.parser()
        try:
            parser.parse_args(arguments[reports:])
        except SystemExit:
            pytest.fail(f"{page}: tools/{tool}.py {shlex.join(arguments)}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", MAX_LINES)
def test_entrance_pages_stay_short(page: str) -> None:
    assert len((REPO / page).read_text(encoding="utf-8").splitlines()) <= MAX_LINES[page]


def test_picture_of_the_rooms_is_current() -> None:
    """The diagram is drawn from the imports in the code: if this fails, run docs/architecture.py again."""
    assert architecture.PICTURE.read_text(encoding="utf-8") == architecture.draw()
