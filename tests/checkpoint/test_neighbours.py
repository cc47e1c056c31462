"""Models beside plain LLaMA, in transformers' terms Llama with biases, Qwen2 and Qwen3, and other rotary scalings:
converted in both directions without a difference, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from written_ranks import MODEL, NEIGHBOURS, Write, build

from llama_ds.benchmarks.generation import load
from llama_ds.checkpoint.formats.hf_config import hf_config
from llama_ds.checkpoint.load_model import load_model, open_model
from llama_ds.config.schema import ModelConfig, RunConfig
from llama_ds.errors import UserError
from tools import convert

CPU = torch.device("cpu")
IDS = torch.randint(0, 800, (2, 32), generator=torch.Generator().manual_seed(3))
BASE: dict[str, Any] = {
    "vocab_size": 800, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "rms_norm_eps": 1e-6,
}  # fmt: skip
PUBLISHED = {  # the settings in which the config.json of released models differ from LLaMA's
    "Qwen2": BASE | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072,
                     "max_window_layers": 28, "tie_word_embeddings": True},
    "Qwen2.5 yarn": BASE | {"model_type": "qwen2", "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}},
    "Qwen3": BASE | {"model_type": "qwen3", "head_dim": 16, "attention_bias": False, "tie_word_embeddings": True},
    "biases": BASE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "linear": BASE | {"model_type": "llama", "rope_parameters": {
        "rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}},
    "dynamic": BASE | {"model_type": "llama", "max_position_embeddings": 16, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_transformers_computes_the_same_from_an_export(write: Write, run: RunConfig, tmp_path: Path, name: str) -> None:
    """From two tensor-parallel ranks: biases and norms of heads are joined, or taken from one rank."""
    model = NEIGHBOURS[name]
    out = tmp_path / "hf"
    source = write(2, True, model=model)
    assert convert.main([source, str(out), "--to", "hf", "--no-logits"]) == 0
    theirs, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = build(replace(run, model=model))(IDS)
    torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-5, rtol=0)  # fp32 sums in another order
    _, generating = load(source, None)  # as tools/generate.py does, without an export
    torch.testing.assert_close(generating(IDS).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_of_transformers_comes_back_the_same(tmp_path: Path, name: str) -> None:
    """hf -> deepspeed with two ranks -> hf: the same bits under the same names, and the same architecture."""
    theirs = saved(tmp_path / "hf", PUBLISHED[name])
    found = load_model(open_model(str(tmp_path / "hf")), CPU, torch.float32)(IDS)
    torch.testing.assert_close(found, theirs(IDS).logits, atol=1e-5, rtol=0)
    middle, back = str(tmp_path / "middle"), tmp_path / "back"
    assert convert.main([str(tmp_path / "hf"), middle, "--to", "deepspeed", "--tp", "2", "--no-logits"]) == 0
    assert convert.main([middle, str(back), "--to", "hf"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", back))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", back)]
    for key in ("architectures", "model_type", "attention_bias", "mlp_bias", "use_sliding_window", "rope_parameters"):
        assert configs[0].get(key) == configs[1].get(key), key


def saved(folder: Path, settings: dict[str, Any]) -> Any:
    """Save a model with random biases and norms in `folder`, as transformers writes it, and return it."""
    torch.manual_seed(1)
    settings = dict(settings)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window = true"),
        (
            "Qwen2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            'layer_types = ["full_attention", "sliding_attention"]',
        ),
        ("Qwen2", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, 'rope_type = "longrope"'),
        ("Qwen2", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "self_attn.k_proj.bias"),
        ("Qwen3", {"model_type": "olmo2"}, 'model_type = "olmo2"'),
        ("Qwen3", {"model_type": "qwen2"}, "self_attn.k_proj.bias"),
        ("biases", {"mlp_bias": False}, "mlp.down_proj.bias"),
        ("linear", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling.factor is missing"),
        ("linear", {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor = 0.5 is below 1"),
    ],
)
def test_another_function_is_refused(tmp_path: Path, name: str, change: dict[str, Any], named: str) -> None:
    saved(tmp_path / "hf", PUBLISHED[name])
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        open_model(str(tmp_path / "hf"))
    assert named in str(error.value) and str(tmp_path / "hf") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_bias": "qkv"}, "model.attention_bias = qkv, Meta's code computes none only"),
        ({"mlp_bias": True}, "model.mlp_bias = true, Meta's code computes false only"),
        ({"qk_norm": True}, "model.qk_norm = true, Meta's code"),
        ({"rope_scaling": NEIGHBOURS["dynamic"].rope_scaling}, "rope_type = dynamic, Meta's code computes llama3 only"),
    ],
)
def test_meta_cannot_express_them(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], named: str
) -> None:
    source = write(1, True, model=replace(MODEL, **{"rope_scaling": None, **change}))
    assert convert.main([source, str(tmp_path / "meta"), "--to", "meta"]) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.glob("meta*"))


@pytest.mark.parametrize(
    "model",
    [
        replace(MODEL, attention_bias="qkv", mlp_bias=True),
        replace(MODEL, attention_bias="qkv", qk_norm=True),
        replace(MODEL, mlp_bias=True, qk_norm=True),
    ],
)
def test_a_combination_that_transformers_does_not_have_is_refused(model: ModelConfig) -> None:
    with pytest.raises(UserError, match=r"no model of transformers has all of these .*; convert to deepspeed"):
        hf_config(model, 32, "float32")


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    """They train, but transformers would not load the export."""
    with pytest.raises(UserError, match=r"hidden_size = 16 is no multiple of model.num_attention_heads = 3"):
        hf_config(
            replace(MODEL, hidden_size=16, num_attention_heads=3, num_key_value_heads=3, head_dim=4), 32, "float32"
        )


def test_dynamic_and_yarn_write_the_length_by_which_transformers_scales() -> None:
    """Version 4 takes yarn's factor from it, and both versions dynamic's original length, whatever rows are trained."""
    assert hf_config(NEIGHBOURS["dynamic"], 4096, "float32")["max_position_embeddings"] == 16
    assert hf_config(NEIGHBOURS["qwen2"], 4096, "float32")["max_position_embeddings"] == 32
    assert hf_config(NEIGHBOURS["llama"], 4096, "float32")["max_position_embeddings"] == 4096
