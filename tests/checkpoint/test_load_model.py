"""A checkpoint, given by any of its paths, loads the trained weights and evaluates like its export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from written_ranks import SEQ_LEN, SHAPES, Write

from llama_ds.checkpoint.load_model import load_model, locate, open_model, run_of
from llama_ds.checkpoint.manifest import describe
from llama_ds.config.schema import RunConfig
from llama_ds.data.source.shards import open_source
from llama_ds.model.llama import Llama, layer_context
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.tensor_parallel import SingleRank
from tools import convert, evaluate, generate

CPU = torch.device("cpu")


def trained(run: RunConfig, tied: bool = False) -> Llama:
    """Return the model whose weights `write` shards into a checkpoint."""
    context = layer_context(
        replace(run, model=replace(run.model, tie_word_embeddings=tied)), SingleRank(), "cpu", torch.float32
    )
    return Llama(context, NextTokenLoss(context.tp))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
def test_weights_of_all_ranks_are_merged(write: Write, run: RunConfig, tp: int, by_layer: bool, tied: bool) -> None:
    expected = trained(run, tied).state_dict()
    merged = load_model(open_model(write(tp, by_layer, tied)), CPU, torch.float32).state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_a_run_its_checkpoints_and_one_checkpoint_name_the_same(write: Write) -> None:
    run = write(1, True)
    tag = f"{run}/checkpoints/step_00000007"
    assert [locate(path) for path in (run, f"{run}/checkpoints", tag)] == [tag] * 3
    assert run_of(tag, describe(tag)).model.num_hidden_layers == 3


@pytest.mark.parametrize("damage", ["no folder", "no checkpoint", "latest names nothing"])
def test_a_path_without_a_checkpoint_gives_one_line_and_exit_2(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = Path(write(1, True))
    if damage == "no folder":
        run = tmp_path / "elsewhere"
    else:
        (run / "checkpoints" / "step_00000007" / "llama_ds.json").unlink()
        if damage == "no checkpoint":
            (run / "checkpoints" / "latest").unlink()
    assert convert.main([str(run), str(tmp_path / "hf"), "--from", "deepspeed", "--to", "hf"]) == 2
    assert evaluate.main([str(run)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") and str(run) in line for line in lines)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_export_evaluates_as_the_checkpoint(
    write: Write, run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], document_mask: bool
) -> None:
    """Also on all rows, of which the last ends in filler."""
    source = open_source(run.data.sources[0].path, "validation")
    assert (source.geometry.ids - 1) % SEQ_LEN
    every = ["--rows", str(source.rows)]
    folder, out = write(2, True, document_mask=document_mask), str(tmp_path / "hf")
    assert convert.main([folder, out, "--to", "hf"]) == 0
    capsys.readouterr()
    found = []
    for args in ([folder], [folder, "--hf", out], [folder, *every], [folder, "--hf", out, *every]):
        assert evaluate.main([*args, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["rows"] == 12 and found[0]["step"] == 7
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], abs=1e-5)
    assert found[3]["loss"] == pytest.approx(found[2]["loss"], abs=1e-5)


def test_moved_data_is_found_where_the_user_says(
    write: Write, run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(1, True)
    moved = tmp_path / "moved"
    moved.symlink_to(run.data.sources[0].path)
    assert evaluate.main([folder, "--json", "--rows", "5", "--source", f"code={moved}"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 5
    assert evaluate.main([folder, "--source", f"prose={moved}"]) == 2
    assert "prose" in capsys.readouterr().err


def test_every_format_generates_the_same_text(
    write: Write, run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write(2, True, model=SHAPES["llama3"])]
    for kind in ("hf", "meta"):
        folders.append(str(tmp_path / kind))
        assert convert.main([folders[0], folders[-1], "--to", kind, "--no-logits"]) == 0
    texts = []
    for folder in folders:
        capsys.readouterr()
        assert generate.main([folder, "--prompt", "def ", "--temperature", "0", "--max-new-tokens", "8", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0] == texts[1] == texts[2] and texts[0][0]["text"]
    assert generate.main([str(tmp_path / "nowhere")]) == 2
    (tmp_path / "meta" / "tokenizer.model").unlink()
    assert generate.main([folders[2]]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines and "tokenizer.model" in lines[-1]
