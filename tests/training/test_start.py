"""A run that starts from a model, or resumes, continues with the function and the tokenizer of its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_ds.checkpoint.formats.hf_config import hf_config
from llama_ds.checkpoint.formats.plan import as_json
from llama_ds.checkpoint.manifest import Description
from llama_ds.checkpoint.names import hf_name
from llama_ds.config.run_file import resolved
from llama_ds.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from llama_ds.data.text.same_tokenizer import difference
from llama_ds.data.text.tokenizer import Tokenizer, tokenizer_files, train_tokenizer
from llama_ds.errors import UserError
from llama_ds.layout.layout import resolve_layout
from llama_ds.layout.optimizer_states import MASTER
from llama_ds.layout.weights import EMBEDDING_KEY, weight_shapes
from llama_ds.training import checkpoints
from llama_ds.training.resumed import changes
from llama_ds.training.start import carried_over, check_same_tokenizer, open_start

SIZE = 320
MODEL = ModelConfig(SIZE, 8, 12, 1, 2, 1, 4)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """Return two tokenizers of one size."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "one.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    (folder / "two.txt").write_text("import os\n\n\ndef call(self):\n    return os.environ\n" * 50)
    one, two = (train_tokenizer([str(folder / f"{n}.txt")], str(folder / n), SIZE) for n in ("one", "two"))
    return Tokenizer(one), Tokenizer(two)


