"""A model converted through all formats comes back bit for bit, and every conversion reports its verification."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM
from written_ranks import SHAPES, Write, build

from llama_ds.checkpoint.formats import huggingface
from llama_ds.checkpoint.formats.meta_params import Unsaid
from llama_ds.checkpoint.load_model import load_model, open_model
from llama_ds.checkpoint.manifest import describe, verify
from llama_ds.checkpoint.weights import ModelFiles
from llama_ds.config.schema import RunConfig
from llama_ds.layout.weights import weight_shapes
from tools import convert

# Every direction once: each result is the source of the next conversion.
CHAIN = (
    *(("hf", 1), ("meta", 2), ("deepspeed", 1), ("deepspeed", 2), ("meta", 1), ("meta", 2), ("hf", 1), ("hf", 1)),
    ("deepspeed", 2),
)


def bits(files: ModelFiles) -> dict[tuple[int, str], torch.Tensor]:
    kind = {2: torch.int16, 4: torch.int32}
    return {key: t.whole().view(kind[t.dtype.itemsize]) for key, t in files.tensors.items()}


def convert_quickly(*words: object) -> int:
    return convert.main([str(word) for word in words] + ["--no-logits"])


def test_the_initializer_range_is_preserved(write: Write, tmp_path: Path) -> None:
    """Otherwise transformers would initialize new weights, as for a larger vocabulary, differently from the run."""
    source: object = write(1, by_layer=True)
    for turn, kind in enumerate(("hf", "deepspeed", "deepspeed", "hf")):
        assert convert_quickly(source, source := tmp_path / str(turn), "--to", kind) == 0
        assert open_model(str(source)).initializer_range == 0.1
    assert json.loads((tmp_path / "3" / "config.json").read_text())["initializer_range"] == 0.1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_all_directions_keep_every_bit(
    write: Write, run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 60_000)  # several files
    source = write(2, by_layer=name != "mha", dtype=dtype, model=SHAPES[name])
    model = build(replace(run, model=SHAPES[name])).to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype]))
    expected = bits(open_model(source))
    for (layer, local), tensor in expected.items():
        weight = model.layers[layer].state_dict()[local]
        assert torch.equal(weight.view(tensor.dtype), tensor)
    assert expected.keys() == weight_shapes(SHAPES[name]).keys()
    for turn, (kind, tp) in enumerate(CHAIN):
        result = tmp_path / f"{turn}-{kind}"
        assert convert_quickly(source, result, "--to", kind, "--tp", tp) == 0
        files = open_model(str(result))
        assert files.model == SHAPES[name] and files.dtype == dtype
        found = bits(files)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        assert not (tmp_path / f"{turn}-{kind}.partial").exists()
        source = str(result)
    for turn in (6, 7):  # these conversions have different sources
        for file in (f for f in os.listdir(tmp_path / "0-hf") if f.endswith((".safetensors", "index.json"))):
            assert (tmp_path / f"{turn}-hf" / file).read_bytes() == (tmp_path / "0-hf" / file).read_bytes()


@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_no_format_shows_the_padding_of_the_vocabulary(write: Write, tmp_path: Path, name: str) -> None:
    """Parts that DeepSpeed and Megatron-LM load are padded with zeros; models have the rows that the user wrote."""
    model = replace(SHAPES[name], vocab_size=801)
    source = write(2, by_layer=True, model=model)
    expected = bits(open_model(source))
    assert expected[0, "weight"].shape == (801, 32) and expected[0, "weight"][800].any()
    chain = (("deepspeed", 1), ("deepspeed", 2), ("hf", 1), ("megatron", 2), ("deepspeed", 2), ("meta", 1))
    for turn, (kind, tp) in enumerate(chain):
        result = tmp_path / f"{turn}-{kind}"
        assert convert_quickly(source, result, "--to", kind, "--tp", tp) == 0
        found = bits(open_model(str(result), unsaid=Unsaid(seq_len=32) if kind == "meta" else None))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        source = str(result)
    for folder in ("1-deepspeed", "4-deepspeed"):
        last = torch.load(tmp_path / folder / "layer_00-model_01-model_states.pt", weights_only=True)["weight"]
        assert last.shape == (401, 32) and last[399].any() and not last[400].any()
    assert LlamaForCausalLM.from_pretrained(tmp_path / "2-hf").model.embed_tokens.weight.shape == (801, 32)


@pytest.mark.parametrize("kind", ["deepspeed", "hf", "meta"])
def test_the_proof_is_printed(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    assert convert.main([write(2, True, model=SHAPES["llama3"]), str(tmp_path / "out"), "--to", kind]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("dropped, ")]
    first, tensors, source, result, logits = lines
    assert first.startswith(f"{tmp_path / 'out'}: {kind}, fp32, ")
    assert tensors.startswith("proof   tensors 30 of 30, ")
    assert source.split()[-1] == result.split()[-1] and len(source.split()[-1]) == 32
    difference, largest = (float(logits.split()[i]) for i in (5, 7))
    assert largest > 1
    # The project's model gives equal bits for both; transformers sums in another order.
    assert difference == 0 if kind != "hf" else difference < 1e-5


def test_a_checkpoint_keeps_the_description_of_its_run(write: Write, tmp_path: Path) -> None:
    source, out = write(2, True, model=SHAPES["gqa"]), str(tmp_path / "start")
    assert convert_quickly(source, out, "--to", "deepspeed", "--tp", 2, "--pp", 3) == 0
    before, after = describe(f"{source}/checkpoints/step_00000007"), describe(out)
    assert (after.step, after.tokens, after.run, after.config_hash) == (7, 896, before.run, before.config_hash)
    assert after.optimizer_steps is None and (after.layout["pp"], after.layout["tp"]) == (3, 2)
    verify(out, after, after.files)
    assert {*after.files, "llama_ds.json"} == set(os.listdir(out))
    assert sorted(n for n in os.listdir(out) if n.startswith("mp_rank")) == [
        f"mp_rank_{i:02d}_model_states.pt" for i in range(6)
    ]


def test_another_format_has_no_run_to_keep(write: Write, tmp_path: Path) -> None:
    assert convert_quickly(write(1, True), tmp_path / "hf", "--to", "hf") == 0
    assert convert_quickly(tmp_path / "hf", tmp_path / "start", "--to", "deepspeed") == 0
    found = describe(str(tmp_path / "start"))
    assert (found.step, found.tokens, found.run["data"]) == (0, 0, {"seq_len": 32})
    assert (tmp_path / "start" / "tokenizer.model").exists()


def test_every_rank_has_a_copy_of_replicated_weights(write: Write, tmp_path: Path) -> None:
    """Our readers use one copy, but each rank of DeepSpeed and of Meta's code reads its own."""
    source = write(1, True, model=SHAPES["gqa"])
    assert convert_quickly(source, tmp_path / "start", "--to", "deepspeed", "--tp", 2) == 0
    assert convert_quickly(source, tmp_path / "meta", "--to", "meta", "--tp", 2) == 0
    norms = [
        torch.load(tmp_path / "start" / f"layer_02-model_{rank:02d}-model_states.pt", weights_only=True)
        for rank in range(2)
    ]
    name = "input_layernorm.weight"
    assert torch.equal(norms[0][name], norms[1][name]) and norms[0][name].abs().min() > 0
    parts = [torch.load(tmp_path / "meta" / f"consolidated.{i:02d}.pth", weights_only=True) for i in range(2)]
    assert torch.equal(parts[0]["norm.weight"], parts[1]["norm.weight"]) and parts[0]["norm.weight"].abs().min() > 0


