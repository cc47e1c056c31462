"""docs/run_file.md documents every key as the program implements it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from llama_ds.config.declare import Section, declared
from llama_ds.config.reference import reference
from llama_ds.config.schema import RunConfig

REPO = Path(__file__).resolve().parents[2]


def test_the_committed_reference_is_what_the_declarations_make() -> None:
    """A user would read of a key that is not there, or of another default."""
    made = reference()
    assert (REPO / "docs" / "run_file.md").read_text() == made, "run docs/run_file.py"


def test_every_key_is_declared_and_stands_in_the_reference() -> None:
    """A new key without a meaning would be missing from the reference."""
    text = reference()
    for section in Section.__subclasses__():
        missing = {f.name for f in fields(section)} - declared(section).keys()
        if section is RunConfig:  # its sections declare their own keys
            hints = get_type_hints(RunConfig)
            missing -= {"path", "deepspeed_path", *(name for name in missing if issubclass(hints[name], Section))}
        assert missing == set(), section
        assert section is RunConfig or f"\n## `{section.SECTION}`\n" in text
        for name, key in declared(section).items():
            assert f"| `{name}` |" in text and key.meaning.endswith(".") and (not key.rule or key.rule.endswith("."))
