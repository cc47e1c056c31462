"""`model: {from: PATH}`: the run gets the folder's model, and other keys cannot contradict it unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ds.config import model_source
from llama_ds.config.model_source import read_models_by
from llama_ds.config.run_file import dump, load_resolved, load_run
from llama_ds.config.schema import ModelConfig, RopeScaling, RunConfig
from llama_ds.errors import UserError

FOUND = ModelConfig(512, 64, 96, 4, 8, 2, 16, 1e-6, 500_000.0, RopeScaling(8.0, 1.0, 4.0, 8192), True)
RUN = """\
name: tiny
deepspeed: {}
model: {from: ~/there}
data: {tokenizer: t.model, seq_len: 32, sources: [{name: code, path: shards, weight: 1}]}
training: {global_batch: 16, steps: 100}
optimizer: {lr: 1e-3, warmup_steps: 10}
parallel: {}
"""

Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setattr(model_source, "_readers", [])
    read_models_by({"/home/x/there": FOUND, "other": replace(FOUND, head_dim=8)}.__getitem__)
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return lambda *overrides: load_run(str(path), overrides)


def test_the_model_is_that_of_the_folder_and_recorded_in_numbers(load: Load, tmp_path: Path) -> None:
    """head_dim, too, which would otherwise follow from hidden size and heads; a run folder outlives the source."""
    run = load()
    assert run.model == FOUND
    (tmp_path / "resolved.yaml").write_text(dump(run))
    assert load_resolved(str(tmp_path / "resolved.yaml")).model == FOUND


def test_the_command_line_can_name_the_folder(load: Load) -> None:
    assert load("model.from=other").model.head_dim == 8


def test_equal_keys_may_stand_beside_it(load: Load) -> None:
    assert load("model.rope_theta=5e5", "model.num_hidden_layers=4").model == FOUND


def test_other_values_must_be_stated_as_changes(load: Load) -> None:
    """Otherwise a key left over from another model would silently change the function of these weights."""
    with pytest.raises(UserError) as error:
        load("model.rope_theta=10000", "model.rope_scaling=null", "model.rms_norm_eps=1e-6")
    assert "model.rope_theta = 500000.0 there, 10000.0 here; model.rope_scaling = {factor: 8.0, " in str(error.value)
    assert "checkpoint.start_from_changes='[model.rope_theta, model.rope_scaling]'" in str(error.value)
    changes = "checkpoint.start_from_changes=[model.rope_theta]"
    assert load("model.rope_theta=1e6", changes).model == replace(FOUND, rope_theta=1e6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.rope_teta=1", "rope_teta is not a known key (did you mean 'rope_theta'?)"),
        ("model.from=[]", "model.from = [] is not a string"),
        ("model.mup={base_head_dim: 8}", "model.mup.base_width is missing"),
        ("model.mup={base_width: 64}", "model.mup = null there, {base_width: 64, base_head_dim: null} here"),
        ("checkpoint.start_from_changes=[model.rope_teta]", "lists model.rope_teta (did you mean 'model.rope_theta'?)"),
    ],
)
def test_mistakes_are_named(load: Load, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(override)
    assert message in str(error.value)


def test_a_program_that_reads_no_models_says_so(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "_readers", [])
    with pytest.raises(UserError, match=r"model.from = /home/x/there: this program reads no model folders; call"):
        load()