@pytest.fixture
def folder(tokenizers: tuple[Tokenizer, Tokenizer], tmp_path: Path) -> Path:
    """Return a Hugging Face folder of MODEL with the first tokenizer."""
    torch.manual_seed(0)
    weights = {hf_name(*key, 1): torch.randn(shape) for key, shape in weight_shapes(MODEL).items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(as_json(hf_config(MODEL, 16, "float32", 1, 2)))
    for name, content in tokenizer_files(tokenizers[0].path).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def run_from(folder: Path, listed: tuple[str, ...] = (), **changes: Any) -> RunConfig:
    data = DataConfig("t", 8, (SourceConfig("code", "a", 0.5), SourceConfig("web", "b", 0.5)))
    checkpoint = CheckpointConfig(start_from=str(folder), start_from_changes=listed)
    shape, training = replace(MODEL, **changes), TrainingConfig(4, 10, 320)
    return RunConfig("r", 0, "o", shape, data, training, OptimizerConfig(1e-3), ParallelConfig(), checkpoint=checkpoint)


def test_metadata_goes_along_with_the_tokenizer(folder: Path, tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    same = carried_over("runs", None, open_start(run_from(folder), tokenizers[0]))
    assert same.hf_config["eos_token_id"] == 2 and "chat_template.jinja" in same.files()
    other = carried_over("runs", None, open_start(run_from(folder, ("data.tokenizer",)), tokenizers[1]))
    assert not other.hf_config and not other.files()
    resumed = Description(1, 8, 1, "fp32", {}, {}, hf_config=dict(same.hf_config))
    assert carried_over(str(folder.parent), (folder.name, resumed), None).files() == same.files()


def test_what_was_loaded_is_logged(
    folder: Path, tokenizers: tuple[Tokenizer, Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "llama_ds"):
        files = open_start(run_from(folder), tokenizers[0])
    assert files and files.model == MODEL
    (line,) = caplog.messages
    assert line.startswith(f"starting from {folder}: hf, fp32, fingerprint ") and len(line.split()[-1]) == 32


def test_another_function_is_refused_and_a_stated_one_logged(
    folder: Path, tokenizers: tuple[Tokenizer, Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    """The loss of such a start is worse, by little enough to go unnoticed."""
    with pytest.raises(UserError, match=r"another model than the run's: model.rope_theta = 10000.0 there, 500000.0"):
        open_start(run_from(folder, rope_theta=5e5), tokenizers[0])
    with caplog.at_level(logging.INFO, "llama_ds"):
        assert open_start(run_from(folder, ("model.rope_theta",), rope_theta=5e5), tokenizers[0])
    assert "changed on purpose: model.rope_theta 10000.0 -> 500000.0" in caplog.messages


def test_a_larger_vocabulary_is_stated_and_gets_rows_of_zeros(
    folder: Path, tokenizers: tuple[Tokenizer, Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "llama_ds"):
        files = open_start(run_from(folder, ("model.vocab_size",), vocab_size=SIZE + 8), tokenizers[0])
    assert files
    for key, shape in weight_shapes(files.model).items():
        assert files.tensors[key].shape == shape
    assert not files.tensors[EMBEDDING_KEY].whole()[SIZE:].any()
    assert "changed on purpose: model.vocab_size 320 -> 328, 8 rows of zeros added" in caplog.messages


def test_another_tokenizer_is_refused_unless_stated(
    folder: Path, tokenizers: tuple[Tokenizer, Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise ids of one vocabulary would be trained on the embeddings of another."""
    with pytest.raises(UserError, match=r"was trained with another tokenizer than .*two.model: ids .*=\[data.tokeni"):
        open_start(run_from(folder), tokenizers[1])
    with pytest.raises(UserError, match=r"was trained with another tokenizer than .*two.model: ids .* for a new run"):
        check_same_tokenizer(str(folder), tokenizers[1])
    check_same_tokenizer(str(folder), tokenizers[0])
    with caplog.at_level(logging.INFO, "llama_ds"):
        assert open_start(run_from(folder, ("data.tokenizer",)), tokenizers[1])
    assert caplog.messages[-1].startswith("changed on purpose: data.tokenizer: ids ")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"damaged")])
def test_a_tokenizer_that_is_missing_or_damaged_is_a_warning(
    damage: Callable[[Path], object], folder: Path, tokenizers: tuple[Tokenizer, Tokenizer], caplog: Any
) -> None:
    """The weights are intact, and the tokenizer of the data is there."""
    damage(folder / "tokenizer.model")
    check_same_tokenizer(str(folder), tokenizers[1])
    assert open_start(run_from(folder), tokenizers[0])
    assert any("compare" in record.message and record.levelno == logging.WARNING for record in caplog.records)


def test_files_of_two_kinds_with_equal_ids_are_one_tokenizer(
    tokenizers: tuple[Tokenizer, Tokenizer], tmp_path: Path
) -> None:
    """An export to Hugging Face has a tokenizer.json, the data the sentencepiece model that it was made from."""
    from llama_ds.benchmarks.exported_tokenizer import exported

    for number, tokenizer in enumerate(tokenizers):
        (tmp_path / str(number)).mkdir()
        for name, content in exported(tokenizer).items():
            (tmp_path / str(number) / name).write_bytes(content)
    theirs = [Tokenizer(str(tmp_path / str(number) / "tokenizer.json")) for number in range(2)]
    assert [bool(difference(one, two)) for one in theirs for two in tokenizers] == [False, True, True, False]


def test_a_resume_names_every_key_that_changed(folder: Path) -> None:
    """Otherwise a mistyped override would change the rest of the run without a trace in its log."""
    run = run_from(folder)
    layout = resolve_layout(run, 2)
    found = Description(5, 0, 0, "fp32", layout.as_data(), resolved(run))
    assert changes(run, layout, "fp32", "folder", found) == []
    assert changes(replace(run, path="elsewhere.yaml", deepspeed_path="x"), layout, "fp32", "folder", found) == []
    now = replace(
        run,
        optimizer=replace(run.optimizer, lr=2e-3, betas=(0.9, 0.99), z_loss=1e-4),
        data=replace(run.data, document_mask=True, sources=(SourceConfig("web", "c", 1.0),)),
        deepspeed={"zero_optimization": {"stage": 1}},
    )
    assert changes(now, resolve_layout(now, 1), "bf16", "folder", found) == [
        "data.sources[code] {path: a, weight: 0.5, epochs: null, reread: false} -> absent",
        "data.sources[web].path b -> c",
        "data.sources[web].weight 0.5 -> 1.0",
        "data.document_mask false -> true",
        "optimizer.lr 0.001 -> 0.002",
        "optimizer.betas [0.9, 0.95] -> [0.9, 0.99]",
        "optimizer.z_loss 0.0 -> 0.0001",
        "deepspeed.zero_optimization absent -> {stage: 1}",
        "layout.world 2 -> 1",
        "layout.dp 2 -> 1",
        "layout.accumulation 2 -> 4",
        "dtype fp32 -> bf16",
    ]
    del found.run["optimizer"]["z_loss"]  # written before the key existed
    assert asdict(run)["optimizer"]["z_loss"] == 0.0 and changes(run, layout, "fp32", "folder", found) == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_damaged_weights_are_refused_unless_the_run_allows_them(
    folder: Path, tokenizers: tuple[Tokenizer, Tokenizer], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """The rank that reads such a number says in which weight it is, before the first step."""
    key, targets = (1, "mlp.up_proj.weight"), {}

    def fragments(engine: object) -> Iterator[SimpleNamespace]:
        for name, shape in weight_shapes(MODEL).items():
            targets[name] = torch.empty(torch.Size(shape).numel())
            yield SimpleNamespace(name=f"layers.{name[0]}.{name[1]}", start=0, tensors={MASTER: targets[name]})

    monkeypatch.setattr(checkpoints, "fragments", fragments)
    monkeypatch.setattr(checkpoints, "spread_masters", lambda engine: None)
    monkeypatch.setattr(checkpoints.Checkpoints, "_part", lambda *arguments: (0, 1))
    weights = load_file(folder / "model.safetensors")
    weights[hf_name(*key, 1)][3, 2] = value
    save_file(weights, folder / "model.safetensors")
    for listed in ((), ("nonfinite",)):
        run, this = run_from(folder, listed), object.__new__(checkpoints.Checkpoints)
        this.run = run
        start = open_start(run, tokenizers[0])
        if listed:
            this.start_from(None, start.finest)
            assert targets[key].isfinite().sum() == targets[key].numel() - 1
        else:
            with pytest.raises(UserError, match=r"layer 1 mlp\.up_proj\.weight holds NaN or infinity.*=\[nonfinite\]"):
                this.start_from(None, start.finest)
