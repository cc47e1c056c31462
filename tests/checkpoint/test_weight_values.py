"""Conversions round, drop or copy damaged numbers only with a word, and take the most precise weights when asked."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_meta import release
from written_ranks import SHAPES, Write, build, pieces, write_rank

from llama_ds.checkpoint import store
from llama_ds.checkpoint.load_model import open_model
from llama_ds.checkpoint.manifest import Description, FileEntry, checksum, name_of, write_manifest
from llama_ds.checkpoint.stored import torch_tensors
from llama_ds.checkpoint.weights import ModelFiles, check_shapes
from llama_ds.config.run_file import resolved
from llama_ds.config.schema import RunConfig
from llama_ds.errors import UserError
from llama_ds.layout.layout import Layout
from llama_ds.layout.optimizer_states import MASTER
from tools import convert

NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


def run_convert(*words: object) -> int:
    return convert.main([str(word) for word in words])


def whole(files: ModelFiles) -> dict[tuple[int, str], torch.Tensor]:
    return {key: tensor.whole() for key, tensor in files.tensors.items()}


@pytest.fixture
def mixed_run(run: RunConfig, tmp_path: Path) -> Path:
    """A checkpoint with bf16 weights and their fp32 masters."""
    folder = tmp_path / "run" / "checkpoints" / store.tag_of(7)
    folder.mkdir(parents=True)
    record = write_rank(run, str(folder), 0, 1, True, "bf16")
    masters = {name_of((i, n)): w for i, layer in enumerate(build(run).layers) for n, w in layer.state_dict().items()}
    path = str(folder / "masters.pt")
    torch.save(masters, path)
    record.files["masters.pt"] = FileEntry(os.path.getsize(path), checksum(path), 0)
    for name, stored in torch_tensors(path).items():
        runs = pieces("masters.pt", 0, stored, [0], masters[name].numel())
        record.pieces[name] += [piece._replace(kind=MASTER) for piece in runs]
    description = Description(7, 896, 1, "bf16", Layout().as_data(), resolved(run), optimizer_steps=7)
    write_manifest(str(folder), description, [record])
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["hf", "deepspeed"])
def test_fp32_results_hold_the_masters(
    mixed_run: Path, run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The default stays the dtype of training; a run that starts from the checkpoint takes the masters, too."""
    masters = {(i, n): w for i, layer in enumerate(build(run).layers) for n, w in layer.state_dict().items()}
    files = open_model(str(mixed_run))
    assert all(torch.equal(files.finest[key].whole(), masters[key]) for key in masters)
    assert all(torch.equal(tensor, masters[key].bfloat16()) for key, tensor in whole(files).items())
    assert run_convert(mixed_run, tmp_path / "fp32", "--to", kind, "--dtype", "fp32") == 0
    out = capsys.readouterr().out
    assert "taken: fp32 masters, of which the bf16 weights are roundings\n" in out and "source as fp32" in out
    assert all(torch.equal(tensor, masters[key]) for key, tensor in whole(open_model(str(tmp_path / "fp32"))).items())
    assert run_convert(mixed_run, tmp_path / "bf16", "--to", kind, "--no-logits") == 0
    assert "taken: " not in capsys.readouterr().out
    found = whole(open_model(str(tmp_path / "bf16")))
    assert all(torch.equal(tensor, masters[key].bfloat16()) for key, tensor in found.items())


