"""Every problem with a model's files is reported in one line that names the file; no code in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pickled_call import PickledCall
from safetensors.torch import load_file, save_file
from written_ranks import SHAPES, Write

from llama_ds.checkpoint.load_model import open_model
from llama_ds.errors import UserError
from tools import convert

Models = Callable[[str], Path]  # deepspeed, hf, meta -> a new model folder that a test may damage
LARGE = {"deepspeed": "layer_02-model_01-model_states.pt", "hf": "model.safetensors", "meta": "consolidated.01.pth"}


@pytest.fixture
def models(write: Write, tmp_path: Path) -> Models:
    source = write(1, True, model=SHAPES["gqa"])

    def make(kind: str) -> Path:
        words = [source, str(tmp_path / kind), "--to", kind, "--no-logits", *([] if kind == "hf" else ["--tp", "2"])]
        assert convert.main(words) == 0
        return tmp_path / kind

    return make


def refuse(folder: Path, capsys: pytest.CaptureFixture[str], *named: str, words: tuple[str, ...] = ()) -> str:
    """Convert to every kind; check that each conversion fails with the same line, without a destination; return it."""
    capsys.readouterr()
    out, lines = folder.parent / "refused", set()
    for kind in ("hf", "meta", "deepspeed"):
        assert convert.main([str(folder), str(out), "--to", kind, "--no-logits", *words]) == 2
        found = capsys.readouterr()
        assert found.out == "" and not out.exists()
        lines.add(found.err.replace("\r", "\n").splitlines()[-1])
        shutil.rmtree(f"{out}.partial", ignore_errors=True)
    (line,) = lines
    assert line.startswith("error: ") and all(name in line for name in named), line
    return line


def in_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return what changes the header of a safetensors file."""

    def damage(path: Path) -> None:
        content = path.read_bytes()
        length = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[length:])

    return damage


UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
OFFSETS = "data_offsets"
UNCOVERED: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.write_bytes(path.read_bytes() + bytes(100)), "its tensors end at byte"),
    (in_header(lambda header: header[UP].update({OFFSETS: header[GATE][OFFSETS]})), "begins at byte"),
    (in_header(lambda header: header[UP].update({OFFSETS: [n - 8 for n in header[UP][OFFSETS]]})), "begins at byte"),
]


@pytest.mark.parametrize(("damage", "named"), UNCOVERED, ids=["longer", "twice", "overlap"])
def test_tensors_cover_a_safetensors_file_once(
    models: Models, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], named: str
) -> None:
    """Otherwise a file with the end of another, or a header of another, would be read as weights."""
    folder = models("hf")
    damage(folder / "model.safetensors")
    refuse(folder, capsys, f"{folder}/model.safetensors: cannot be read as a safetensors file", named)


