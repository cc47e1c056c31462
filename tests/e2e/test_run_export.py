"""An exported checkpoint is the trained model: transformers finds the validation loss that training wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import LAYOUTS, Run

from llama_ds.config.run_file import load_run
from llama_ds.data.sources import open_sources
from tools import convert


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_transformers_finds_the_same_loss(name: str, trained: Callable[[str], Run], tmp_path: Path) -> None:
    run = trained(name)
    assert (
        convert.main([str(run.newest), str(tmp_path / "hf"), "--from", "deepspeed", "--to", "hf", "--no-logits"]) == 0
    )
    # bf16: the same weights, but transformers rounds between other operations (arithmetic of 8 bits, 768 labels).
    tolerance = 1e-3 if name == "bf16" else 1e-5
    assert loss_by_transformers(run, tmp_path / "hf") == pytest.approx(run.validation_loss, rel=tolerance)


def loss_by_transformers(run: Run, folder: Path) -> float:
    """Return the mean loss of an exported model on the run's validation rows, nats per token."""
    from transformers import AutoModelForCausalLM

    config = load_run(str(run.file))
    data = open_sources(config.data, config.model.vocab_size)
    rows = torch.from_numpy(data.validation_rows(config.evaluation.rows))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == (torch.bfloat16 if config.deepspeed["bf16"]["enabled"] else torch.float32)
    assert model.config.tie_word_embeddings == config.model.tie_word_embeddings
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits  # (rows, T, V)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten()).item()
