"""Weights are refused for a model that computes another function with them, whatever makes the difference."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from written_ranks import MODEL as SMALL
from written_ranks import Write

from llama_ds.checkpoint.load_model import open_model
from llama_ds.checkpoint.model_shape import model_in
from llama_ds.checkpoint.same_model import check_same_function, fingerprint
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.config.schema import ModelConfig, RopeScaling
from llama_ds.config.schema_mup import MupConfig
from llama_ds.errors import UserError
from tools import convert

MODEL = ModelConfig(512, 64, 96, 4, 8, 4, 8)
FILES = ModelFiles("folder", MODEL, 32, "fp32", {}, None)
SAME_SHAPES = {"rms_norm_eps": 1e-2, "rope_theta": 5e5, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)}
OTHER_SHAPES = {"num_attention_heads": 4, "num_key_value_heads": 8, "head_dim": 16, "tie_word_embeddings": True}


def another(value: Any) -> Any:
    return (not value) if isinstance(value, bool) else 2 * value if isinstance(value, (int, float)) else "other"


@pytest.mark.parametrize("name", [key.name for key in fields(ModelConfig)])
def test_every_key_of_a_model_is_compared(name: str) -> None:
    """New keys, too: each of them changes the function."""
    changed: Any = ModelConfig.__new__(ModelConfig)  # unchecked: not every pair of values makes a model
    changed.__dict__.update(
        vars(MODEL) | {name: (SAME_SHAPES | {"mup": MupConfig(32)}).get(name) or another(getattr(MODEL, name))}
    )
    with pytest.raises(UserError, match=rf"^folder: is another model than the run's: model\.{name} = "):
        check_same_function(FILES, changed, [])
    ((key, there, _),) = check_same_function(FILES, changed, [f"model.{name}"])
    assert (key, there) == (f"model.{name}", getattr(MODEL, name))
    assert check_same_function(FILES, MODEL, [f"model.{name}"]) == []


def test_one_message_has_all_keys_and_the_changes_that_fit_the_weights() -> None:
    """Of heads that are cut in another way, the weights have equal shapes: that is no change to make on purpose."""
    wanted = replace(MODEL, **SAME_SHAPES, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=600)
    with pytest.raises(UserError) as error:
        check_same_function(FILES, wanted, [])
    message = str(error.value)
    assert "model.num_attention_heads = 8 there, 4 here; model.num_key_value_heads = 4 there, 2 here; " in message
    assert "model.rms_norm_eps = 1e-05 there, 0.01 here; model.rope_theta = 10000.0 there, 500000.0 here; " in message
    assert "model.rope_scaling = null there, {factor: 8.0, low_freq_factor: 1.0, " in message
    assert "take all of them: model='{from: folder}', or list" in message
    assert message.endswith("'[model.vocab_size, model.rms_norm_eps, model.rope_theta, model.rope_scaling]'")


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_a_change_of_shapes_is_not_proposed(name: str) -> None:
    with pytest.raises(UserError) as error:
        check_same_function(FILES, replace(MODEL, **{name: OTHER_SHAPES[name]}), [])
    assert "start_from_changes" not in str(error.value)


def test_formats_of_one_model_agree_in_model_and_fingerprint(write: Write, tmp_path: Path) -> None:
    """Otherwise the log could not tell whether two runs started from the same weights."""
    run = write(2, True, model=replace(SMALL, rope_scaling=None))
    marks = {fingerprint(open_model(run))}
    for kind in ("hf", "meta"):
        folder = str(tmp_path / kind)
        assert convert.main([run, folder, "--to", kind, "--no-logits"]) == 0
        marks.add(fingerprint(open_model(folder)))
        assert model_in(folder) == model_in(run) == open_model(run).model
    (mark,) = marks
    files = open_model(run)
    key = next(iter(files.tensors))
    assert fingerprint(replace(files, tensors={**files.tensors, key: Changed(files.tensors[key])})) != mark


class Changed:
    """A weight with another first element."""

    def __init__(self, source: Any) -> None:
        self.source, self.shape = source, source.shape

    def read(self, out: torch.Tensor, rank: int = 0, size: int = 1, start: int = 0) -> None:
        self.source.read(out, rank, size, start)
        out[0] += 1


def test_config_json_alone_gives_the_model(tmp_path: Path, write: Write) -> None:
    """So that a run can be planned before the weights are downloaded."""
    run = write(1, True)
    assert convert.main([run, str(tmp_path / "hf"), "--to", "hf", "--no-logits"]) == 0
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert model_in(str(tmp_path / "hf")) == model_in(run)
