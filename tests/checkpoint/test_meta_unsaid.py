"""What Meta's params.json does not say is recognised with certainty, asked for, or stated; it is never invented."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import write_llama3
from transformers import AutoConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from llama_ds.checkpoint.formats.meta_params import SCALING, Unsaid, inner_size, model_of, params_of, seq_len_of
from llama_ds.checkpoint.load_model import open_model
from llama_ds.config.schema import ModelConfig
from llama_ds.errors import UserError
from tools import convert


def run(*words: object) -> int:
    return convert.main([str(word) for word in words] + ["--no-logits"])


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in Meta's format, with a tokenizer of Llama 3's kind and Llama 3's params.json."""
    root = tmp_path_factory.mktemp("llama3")
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    config = LlamaConfig(
        vocab_size=1000, hidden_size=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        rope_parameters=rope,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "hf")
    assert run(root / "hf", root / "meta", "--to", "meta") == 0
    shutil.copy(write_llama3(root / "hf")[0], root / "meta")
    return root / "meta"


def with_params(source: Path, folder: Path, **params: Any) -> Path:
    shutil.copytree(source, folder)
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | params))
    return folder


def test_the_factor_of_the_rotary_scaling_is_asked_for(
    llama3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = with_params(llama3, tmp_path / "meta", use_scaled_rope=True)
    assert run(source, tmp_path / "hf", "--to", "hf") == 2
    error = capsys.readouterr().err
    assert f"{source}/params.json: use_scaled_rope = true" in error and "--rope-factor 8 or 32" in error
    assert run(source, tmp_path / "hf", "--to", "hf", "--rope-factor", 32) == 0
    found = AutoConfig.from_pretrained(tmp_path / "hf")
    assert found.rope_parameters["factor"] == 32.0 and found.max_position_embeddings == 131_072
    source = with_params(source, tmp_path / "said", rope_scaling_factor=16.0, rope_high_freq_factor=2.0)
    assert open_model(str(source)).model.rope_scaling == replace(SCALING, factor=16.0, high_freq_factor=2.0)
    assert run(source, tmp_path / "hf2", "--to", "hf", "--rope-factor", 8) == 2
    assert "rope_scaling_factor = 16.0, not 8; leave --rope-factor out" in capsys.readouterr().err


# params.json as Meta publishes it: (release, params, factor of the scaling, sequence length, whether it is certain)
SIZE7 = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32}
L3 = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500_000.0}
L31 = {**L3, "use_scaled_rope": True}
RELEASES = [
    ("LLaMA 1 7B", {**SIZE7, "norm_eps": 1e-6}, None, 2048, False),
    (
        "LLaMA 1 65B",
        {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5},
        None, 2048, True,
    ),
    ("Llama 2 7B", {**SIZE7, "norm_eps": 1e-5}, None, 4096, False),
    (
        "Llama 2 70B",
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
         "norm_eps": 1e-5},
        None, 4096, True,
    ),
    (
        "Code Llama 7B",
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5,
         "rope_theta": 1e6},
        None, 16_384, True,
    ),
    (
        "Llama 3 8B",
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, **L3},
        None, 8192, True,
    ),
    (
        "Llama 3.1 8B",
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, **L31},
        8.0, 131_072, True,
    ),
    (
        "Llama 3.3 70B",
        {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, **L31},
        8.0, 131_072, True,
    ),
    (
        "Llama 3.1 405B",
        {"dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2, **L31},
        8.0, 131_072, True,
    ),
    (
        "Llama 3.2 1B",
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.5, **L31},
        32.0, 131_072, True,
    ),
    (
        "Llama 3.2 3B",
        {"dim": 3072, "n_layers": 28, "n_heads": 24, "multiple_of": 256, "ffn_dim_multiplier": 1.0, **L31},
        32.0, 131_072, True,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("params", "factor", "length", "certain"), [r[1:] for r in RELEASES], ids=[r[0] for r in RELEASES]
)
def test_a_published_release_is_recognised(params: dict[str, Any], factor: float, length: int, certain: bool) -> None:
    model = model_of("here", params, 32_000, tied=False, unsaid=Unsaid())
    assert (model.rope_scaling.factor if model.rope_scaling else None) == factor
    found, notes = seq_len_of(params, model, Unsaid())
    assert found == length and bool(notes) != certain
    assert seq_len_of(params, model, Unsaid(seq_len=1000)) == (1000, ())
    written = params_of(model, "there")
    assert model_of("there", written, 32_000, tied=False, unsaid=Unsaid()) == model
    # The code of LLaMA 1 and 2 raises TypeError for a key that it does not know.
    assert written.keys() - params.keys() <= {"vocab_size", "rope_scaling_factor", "rope_high_freq_factor"}
    assert inner_size(model.hidden_size, written["multiple_of"], written.get("ffn_dim_multiplier")) == (
        model.intermediate_size
    )