def test_a_damaged_file_of_masters_is_found(
    mixed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = mixed_run / "checkpoints" / store.tag_of(7) / "masters.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run_convert(mixed_run, tmp_path / "bf16", "--to", "hf", "--no-logits") == 0
    assert run_convert(mixed_run, tmp_path / "fp32", "--to", "hf", "--dtype", "fp32") == 2
    assert "masters.pt: its bytes have checksum" in capsys.readouterr().err


def test_fp32_of_a_checkpoint_without_masters_says_so(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(1, True, dtype="bf16")
    assert run_convert(source, tmp_path / "out", "--to", "hf", "--dtype", "fp32", "--no-logits") == 0
    assert "taken: bf16 weights; the checkpoint holds no masters\n" in capsys.readouterr().out


@pytest.fixture
def hf(write: Write, tmp_path: Path) -> Path:
    source = write(1, True, dtype="bf16", model=SHAPES["gqa"])
    assert run_convert(source, tmp_path / "hf", "--to", "hf", "--no-logits") == 0
    return tmp_path / "hf"


def change(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    state = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_rounded_tensors_of_a_mixed_model_are_reported(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    exact = torch.ones(32)
    change(hf, model__norm__weight=exact + torch.rand(32), model__layers__0__input_layernorm__weight=exact)
    capsys.readouterr()
    assert run_convert(hf, tmp_path / "out", "--to", kind) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "proof   rounded" in line]
    assert line == (
        f"proof   rounded 1 of 30 tensors, stored in a wider dtype, to bf16 ({NORM}); --dtype fp32 keeps every bit"
    )
    assert run_convert(hf, tmp_path / "fp32", "--to", kind, "--dtype", "fp32") == 0
    assert "proof   rounded" not in capsys.readouterr().out
    before, after = whole(open_model(str(hf))), whole(open_model(str(tmp_path / "fp32")))
    assert all(torch.equal(after[key], before[key].float()) for key in before)


@pytest.mark.parametrize("words", [[], ["--dtype", "fp32"], ["--dtype", "fp16"]])
def test_a_model_with_nan_is_converted_only_on_demand(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    up = torch.ones(88, 32, dtype=torch.bfloat16)
    up[3, :5], up[87, 31] = math.nan, -math.inf
    norm = torch.ones(32, dtype=torch.bfloat16).view(torch.int16)
    norm[0] = 0x7FA5  # a NaN with other bits than torch's
    change(hf, model__layers__1__mlp__up_proj__weight=up, model__norm__weight=norm.view(torch.bfloat16))
    words = [str(hf), str(tmp_path / "out"), "--to", "meta", "--tp", "2", *words]
    assert run_convert(*words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"2 of its tensors hold numbers that are not finite ({UP}: 5 NaN, 1 infinite, {NORM}: 1 NaN" in error
    assert "--allow-nonfinite" in error and not (tmp_path / "out").exists()
    assert run_convert(*words, "--allow-nonfinite", "--overwrite") == 0
    out = capsys.readouterr().out
    assert "skipped, because some weights are not finite" in out
    assert f"proof   not finite, copied as they are: {UP}: 5 NaN, 1 infinite, {NORM}: 1 NaN, 0 infinite" in out
    after = whole(open_model(str(tmp_path / "out")))
    assert after[2, "mlp.up_proj.weight"].isnan().sum() == 5 and after[2, "mlp.up_proj.weight"].isinf().sum() == 1
    if len(words) == 6:
        assert after[4, "norm.weight"].view(torch.int16)[0] == 0x7FA5


def test_other_rows_than_the_runs_name_both_ways_out(hf: Path, tmp_path: Path, run: RunConfig) -> None:
    """A padded table is legal with a smaller tokenizer, so that the first works; the second is checked here."""
    wanted = SHAPES["gqa"].__class__(**{**vars(SHAPES["gqa"]), "vocab_size": 832})
    with pytest.raises(UserError, match=r"set model\.vocab_size=800, .* --to deepspeed --vocab-size 832 and") as error:
        check_shapes(open_model(str(hf)), wanted)
    words = re.search(r"tools/convert\.py (.*) and start", str(error.value))
    assert words and run_convert(*words[1].replace("NEW", str(tmp_path / "new")).split(), "--no-logits") == 0
    check_shapes(open_model(str(tmp_path / "new")), wanted)


def meta_parts(folder: Path, change: dict[str, torch.Tensor], ranks: range) -> None:
    for rank in ranks:
        path = folder / f"consolidated.{rank:02d}.pth"
        torch.save({**torch.load(path, weights_only=True), **change}, path)


def test_norms_that_drifted_apart_are_the_first_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 3 70B is like this. Copies of two models differ by more, and are refused (test_meta)."""
    folder = tmp_path / "meta"
    release(folder, 2)
    first = torch.load(folder / "consolidated.00.pth", weights_only=True)["norm.weight"]
    meta_parts(folder, {"norm.weight": first + (torch.arange(32) == 5) * 2**-8}, range(1, 2))
    files = open_model(str(folder))
    assert torch.equal(files.tensors[3, "norm.weight"].whole(), first)
    assert run_convert(folder, tmp_path / "hf", "--to", "hf") == 0
    line = r"consolidated\.00\.pth: its norms are taken; 1 of 5 differ in the files of other ranks, by at most 0\.00"
    assert re.search(line, capsys.readouterr().out)


@pytest.mark.parametrize("name", ["rope.freqs", "layers.1.attention.inner_attention.rope.freqs"])
@pytest.mark.parametrize(("theta", "warned"), [(10_000.0, False), (1_000_000.0, True)])
def test_stored_frequencies_are_dropped_and_compared(tmp_path: Path, name: str, theta: float, warned: bool) -> None:
    release(tmp_path / "meta", 2)
    frequencies = (theta ** -(torch.arange(0, 8, 2) / 8)).bfloat16()
    meta_parts(tmp_path / "meta", {"rope.freqs": (1e4 ** -(torch.arange(0, 8, 2) / 8)).half()}, range(2))
    meta_parts(tmp_path / "meta", {name: frequencies}, range(2))
    length, dropped, *warnings = open_model(str(tmp_path / "meta")).notes
    assert "sequence length" in length and "rotary frequencies, which follow from rope_theta: dropped" in dropped
    assert [("suit a theta of about 1e+06" in warning) for warning in warnings] == [True] * warned


def test_other_consolidated_files_are_refused(tmp_path: Path) -> None:
    release(tmp_path / "meta", 1)
    (tmp_path / "meta" / "consolidated.00-of-02.pth").touch()
    with pytest.raises(UserError, match=r"contains consolidated\.00-of-02\.pth beside consolidated\.NN\.pth"):
        open_model(str(tmp_path / "meta"))


def embedding_shape(folder: Path) -> list[int]:
    return list(torch.load(folder / "consolidated.00.pth", weights_only=True)["tok_embeddings.weight"].shape)


def test_the_embedding_is_sharded_as_the_code_of_the_tokenizer_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code Llama has a theta of 1e6 and columns, as LLaMA 2; Llama 3's tokenizer.model belongs to rows."""
    source = tmp_path / "source"
    release(source, 1, rope_theta=1_000_000.0)
    words = ["--to", "meta", "--tp", "2", "--no-logits"]
    assert run_convert(source, tmp_path / "none", *words) == 2
    assert "give --embedding rows for that of Llama 3, or --embedding columns" in capsys.readouterr().err
    for how, shape in (("rows", [400, 32]), ("columns", [800, 16])):
        assert run_convert(source, tmp_path / how, *words, "--embedding", how) == 0
        assert embedding_shape(tmp_path / how) == shape
    for name, content, shape in (("sp", b"\n\x0e\n\x05<unk>", [800, 16]), ("tiktoken", b"IQ== 0\nIg== 1\n", [400, 32])):
        (source / "tokenizer.model").write_bytes(content)
        assert run_convert(source, tmp_path / name, *words) == 0
        assert embedding_shape(tmp_path / name) == shape


@pytest.mark.parametrize("how", ["rows", "columns"])
def test_a_square_embedding_is_read_as_it_was_sharded(tmp_path: Path, how: str) -> None:
    """With as many ids as columns the shards of both ways have shapes that could be the other's transposed."""
    release(tmp_path / "source", 1)
    words = ["--to", "meta", "--no-logits", "--vocab-size", "32"]
    assert run_convert(tmp_path / "source", tmp_path / "one", *words) == 0
    assert run_convert(tmp_path / "source", tmp_path / "two", *words, "--tp", "2", "--embedding", how) == 0
    one, two = whole(open_model(str(tmp_path / "one"))), whole(open_model(str(tmp_path / "two")))
    assert all(torch.equal(one[key], two[key]) for key in one)
