"""A checkpoint written before some keys of its run moved is read, converted and resumed like any other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_ds.checkpoint import store
from llama_ds.checkpoint.load_model import run_of
from llama_ds.checkpoint.manifest import DESCRIPTION, Description, describe
from llama_ds.config.differences import ABSENT, differences
from llama_ds.config.run_file import load_run, resolved
from llama_ds.config.schema import ComputeConfig, RopeScaling
from llama_ds.config.text import dump_yaml
from llama_ds.errors import UserError

# Written by commit b2589a0 at step 4 of 6.
RECORDED = Path(__file__).parent / "data" / "before_compute_section.json"


@pytest.fixture
def found(tmp_path: Path) -> Description:
    shutil.copyfile(RECORDED, tmp_path / DESCRIPTION)
    return describe(str(tmp_path))


def test_its_run_is_described_by_the_present_names(found: Description) -> None:
    run = run_of("folder", found)
    assert run.compute == ComputeConfig("sdpa", "manual_backward") and run.training.initializer_range == 0.05
    assert found.model == run.model
    assert all(then is ABSENT for _, then, _ in differences(found.run, resolved(run)))  # only keys that came later
    assert found.config_hash == json.loads(RECORDED.read_text())["config_hash"]


def test_its_run_file_resumes_it(found: Description, tmp_path: Path) -> None:
    """Otherwise a run of an earlier version could not resume: "attention_backend sdpa, not None"."""
    run = json.loads(RECORDED.read_text())["run"]
    del run["path"], run["deepspeed_path"], run["training"]["tokens"]
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    store.check_resumable("folder", found, resolved(load_run(str(tmp_path / "run.yaml"))))


@pytest.mark.parametrize(
    "change",
    [
        {"compute": ComputeConfig("reference", "autograd")},
        {"training": {"initializer_range": 0.1}},
        {"parallel": {"micro_batch": 1}},
    ],
)
def test_how_it_is_computed_may_change(found: Description, change: dict[str, Any]) -> None:
    """Otherwise a run could not move to machines without flash_attn, or be checked with the reference layer."""
    run = run_of("folder", found)
    changes = {k: replace(getattr(run, k), **v) if isinstance(v, dict) else v for k, v in change.items()}
    store.check_resumable("folder", found, resolved(replace(run, **changes)))


def test_a_rotary_scaling_without_a_kind_is_llama_3s(found: Description, tmp_path: Path) -> None:
    """Before there were other kinds, a run file and a checkpoint had these four keys only."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    run = json.loads(RECORDED.read_text())["run"]
    del run["path"], run["deepspeed_path"], run["training"]["tokens"]
    run["model"]["rope_scaling"] = found.run["model"]["rope_scaling"] = scaling
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    now = load_run(str(tmp_path / "run.yaml"))
    assert now.model.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 16, "llama3") == found.model.rope_scaling
    store.check_resumable("folder", found, resolved(now))
    with pytest.raises(UserError, match="rope_scaling"):
        other = replace(now.model, rope_scaling=RopeScaling(8.0, rope_type="linear"))
        store.check_resumable("folder", found, resolved(replace(now, model=other)))


def test_keys_of_the_model_that_it_lacks_have_their_defaults(found: Description) -> None:
    """Otherwise a new key would end all earlier runs: "tie_word_embeddings None, not False"."""
    run = resolved(run_of("folder", found))
    del found.run["model"]["tie_word_embeddings"]
    store.check_resumable("folder", found, run)


def test_the_model_may_not_change(found: Description) -> None:
    run = run_of("folder", found)
    other = resolved(replace(run, model=replace(run.model, rope_theta=500_000.0)))
    with pytest.raises(UserError, match=r"^folder: was trained with model rope_theta 10000.0, not 500000.0; use the"):
        store.check_resumable("folder", found, other)
