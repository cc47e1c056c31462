"""Exports and imports have the same logits in transformers and in this project's model."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from written_ranks import SHAPES, Write, build

from llama_ds.checkpoint.formats import huggingface
from llama_ds.checkpoint.load_model import load_model, open_model
from llama_ds.config.schema import RunConfig
from llama_ds.data.text.tokenizer import Tokenizer
from llama_ds.errors import UserError
from tools import convert

CPU = torch.device("cpu")
VARIANTS = ["one file", "shards", "bin", "bin shards", "tied", "tied bin", "llama3", "inv_freq"]
IDS = torch.randint(0, 800, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 50_000])
@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same(
    write: Write, run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, name: str
) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", shard_bytes)
    out = tmp_path / "hf"
    assert convert.main([write(2, True, model=SHAPES[name]), str(out), "--to", "hf", "--no-logits"]) == 0
    files = [file for file in os.listdir(out) if file.endswith(".safetensors")]
    assert len(files) == 1 if shard_bytes > 10**9 else len(files) >= 4
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # Tolerance for fp32 sums of 32 to 112 terms in another order, in three layers; logits are up to 3.
    expected = build(replace(run, model=SHAPES[name]))(IDS)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=0)


def test_the_tokenizer_is_the_runs(write: Write, tokenizer: str, tmp_path: Path) -> None:
    assert convert.main([write(1, True), str(tmp_path / "hf"), "--to", "hf", "--no-logits"]) == 0
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(tokenizer)
    assert theirs("def main(x): return 2048")["input_ids"] == [ours.bos_id, *ours.encode("def main(x): return 2048")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_saves_is_read(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    model = theirs(tmp_path, variant, dtype)
    files = open_model(str(tmp_path / "hf"))
    assert files.dtype == {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    assert all(tensor.dtype == dtype for tensor in files.tensors.values())
    # Both compute in fp32 with the same weights: only the order of sums differs; logits are up to 3.
    found = load_model(files, CPU, torch.float32)(IDS)
    wide = LlamaForCausalLM(model.config).eval().float()  # model.float() would keep rounded rotary frequencies
    wide.load_state_dict(model.state_dict())
    torch.testing.assert_close(found, wide(IDS).logits, atol=1e-5, rtol=0)
    assert found.abs().max() > 1


def theirs(folder: Path, variant: str, dtype: torch.dtype) -> Any:
    """Return a transformers model that is saved in folder/hf; .bin variants have the format of its version 4."""
    torch.manual_seed(1)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
    if variant == "llama3":
        rope |= {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
        rope["original_max_position_embeddings"] = 16
    config = LlamaConfig(
        vocab_size=800, hidden_size=32, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, max_position_embeddings=64, rope_parameters=rope,
        initializer_range=0.2, tie_word_embeddings=variant.startswith("tied"), dtype=dtype,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    shards = "shards" in variant
    model.save_pretrained(folder / "hf", max_shard_size="50KB" if shards else "1GB")
    assert (folder / "hf" / "model.safetensors.index.json").exists() == shards
    if "bin" in variant:
        as_bin(folder / "hf", model, shards)
    if variant == "inv_freq":
        path = folder / "hf" / "model.safetensors"
        more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
        save_file({**load_file(path), **more}, path, metadata={"format": "pt"})
    return model


def as_bin(folder: Path, model: Any, shards: bool) -> None:
    for file in [f for f in folder.iterdir() if ".safetensors" in f.name]:
        file.unlink()
    state = model.state_dict()
    if not shards:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names, where = list(state), {}
    for i, part in enumerate((names[:7], names[7:]), 1):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        where.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_a_config_of_transformers_4_is_read(tmp_path: Path) -> None:
    model = theirs(tmp_path, "llama3", torch.float32)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(config))
    found = load_model(open_model(str(tmp_path / "hf")), CPU, torch.float32)(IDS)
    torch.testing.assert_close(found, model(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mixtral"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "12 tensors (model.layers.0.self_attn.q_proj.bias"),
        ({"mlp_bias": True}, "9 tensors (model.layers.0.mlp.gate_proj.bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_scaling.factor"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters.full_attention: kinds of layers",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "rope_type": "dynamic"}},
            'beside type = "linear"',
        ),
        ({"rms_norm_eps": None}, "rms_norm_eps = None is not"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads = 4"),
        ({"num_hidden_layers": -3}, "num_hidden_layers = -3"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"head_dim": 7}, "head_dim = 7 is odd"),
        ({"hidden_size": 64}, "tensor model.embed_tokens.weight has shape [800, 32], config.json implies [800, 64]"),
        ({"intermediate_size": 96}, "tensor model.layers.0.mlp.gate_proj.weight has shape [88, 32]"),
        ({"num_hidden_layers": 2}, "9 tensors (model.layers.2."),
        ({"num_hidden_layers": 4}, "9 tensors (model.layers.3.input_layernorm.weight, model.layers.3.self_attn"),
        ({"vocab_size": 832}, "has 800 rows, config.json has vocab_size = 832; convert with --vocab-size 800"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
)
def test_an_unsupported_or_inconsistent_config_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    theirs(tmp_path, "one file", torch.float32)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        open_model(str(tmp_path / "hf"))
    assert named in str(error.value) and str(tmp_path / "hf") in str(error.value) and "\n" not in str(error.value)


def test_vocab_size_flag_converts_a_table_with_other_rows(tmp_path: Path) -> None:
    """Fine-tuned models may have tables resized by resize_token_embeddings and an unchanged config.json."""
    theirs(tmp_path, "one file", torch.float32)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 832}))
    for rows in (800, 832):
        words = [str(tmp_path / "hf"), str(tmp_path / str(rows)), "--to", "hf", "--vocab-size", str(rows)]
        assert convert.main(words) == 0
        assert AutoModelForCausalLM.from_pretrained(tmp_path / str(rows)).lm_head.weight.shape == (rows, 32)


def test_a_stored_copy_of_a_tied_head_is_dropped(tmp_path: Path) -> None:
    theirs(tmp_path, "tied", torch.float32)
    path = tmp_path / "hf" / "model.safetensors"
    state = load_file(path)
    assert "lm_head.weight" not in state
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, path)
    assert len(open_model(str(tmp_path / "hf")).tensors) == 29