@pytest.mark.parametrize(("source", "target"), [("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "fp32"), ("bf16", "fp16")])
def test_dtypes_are_rounded_as_torch_does(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, target: str
) -> None:
    checkpoint = write(1, True, dtype=source)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[target]
    # A narrower dtype changes the logits; the difference is printed and is no error.
    assert convert.main([checkpoint, str(tmp_path / "start"), "--to", "deepspeed", "--dtype", target]) == 0
    difference = float(capsys.readouterr().out.splitlines()[-1].split()[5])
    assert (difference > 0) == (target != "fp32")  # fp16 has a smaller range than bf16, so it also loses values
    before, after = open_model(checkpoint), open_model(str(tmp_path / "start"))
    assert after.dtype == target
    for key, tensor in before.tensors.items():
        assert torch.equal(after.tensors[key].whole(), tensor.whole().to(kind))


@pytest.mark.parametrize("kind", ["deepspeed", "hf", "meta"])
@pytest.mark.parametrize("rows", [832, 790])
def test_the_vocabulary_is_padded_or_cut(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, rows: int
) -> None:
    source = write(1, True, model=SHAPES["gqa"])
    first = tmp_path / "first"
    assert convert_quickly(source, first, "--to", kind) == 0
    capsys.readouterr()
    last = tmp_path / "last"
    assert convert.main([str(first), str(last), "--to", "deepspeed", "--tp", "2", "--vocab-size", str(rows)]) == 0
    change = "32 rows of zeros added" if rows == 832 else "the last 10 rows removed"
    assert f"vocabulary: 800 -> {rows} rows, {change}" in capsys.readouterr().out
    before, after = open_model(source), open_model(str(last))
    assert after.model.vocab_size == rows == describe(str(last)).run["model"]["vocab_size"]
    for key in ((0, "weight"), (5, "lm_head.weight")):
        found, wanted = after.tensors[key].whole(), before.tensors[key].whole()
        both = min(rows, 800)
        assert found.shape[0] == rows and torch.equal(found[:both], wanted[:both]) and not found[both:].any()
    assert load_model(after, torch.device("cpu"), torch.float32)(torch.zeros(1, 4, dtype=torch.long)).shape[-1] == rows


def test_ids_and_tokenizer_files_of_a_hugging_face_model_are_kept(write: Write, tmp_path: Path) -> None:
    assert convert_quickly(write(1, True), tmp_path / "hf", "--to", "hf") == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config |= {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    assert convert_quickly(tmp_path / "hf", tmp_path / "copy", "--to", "hf", "--dtype", "bf16") == 0
    found = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert found == {**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_a_tokenizer_json_goes_with_its_model_through_every_format(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_quickly(write(1, True, model=SHAPES["mha"]), tmp_path / "hf", "--to", "hf") == 0
    (tmp_path / "hf" / "tokenizer.model").unlink()
    wanted = {name: (tmp_path / "hf" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    for source, kind in (("hf", "deepspeed"), ("deepspeed", "meta"), ("meta", "hf")):
        result = tmp_path / ("back" if kind == "hf" else kind)
        assert convert_quickly(tmp_path / source, result, "--to", kind) == 0
        assert (result / "tokenizer.json").read_bytes() == wanted["tokenizer.json"]
        assert json.loads((result / "tokenizer_config.json").read_text()) == json.loads(wanted["tokenizer_config.json"])
        assert not (result / "tokenizer.model").exists()
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "back" / name).read_text())
        assert (ids["bos_token_id"], ids["eos_token_id"]) == (1, 2)
    assert "no tokenizer was written" not in capsys.readouterr().out


def test_a_model_without_a_tokenizer_says_so(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_quickly(write(1, True, model=SHAPES["mha"]), tmp_path / "hf", "--to", "hf") == 0
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / "hf" / name).unlink()
    assert convert_quickly(tmp_path / "hf", tmp_path / "meta", "--to", "meta") == 0
    wanted = f"no tokenizer was written: {tmp_path / 'hf'} has no tokenizer.model or tokenizer.json"
    assert wanted in capsys.readouterr().out
    assert convert_quickly(tmp_path / "meta", tmp_path / "back", "--to", "hf") == 0
    assert not list((tmp_path / "back").glob("tokenizer*"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] is None  # nothing names it