def test_a_rank_s_file_in_place_of_another_is_named(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    folder = models("meta")
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    named = f"{folder}/consolidated.01.pth: ", f" equals that of {folder}/consolidated.00.pth, though each rank"
    refuse(folder, capsys, *named)


def test_ids_without_a_row_are_noted(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Many published models have a padding token whose id is the number of rows; it is legal, but not computed."""
    source = write(1, True, model=replace(SHAPES["gqa"], vocab_size=700))
    for words, noted in (((), True), (("--vocab-size", "800"), False)):
        out = tmp_path / str(noted)
        assert convert.main([source, str(out), "--to", "hf", "--no-logits", *words]) == 0
        text = "vocabulary: the tables have 700 rows, the tokenizer 800 ids, of which those from 700 on cannot"
        assert (text in capsys.readouterr().out) == noted


@pytest.mark.parametrize(
    ("name", "content"),
    [("generation_config.json", "{"), ("tokenizer.json", "{}"), ("tokenizer.model", ""), ("added_tokens.json", "[]")],
)
def test_damaged_files_are_not_carried_along(
    models: Models, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    folder = models("hf")
    (folder / name).write_text(content)
    capsys.readouterr()
    assert convert.main([str(folder), str(folder.parent / "out"), "--to", "hf", "--no-logits"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {folder / name}: is damaged (") and not (folder.parent / "out").exists()


def damage_large(kind: str, how: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / LARGE[kind]
        if how == "truncated":
            os.truncate(path, path.stat().st_size * 2 // 3)
        elif how == "empty":
            os.truncate(path, 0)
        elif how == "foreign":
            path.write_bytes(b"not a model\n" * 100)
        elif how == "missing":
            path.unlink()
        elif how == "looped":
            path.unlink()
            path.symlink_to(path.name)
        else:
            path.unlink()
            path.mkdir()

    return damage


@pytest.mark.parametrize("how", ["truncated", "empty", "foreign", "missing", "looped", "a folder"])
@pytest.mark.parametrize("kind", LARGE)
def test_a_damaged_file_is_named(models: Models, capsys: pytest.CaptureFixture[str], kind: str, how: str) -> None:
    folder = models(kind)
    damage_large(kind, how)(folder)
    what = {"missing": "No such file", "looped": "symbolic links"}
    if kind == "hf" and how == "missing":
        refuse(folder, capsys, f"{folder}: contains neither model.safetensors nor pytorch_model.bin")
    elif kind == "meta" and how == "missing":  # no file records the number of ranks
        refuse(folder, capsys, f"{folder}: tensor tok_embeddings.weight has shape [800, 16]", "or are incomplete")
    else:
        refuse(folder, capsys, str(folder / LARGE[kind]), what.get(how, ""))


@pytest.mark.parametrize("file", ["layer_02-model_01-model_states.pt", "index.json", "llama_ds.json"])
def test_a_flipped_bit_in_a_checkpoint_is_found(models: Models, capsys: pytest.CaptureFixture[str], file: str) -> None:
    """The other formats have no checksums: there, only unreadable files are found."""
    folder = models("deepspeed")
    path = folder / file
    content = bytearray(path.read_bytes())
    # In the index, the last digit of an offset; in the other files, any byte in the middle.
    position = content.index(b',"float32"') - 1 if file == "index.json" else len(content) // 2
    content[position] ^= 1
    path.write_bytes(content)
    refuse(folder, capsys, str(path))


@pytest.mark.parametrize("kind", ["hf", "meta"])
@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_reported_or_harmless(models: Models, kind: str, seed: int) -> None:
    """Random bytes in headers and tables of contents cause a UserError in one line, or change only numbers."""
    folder = models(kind)
    path = folder / LARGE[kind]
    content, draw = path.read_bytes(), random.Random(seed)
    errors = 0
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 1, 3])):
            position = draw.randrange(4000) if draw.random() < 0.6 else -1 - draw.randrange(3000)
            damaged[position] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            for tensor in open_model(str(folder)).tensors.values():
                tensor.whole()
        except UserError as error:
            errors += 1
            assert "\n" not in str(error)
    assert errors > 10


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
@pytest.mark.parametrize("name", ["consolidated.01.pth", "pytorch_model.bin", "layer_02-model_01-model_states.pt"])
def test_code_in_a_checkpoint_is_not_executed(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    kind = next((k for k, file in LARGE.items() if file == name), "hf")
    folder = models(kind)
    if kind == "hf":
        (folder / "model.safetensors").unlink()
    content = {"model.norm.weight": torch.ones(32), "code": PickledCall(os.mkdir, str(tmp_path / "executed"))}
    if how == "torch.save":
        torch.save(content, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(content))
    refuse(folder, capsys, str(folder / name))
    assert not (tmp_path / "executed").exists()
    torch.load(folder / name, weights_only=False) if how == "torch.save" else pickle.loads((folder / name).read_bytes())
    assert (tmp_path / "executed").exists()  # an unsafe load does execute it


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([torch.ones(2)], "holds no state dict"),
        ({"model": {"x": torch.ones(2)}}, "holds no state dict"),
        ({"tok_embeddings.weight": torch.ones(800, 16)}, "1 tensor (output.weight) is missing of 2"),
        ({"tok_embeddings.weight": torch.ones(()), "output.weight": torch.ones(400, 32)}, "has shape []"),
        ({}, "holds no state dict"),
    ],
)
def test_a_file_without_a_state_dict_is_named(
    models: Models, capsys: pytest.CaptureFixture[str], content: object, named: str
) -> None:
    folder = models("meta")
    torch.save(content, folder / "consolidated.01.pth")
    torch.save(content, folder / "consolidated.00.pth")
    refuse(folder, capsys, str(folder), named)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


def test_wrong_tensors_are_named(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    folder = models("hf")
    change_tensors(folder, lambda state: state.update({UP: torch.ones(96, 32)}))
    refuse(folder, capsys, f"tensor {UP} has shape [96, 32], config.json implies [88, 32]")
    change_tensors(folder, lambda state: (state.pop(UP), state.pop(NORM)))
    refuse(folder, capsys, f"2 tensors ({UP}, {NORM}) are missing of 30")
    change_tensors(folder, lambda state: state.update({UP: torch.ones(88, 32), NORM: torch.ones(32)}))
    change_tensors(folder, lambda state: state.update({f"lora.{i}": torch.ones(1) for i in range(5)}))
    refuse(folder, capsys, "5 tensors (lora.0, lora.1, lora.2, ...) are unknown to a LLaMA")
    change_tensors(folder, lambda state: [state.pop(f"lora.{i}") for i in range(5)])
    change_tensors(folder, lambda state: state.update({UP: torch.ones(88, 32, dtype=torch.int8)}))
    refuse(folder, capsys, f"tensor {UP} has dtype I8")
    change_tensors(folder, lambda state: state.update({n: t.double() for n, t in state.items()}))
    refuse(folder, capsys, "its weights are float64, not one of fp32, bf16, fp16")


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "cannot be read as JSON"),
        ('{"metadata": {}}', "no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "puts a into '../model.safetensors'"),
        ('{"weight_map": {"a": "all.safetensors"}}', "all.safetensors: 1 tensor (a) is missing of 1"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "cannot be read (No such file"),
    ],
)
def test_a_bad_index_is_named(models: Models, capsys: pytest.CaptureFixture[str], index: str, named: str) -> None:
    folder = models("hf")
    (folder / "model.safetensors").rename(folder / "all.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    refuse(folder, capsys, str(folder), named)


def test_a_folder_of_an_unknown_format_is_named(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    refuse(
        tmp_path / "empty",
        capsys,
        f"{tmp_path}/empty: contains none of llama_ds.json, latest, config.json, "
        "params.json or consolidated.NN.pth, latest_checkpointed_iteration.txt",
    )
    refuse(tmp_path / "nowhere", capsys, f"{tmp_path}/nowhere: no such folder")
    (tmp_path / "loop").symlink_to("loop")
    refuse(tmp_path / "loop", capsys, "a link to nothing or to itself")
    both = models("hf")
    for file in models("meta").iterdir():
        shutil.copy(file, both)
    refuse(both, capsys, "contains config.json (hf) and params.json or consolidated.NN.pth (meta)", "--from")
    assert convert.main([str(both), str(tmp_path / "x"), "--from", "meta", "--to", "hf", "--no-logits"]) == 0
    refuse(tmp_path / "meta", capsys, "config.json: cannot be read (No such file", words=("--from", "hf"))
    refuse(tmp_path / "hf", capsys, "no complete checkpoint", words=("--from", "deepspeed"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--to", "meta", "--tp", "3"], "--tp 3 does not divide num_attention_heads = 4", ),
        (["--to", "deepspeed", "--tp", "4"], "--tp 4 does not divide num_key_value_heads = 2"),
        (["--to", "meta", "--tp", "2", "--vocab-size", "801"], "--tp 2 does not divide vocab_size = 801"),
        (["--to", "deepspeed", "--tp", "0"], "--tp: '0' is not a whole number of 1"),
        (["--to", "deepspeed", "--pp", "4"], "--pp 4 is not in 1..3"),
        (["--to", "hf", "--tp", "2"], "leave them out for hf"),
        (["--to", "meta", "--pp", "2"], "leave it out for meta"),
        (["--to", "hf", "--vocab-size", "0"], "--vocab-size: '0' is not a whole number of 1"),
        (["--to", "hf", "--workers", "0"], "--workers: '0' is not a whole number from 1 to 4096"),
    ],
)  # fmt: skip
def test_an_invalid_number_on_the_command_line_is_named(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    source = models("hf")
    capsys.readouterr()
    assert convert.main([str(source), str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    if "use" in error:
        assert error.endswith("use 1 or 2\n") or error.endswith("use 1\n")
    assert not list(tmp_path.glob("out*"))


def test_a_tensor_beyond_the_range_of_fp16_is_named(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = models("hf")
    change_tensors(folder, lambda state: state[UP].__setitem__((3, 3), 1e5))
    assert convert.main([str(folder), str(tmp_path / "out"), "--to", "meta", "--dtype", "fp16"]) == 2
    assert "layers.1.feed_forward.w3.weight: holds numbers above 65504" in capsys.readouterr().err
    assert convert.main([str(folder), str(tmp_path / "more"), "--to", "meta", "--dtype", "bf16", "--no-logits"]) == 0
