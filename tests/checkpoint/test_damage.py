"""A checkpoint with damage that a resume does not touch is resumed; all other damage is found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from commit_contents import THREE, ranks, save

from llama_ds.checkpoint import store
from llama_ds.checkpoint.damage import damaged_files, missing_files, needed_to_resume
from llama_ds.checkpoint.manifest import DESCRIPTION, INDEX, describe

STATES = [f"zero_pp_rank_{dp}_mp_rank_{tp:02d}_optim_states.pt" for dp, tp in ((0, 0), (0, 1), (1, 0))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "any.model").write_bytes(bytes(range(256)))
    save(ranks(str(tmp_path / "checkpoints"), THREE, str(tmp_path / "any.model")), 1, 2)
    return tmp_path / "checkpoints" / store.tag_of(2)


def test_a_resume_needs_neither_tokenizer_nor_rounded_weights(folder: Path) -> None:
    """Otherwise a deleted tokenizer.model would cost all steps since the checkpoint before."""
    found = describe(str(folder))
    assert needed_to_resume(str(folder), found) == {DESCRIPTION, INDEX, *STATES}
    spare = {"mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt", "tokenizer.model"}
    assert set(found.files) == {INDEX, *STATES, *spare}


def test_every_damaged_file_is_named_not_only_the_first(folder: Path) -> None:
    """Otherwise a damaged tokenizer could hide damaged states behind it."""
    found = describe(str(folder))
    os.unlink(folder / "tokenizer.model")
    os.truncate(folder / STATES[1], 10)
    with open(folder / STATES[0], "r+b") as file:
        file.write(b"x")
    assert set(missing_files(str(folder), found)) == {"tokenizer.model", STATES[1]}
    damaged = damaged_files(str(folder), found, found.files)
    assert set(damaged) == {"tokenizer.model", STATES[1], STATES[0]}
    assert f"{folder / STATES[0]}: its bytes have checksum" in damaged[STATES[0]]
