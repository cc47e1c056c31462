"""docs/deepspeed_json.md documents every key that the installed DeepSpeed reads, with its default."""

from __future__ import annotations

from pathlib import Path

import deepspeed.runtime.config as config
import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic_core import PydanticUndefined

from llama_ds.config.deepspeed_effects import EVERY, SECTIONS, USES, is_aliased, used_keys
from llama_ds.config.deepspeed_keys import OWNED, REMOVED, REMOVED_ZERO
from llama_ds.config.deepspeed_reference import documented_keys, reference
from llama_ds.parallel.deepspeed_walk import deepspeed_keys

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def theirs() -> dict[str, object]:
    return deepspeed_keys()


def test_the_committed_reference_is_what_the_tables_make() -> None:
    assert (REPO / "docs" / "deepspeed_json.md").read_text() == reference(), "run docs/deepspeed_json.py"


def test_every_key_of_deepspeed_has_one_place(theirs: dict[str, object]) -> None:
    """A new key of DeepSpeed would be refused as unknown, or an old one have no effect, without a word in the page."""
    assert theirs.keys() - documented_keys() == set()
    assert config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() == REMOVED
    assert config._REMOVED_ZERO_CONFIG_KEYS.keys() == REMOVED_ZERO
    assert not set(used_keys()) & OWNED.keys()
    unread = {key for key in USES if key not in theirs} - {"disable_allgather"}
    assert unread == set(), "DeepSpeed does not read these"


def test_defaults_are_those_of_deepspeed(theirs: dict[str, object]) -> None:
    """A key at another default than DeepSpeed's would be passed on although it does nothing, or refused."""
    computed = ("zero_optimization.leaf_module", "timers.throughput")  # by a function that builds an object
    for key, use in USES.items():
        if key not in computed and theirs.get(key, PydanticUndefined) is not PydanticUndefined:
            assert theirs[key] == use.default, key


def test_spellings_are_those_of_deepspeed() -> None:
    aliased = {name for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias}
    assert aliased == {name for name in used_keys("zero_optimization") if is_aliased(f"zero_optimization.{name}")}


def test_texts_are_whole() -> None:
    for key, use in USES.items():
        assert use.does and not use.does.endswith(".") and set(use.works_in) <= set(EVERY), key
    assert "zero_optimization" in SECTIONS and "timers" in SECTIONS
