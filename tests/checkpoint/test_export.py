"""An export holds the weights that were trained, loads in transformers, and a failed one leaves nothing behind."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Write
from transformers import AutoModelForCausalLM

from llama_ds.checkpoint import huggingface
from llama_ds.checkpoint.huggingface import export
from llama_ds.checkpoint.load_model import load_model, locate, run_of
from llama_ds.checkpoint.store import describe
from llama_ds.checkpoint.weights import layer_file
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.model.llama import Llama, shared_parts
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.tensor_parallel import SingleRank
from tools import convert, evaluate

CPU = torch.device("cpu")


def trained(run: RunConfig, tied: bool = False) -> Llama:
    """Return the model whose weights `write` cut into a checkpoint."""
    shared = shared_parts(
        replace(run, model=replace(run.model, tie_word_embeddings=tied)), SingleRank(), "cpu", torch.float32
    )
    return Llama(shared, NextTokenLoss(shared.tp))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
def test_weights_of_all_ranks_are_merged(write: Write, run: RunConfig, tp: int, by_layer: bool, tied: bool) -> None:
    whole = trained(run, tied).state_dict()
    merged = load_model(locate(write(tp, by_layer, tied)), CPU, torch.float32).state_dict()
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 50_000])
def test_transformers_computes_the_same(
    write: Write, run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, tied: bool
) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", shard_bytes)
    out = str(tmp_path / "hf")
    steps: list[tuple[int, int]] = []
    export(locate(write(2, True, tied)), out, None, progress=lambda done, total: steps.append((done, total)))
    layers = run.model.num_hidden_layers + (2 if tied else 3)
    assert steps == [(done, layers) for done in range(1, layers + 1)]
    files = [name for name in os.listdir(out) if name.endswith(".safetensors")]
    assert len(files) == (1 if shard_bytes > 10**9 else 3 + 1 + (not tied))  # one per layer, the final norm in one
    assert not [name for name in os.listdir(out) if name.startswith("part-")]

    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, run.model.vocab_size, (2, run.data.seq_len), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model(ids).logits, trained(run, tied)(ids), atol=1e-5, rtol=0)


def test_bf16_export_is_half_the_size(write: Write, tmp_path: Path) -> None:
    source = locate(write(1, False))
    for dtype in ("fp32", "bf16"):
        export(source, str(tmp_path / dtype), None, dtype)
    sizes = [os.path.getsize(tmp_path / dtype / "model.safetensors") for dtype in ("fp32", "bf16")]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.05)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_failed_export_leaves_nothing(write: Write, tmp_path: Path) -> None:
    source = locate(write(2, True))
    Path(layer_file(source, 3, 1)).write_bytes(b"cut short")
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(UserError, match="layer_03-model_01"):
        export(source, str(out), None, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]
    assert os.listdir(out) == ["kept"]


def test_an_existing_folder_is_replaced_only_when_told(write: Write, tmp_path: Path) -> None:
    source, out = locate(write(1, True)), tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(UserError, match="--overwrite"):
        export(source, str(out), None)
    assert os.listdir(out) == ["old"]
    export(source, str(out), None, overwrite=True)
    assert not (out / "old").exists() and (out / "model.safetensors").exists()


def test_a_run_its_checkpoints_and_one_checkpoint_name_the_same(write: Write) -> None:
    run = write(1, True)
    tag = f"{run}/checkpoints/step_00000007"
    assert [locate(path) for path in (run, f"{run}/checkpoints", tag)] == [tag] * 3
    assert run_of(tag, describe(tag)).model.num_hidden_layers == 3


@pytest.mark.parametrize("damage", ["no folder", "no latest", "latest names nothing"])
def test_what_is_no_checkpoint_is_one_line_and_exit_2(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = Path(write(1, True))
    if damage == "no folder":
        run = tmp_path / "elsewhere"
    elif damage == "no latest":
        (run / "checkpoints" / "latest").unlink()
    else:
        (run / "checkpoints" / "latest").write_text("step_00000008")
    assert convert.main(["deepspeed-to-hf", str(run), str(tmp_path / "hf")]) == 2
    assert evaluate.main([str(run)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") and str(run) in line for line in lines)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_export_evaluates_as_the_checkpoint(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], document_mask: bool
) -> None:
    run, out = write(2, True, document_mask=document_mask), str(tmp_path / "hf")
    assert convert.main(["deepspeed-to-hf", run, out]) == 0
    capsys.readouterr()
    found = []
    for args in ([run], [run, "--hf", out]):
        assert evaluate.main([*args, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["rows"] == 12 and found[0]["step"] == 7
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], abs=1e-5)


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
