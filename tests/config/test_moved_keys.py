"""Renamed keys: old run files keep their meaning, and one warning gives the new name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from llama_ds.config.run_file import dump, load_resolved, load_run, resolved
from llama_ds.config.schema import RunConfig
from llama_ds.config.text import dump_yaml
from llama_ds.errors import UserError
from llama_ds.log import logger

MODEL: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    "num_attention_heads": 8,
}
BASE: dict[str, Any] = {
    "name": "tiny",
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "data": {"tokenizer": "t.model", "seq_len": 32, "sources": [{"name": "a", "path": "a", "weight": 1}]},
    "optimizer": {"lr": 1e-3, "warmup_steps": 1},
}
OLD = BASE | {
    "model": {**MODEL, "attention_backend": "sdpa", "initializer_range": 0.05},
    "training": {"global_batch": 16, "steps": 100},
    "parallel": {"decoder_layer": "written_out", "micro_batch": 2},
    "logging": {"tensorboard": True},
}
NEW = BASE | {
    "model": MODEL,
    "training": {"global_batch": 16, "steps": 100, "initializer_range": 0.05},
    "parallel": {"micro_batch": 2},
    "compute": {"attention_backend": "sdpa", "decoder_layer": "manual_backward"},
    "logging": {"boards": [{"name": "tensorboard"}]},
}
MOVED = {
    "model.attention_backend": "compute.attention_backend",
    "model.initializer_range": "training.initializer_range",
    "parallel.decoder_layer": "compute.decoder_layer",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING, logger.name)


def load(data: dict[str, Any], *overrides: str) -> RunConfig:
    Path("run.yaml").write_text(dump_yaml(data))
    return load_run("run.yaml", overrides)


def test_an_old_run_file_is_the_same_run(caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise an old run would be refused, or train other weights."""
    new = load(NEW)
    assert not caplog.records
    assert load(OLD) == new and new.training.initializer_range == 0.05
    lines = [f"run.yaml: {old} is now called {now}; the old name still works" for old, now in MOVED.items()]
    lines.append("run.yaml: logging.tensorboard = true is now written logging.boards = [{name: tensorboard}]")
    assert caplog.messages == lines and {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_recorded_run_is_read_under_either_name(caplog: pytest.LogCaptureFixture) -> None:
    """tools/shards.py rows would not open the folder of a run that began before; nobody could mend its run.yaml."""
    new = load(NEW)
    Path("new.yaml").write_text(dump(new))
    recorded = resolved(new)
    recorded["model"] |= {"attention_backend": "sdpa", "initializer_range": 0.05}
    recorded["parallel"] |= {"decoder_layer": "written_out"}
    del recorded["compute"], recorded["training"]["initializer_range"]
    Path("old.yaml").write_text(dump_yaml(recorded))
    assert load_resolved("old.yaml") == load_resolved("new.yaml") == new
    assert not caplog.records


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.attention_backend=reference", "parallel.decoder_layer=autograd"),
        ("compute.attention_backend=reference", "compute.decoder_layer=autograd"),
        ("model.attention_backend=sdpa", "model.attention_backend=reference", "compute.decoder_layer=autograd"),
        ("parallel={decoder_layer: autograd, micro_batch: 1}", "compute.attention_backend=reference"),
        ("compute={decoder_layer: autograd}", "model.attention_backend=reference"),
        ("parallel.decoder_layer=autograd", "compute.decoder_layer=autograd", "model.attention_backend=reference"),
    ],
)
@pytest.mark.parametrize("data", [OLD, NEW])
def test_overrides_of_either_name_win_over_the_file(data: dict[str, Any], overrides: tuple[str, ...]) -> None:
    run = load(data, *overrides)
    assert (run.compute.attention_backend, run.compute.decoder_layer) == ("reference", "autograd")


def test_an_old_value_under_the_new_key_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert load(NEW, "compute.decoder_layer=written_out") == load(NEW)
    (line,) = caplog.messages
    assert line == (
        "command line: compute.decoder_layer = written_out is now called manual_backward; the old name still works"
    )


@pytest.mark.parametrize(
    ("data", "overrides", "message"),
    [
        (OLD | {"compute": {"attention_backend": "auto"}}, (), "run.yaml: model.attention_backend = sdpa is now called "
         "compute.attention_backend, which is auto; keep compute.attention_backend alone"),
        (NEW, ("compute.decoder_layer=autograd", "parallel.decoder_layer=written_out"), "command line: "
         "parallel.decoder_layer = written_out is now called compute.decoder_layer, which is autograd; keep "
         "compute.decoder_layer alone"),
        (OLD | {"compute": 3}, (), "run.yaml: compute = 3 is not a section of keys"),
        (NEW, ("model.attention_backend=flsh",), "run.yaml: compute.attention_backend = 'flsh' is not auto, "
         "flash_attn, sdpa or reference"),
        (NEW, ("model.initializer_range=0",), "run.yaml: training.initializer_range = 0.0 is not positive"),
        (NEW, ("model.initializer_range=wide",), "command line: training.initializer_range = 'wide' is not a finite "
         "number"),
    ],
)  # fmt: skip
def test_names_that_contradict_each_other_are_told(
    data: dict[str, Any], overrides: tuple[str, ...], message: str
) -> None:
    """Otherwise one of the two values would be ignored silently."""
    with pytest.raises(UserError) as error:
        load(data, *overrides)
    assert str(error.value) == message
