"""Every published form of config.json and of a model's folder is read as transformers does, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llama_ds.checkpoint.load_model import load_model, open_model
from llama_ds.errors import UserError
from tools import convert

IDS = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(0))
LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# Keys of published files of that name, beside those of LLAMA.
EQUAL: dict[str, dict[str, Any]] = {
    "Llama 1": {"max_sequence_length": 2048, "torch_dtype": "float16", "use_cache": True, "transformers_version": "4"},
    "Llama 2, pretraining_tp": {"num_key_value_heads": 2, "pretraining_tp": 2, "rope_scaling": None},
    "Llama 3.1": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **ROPE}, "eos_token_id": [3, 4, 5]},
    "Llama 3.2": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **ROPE}, "tie_word_embeddings": True},
    "DeepSeek-Coder": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e5},
    "both kinds of rope": {
        "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}, "rope_theta": 1e5,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
    },
    "Yarn-Llama": {"rope_scaling": {"type": "yarn", "finetuned": True, **YARN}},
    "YaRN, mscale": {"rope_scaling": {"mscale": 1.0, "mscale_all_dim": 0.5, **YARN}},
    "head_dim null": {"head_dim": None, "num_key_value_heads": None, "sliding_window": None},
    "Mistral-Nemo": {"head_dim": 16, "partial_rotary_factor": 1.0, "layer_types": ["full_attention"] * 2},
    "Mistral 0.2": {**MISTRAL, "sliding_window": None, "rope_theta": 1e6, "attention_bias": True},
    "swish": {"hidden_act": "swish", "attention_bias": True, "mlp_bias": True},
    "Qwen2.5": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2,
        "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 2,
    },
}  # fmt: skip


def saved(config: dict[str, Any], folder: Path) -> Any:
    """Return a random model of transformers, saved in `folder` beside exactly this config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval().float()
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, 0.9 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return model


@torch.no_grad()
def assert_computes(folder: Path, model: Any) -> None:
    """Tolerance for fp32 sums of 32 to 48 terms in another order, in two layers; logits are up to 8."""
    found = load_model(open_model(str(folder)), dtype=torch.float32, document_mask=False)(IDS)
    torch.testing.assert_close(found, model(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", EQUAL)
def test_a_published_config_computes_as_transformers_does(tmp_path: Path, name: str) -> None:
    assert_computes(tmp_path, saved(LLAMA | EQUAL[name], tmp_path))


def test_a_mistral_goes_on_as_a_llama(tmp_path: Path) -> None:
    model = saved(LLAMA | EQUAL["Mistral 0.2"], tmp_path / "mistral")
    assert convert.main([str(tmp_path / "mistral"), str(tmp_path / "ds"), "--to", "deepspeed", "--no-logits"]) == 0
    assert convert.main([str(tmp_path / "ds"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"], config["attention_bias"]) == ("llama", None, False)
    assert_computes(tmp_path / "hf", model)


OTHER_MODELS = (
    *("mixtral", "gemma2", "phi3", "granite", "olmo2", "stablelm", "falcon", "llama4_text", "smollm3", "internlm2"),
    *("baichuan", "Yi", "minicpm", "exaone4", "nemotron", "cohere", "deepseek_v3", "qwen2_moe", "gpt_neox"),
)
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"model_type": name}, f'model_type = "{name}", this project') for name in OTHER_MODELS),
    *(
        ({"quantization_config": {"quant_method": how}}, rf"quantization_config: .* \({how}\) and cannot be trained")
        for how in ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors")
    ),
    (MISTRAL, r"sliding_window = 4096 \(of Mistral the default"),
    (MISTRAL | {"sliding_window": 32}, "sliding_window = 32"),
    ({"sliding_window": 32}, "sliding_window = 32"),
    ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
    ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, 'rope_type = "ntk"'),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1] * 4}}, 'rope_type = "longrope"'),
    (
        {"rope_theta": 777.0, "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}},
        r"rope_parameters has rope_theta = 12345.0, rope_theta has 777.0, .* remove one",
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        r"rope_parameters has factor = null, rope_scaling has 2.0",
    ),
    ({"num_attention_heads": 0}, "num_attention_heads = 0 is not positive"),
    ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures = "),
    ({"transformers_weights": "other.safetensors"}, r"other\.safetensors: cannot be read"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ({"model_type": None}, "model_type = null"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plain model."""
    folder = tmp_path_factory.mktemp("llama")
    saved(LLAMA, folder)
    return folder


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy of that folder, which a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        open_model(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("change", "named"), REFUSED)
def test_another_model_is_refused_by_name(folder: Path, change: dict[str, Any], named: str) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | change))
    with pytest.raises(UserError, match=named):
        open_model(str(folder))


def split(folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """Make model.safetensors two files with an index; return the tensors of the second, and its path."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: files[index % 2] for index, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()
    return {name: tensors[name] for name in names if where[name] == files[1]}, folder / files[1]


def pointer(folder: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 15000000000\n"
    (folder / "model.safetensors").write_text(text)


def bin_pointer(folder: Path) -> None:
    pointer(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    split(folder)[1].unlink()


def short_shard(folder: Path) -> None:
    tensors, path = split(folder)
    tensors.popitem()
    save_file(tensors, path)


def cut_shard(folder: Path) -> None:
    _, path = split(folder)
    os.truncate(path, path.stat().st_size - 10)


def extra(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "value_head.weight": torch.ones(1, 32)}, folder / "model.safetensors")


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def other_case(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "Model.safetensors")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("weights")


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (pointer, "model.safetensors: is a pointer of git-lfs"),
    (bin_pointer, "pytorch_model.bin: is a pointer of git-lfs"),
    (missing_shard, "model-00002-of-00002.safetensors: cannot be read (No such file"),
    (short_shard, "model-00002-of-00002.safetensors: 1 tensor ("),
    (cut_shard, "model-00002-of-00002.safetensors: tensor "),
    (extra, "1 tensor (value_head.weight) is unknown to a LLaMA"),
    (adapter, "adapter_model.safetensors: belongs to an adapter (PEFT)"),
    (other_case, "contains neither model.safetensors nor pytorch_model.bin"),
    (empty, "contains none of"),
    (a_file, "is a file"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_a_damaged_folder_is_named(folder: Path, damage: Callable[[Path], None], named: str) -> None:
    damage(folder)
    assert named in refusal(folder) and str(folder) in refusal(folder)


def test_a_snapshot_of_the_hubs_cache_is_read(llama: Path, tmp_path: Path) -> None:
    """Its files are relative links to blobs that are named by their hashes; shards of a .bin with an index."""
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    tensors = load_file(llama / "model.safetensors")
    shards = {f"pytorch_model-0000{i}-of-00002.bin": dict(list(tensors.items())[i - 1 :: 2]) for i in (1, 2)}
    for number, (name, part) in enumerate(shards.items()):
        torch.save(part, blobs / f"blob{number}")
        (snapshot / name).symlink_to(f"../../blobs/blob{number}")
    where = {name: file for file, part in shards.items() for name in part}
    for name, text in {"pytorch_model.bin.index.json": json.dumps({"weight_map": where})}.items():
        (blobs / name).write_text(text)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    shutil.copy(llama / "config.json", snapshot)
    found = open_model(str(snapshot))
    assert torch.equal(found.tensors[0, "weight"].whole(), tensors["model.embed_tokens.weight"])
    shutil.rmtree(blobs)
    assert "pytorch_model.bin.index.json: cannot be read (No such file" in refusal(snapshot)
    assert "give the folder of a snapshot" in refusal(repository)
