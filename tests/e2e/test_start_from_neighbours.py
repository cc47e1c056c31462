"""A run starts from the folder of a model beside LLaMA, as transformers saves it, and its export is that model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import TRAIN, alone, succeed
from tiny_run import VOCAB_SIZE, Corpus, Run
from transformers import AutoConfig, AutoModelForCausalLM

from tools import convert

SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "own"), [("qwen2", {}), ("qwen3", {"head_dim": 16})])
def test_a_run_starts_from_a_folder_of_qwen(
    make_run: Callable[..., Run], corpus: Corpus, tmp_path: Path, kind: str, own: dict[str, int]
) -> None:
    """`model: {from: PATH}` takes biases and norms of heads from the folder; one step at this rate changes 1e-12."""
    torch.manual_seed(1)
    source = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **own))
    with torch.no_grad():
        for name, weight in source.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.add_(torch.randn(weight.shape) * 0.1)  # not the zeros and ones of a new model
    source.save_pretrained(tmp_path / "source")
    shutil.copy(corpus.tokenizer, tmp_path / "source" / "tokenizer.model")
    changes = {"checkpoint.start_from": str(tmp_path / "source"), "checkpoint.stop_at": 1, "optimizer.lr": 1e-12}
    run = make_run(f"from_{kind}", {"model": {"from": str(tmp_path / "source")}, **changes})
    succeed(alone(TRAIN, run.file), run.log)
    assert f"starting from {tmp_path / 'source'}: hf, fp32, fingerprint" in run.log.read_text()
    assert convert.main([str(run.dir), str(tmp_path / "again"), "--to", "hf"]) == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == kind
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert again.keys() == source.state_dict().keys()
    for name, weight in source.state_dict().items():
        torch.testing.assert_close(again[name], weight, atol=1e-11, rtol=0)