def test_a_factor_that_metas_code_does_not_have_is_written_only_for_metas_own_models(llama3: Path) -> None:
    small = open_model(str(llama3)).model
    scaled: ModelConfig = replace(small, rope_scaling=replace(SCALING, factor=32.0))
    with pytest.raises(UserError, match=r"rope_scaling = \[32.0, 1.0, 4.0, 8192\], Meta's code has"):
        params_of(scaled, "here")


def test_token_ids_are_those_of_the_tokenizer_or_given(
    llama3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(llama3, tmp_path / "base", "--to", "hf") == 0
    assert "token ids: bos 701, eos 702, of tokenizer.model; instruct models end turns with others: --eos-id N N\n" in (
        capsys.readouterr().out
    )
    config, generation = (kind.from_pretrained(tmp_path / "base") for kind in (AutoConfig, GenerationConfig))
    assert (config.bos_token_id, config.eos_token_id) == (701, 702)
    assert (generation.bos_token_id, generation.eos_token_id) == (701, 702)
    assert run(llama3, tmp_path / "ours", "--to", "deepspeed", "--eos-id", 702, 708, 709) == 0
    assert "token ids: bos 701, eos 702, 708, 709, of the command line\n" in capsys.readouterr().out
    assert run(tmp_path / "ours", tmp_path / "chat", "--to", "hf") == 0
    config, generation = (kind.from_pretrained(tmp_path / "chat") for kind in (AutoConfig, GenerationConfig))
    assert (config.bos_token_id, config.eos_token_id) == (701, [702, 708, 709])
    assert (generation.bos_token_id, generation.eos_token_id) == (701, [702, 708, 709])
    assert run(llama3, tmp_path / "none", "--to", "hf", "--eos-id", 1000) == 2
    assert "the id 1000 is not below vocab_size = 1000" in capsys.readouterr().err


def test_without_a_tokenizer_ids_are_left_out(llama3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = with_params(llama3, tmp_path / "meta")
    (source / "tokenizer.model").unlink()
    assert run(source, tmp_path / "hf", "--to", "hf") == 0
    assert f"token ids: none, {source} has no tokenizer that names them: --bos-id N --eos-id N" in (
        capsys.readouterr().out
    )
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    assert run(source, tmp_path / "given", "--to", "hf", "--bos-id", 5, "--eos-id", 6) == 0
    config = AutoConfig.from_pretrained(tmp_path / "given")
    assert (config.bos_token_id, config.eos_token_id) == (5, 6)


def test_an_assumed_sequence_length_is_printed(
    llama3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = with_params(llama3, tmp_path / "meta", rope_theta=10_000.0)
    assert run(source, tmp_path / "hf", "--to", "hf") == 0
    assert (
        "sequence length: 2048 tokens assumed, as of LLaMA 1, because params.json does not say it (the first files of "
        "Llama 2 had the same norm_eps, and 4096 tokens); another by --seq-len N\n"
    ) in capsys.readouterr().out
    assert run(source, tmp_path / "given", "--to", "hf", "--seq-len", 4096) == 0
    assert "sequence length" not in capsys.readouterr().out
    assert AutoConfig.from_pretrained(tmp_path / "given").max_position_embeddings == 4096
