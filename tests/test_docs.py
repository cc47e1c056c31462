"""The documentation agrees with the repository: links, paths, the length of the entrance pages, the picture of the rooms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import architecture

REPO = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path for path in (*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("hostfiles/*.md")) if path.is_file()
)
MAX_LINES = {"README.md": 120, "docs/tour.md": 80}


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
        there = (REPO / page).parent / path if path else REPO / page
        assert there.exists(), f"{page} links to {target}, which does not exist"
        if section:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in map(anchor, headings), f"{page} links to {target}: no such section"


@pytest.mark.parametrize("page", names_of(PAGES))
def test_source_files_that_pages_name_exist(page: str) -> None:
    """Pages name files of llama_ds from its root (`model/loss.py`) or from the repository's."""
    text = (REPO / page).read_text(encoding="utf-8")
    for name in re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)*/[a-z_0-9]+\.py)`", text):
        assert any((top / name).exists() for top in (REPO, REPO / "llama_ds")), f"{page} names {name}"


@pytest.mark.parametrize("page", MAX_LINES)
def test_entrance_pages_stay_short(page: str) -> None:
    assert len((REPO / page).read_text(encoding="utf-8").splitlines()) <= MAX_LINES[page]


def test_picture_of_the_rooms_is_current() -> None:
    """Drawn from the imports in the code: run docs/architecture.py again when this fails."""
    assert architecture.PICTURE.read_text(encoding="utf-8") == architecture.draw()
