"""A small tokenizer and its rows, and checkpoints written as the ranks of a layout write them."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from llama_ds.checkpoint import store
from llama_ds.checkpoint.weights import layer_file
from llama_ds.config.layout import Layout
from llama_ds.config.run_file import resolved
from llama_ds.config.schema import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeScaling,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from llama_ds.data.building.build import build_source
from llama_ds.data.text.tokenizer import train_tokenizer
from llama_ds.model.llama import Llama, shared_parts
from llama_ds.model.loss import NextTokenLoss
from llama_ds.model.tensor_parallel import SingleRank

SEQ_LEN = 32
MODEL = ModelConfig(
    vocab_size=800,
    hidden_size=32,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16),
    initializer_range=0.1,
)

Write = Callable[..., str]  # (tp, by_layer, tied=, document_mask=) -> the run's folder


class Rank(SingleRank):
    """One of several tensor-parallel ranks, as far as its weights are concerned."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    modules = Path(sysconfig.get_paths()["stdlib"]) / "json"
    return train_tokenizer([str(modules)], str(tmp_path_factory.mktemp("tokenizer") / "t"), MODEL.vocab_size)


@pytest.fixture(scope="session")
def run(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("shards")
    modules = str(Path(sysconfig.get_paths()["stdlib"]) / "json")
    build_source("code", modules, tokenizer, str(root), SEQ_LEN, 0.3, rows_per_shard=500, document_chars=2000)
    return RunConfig(
        name="small",
        seed=5,
        output_dir="runs",
        model=MODEL,
        data=DataConfig(tokenizer, SEQ_LEN, (SourceConfig("code", str(root / "code"), 1.0),)),
        training=TrainingConfig(4, 10, 10 * 4 * SEQ_LEN),
        optimizer=OptimizerConfig(lr=1e-3),
        parallel=ParallelConfig(micro_batch=4),
        evaluation=EvaluationConfig(rows=12),
    )


def build(run: RunConfig, rank: int = 0, size: int = 1) -> Llama:
    """Return one tensor-parallel rank's model with its initial weights."""
    shared = shared_parts(run, Rank(rank, size), "cpu", torch.float32)
    return Llama(shared, NextTokenLoss(SingleRank()))


@pytest.fixture
def write(run: RunConfig, tokenizer: str, tmp_path: Path) -> Write:
    def write(tp: int, by_layer: bool, tied: bool = False, document_mask: bool = False) -> str:
        this = replace(
            run, model=replace(run.model, tie_word_embeddings=tied), data=replace(run.data, document_mask=document_mask)
        )
        folder = tmp_path / "run" / "checkpoints" / store.tag_of(7)
        os.makedirs(folder)
        for rank in range(tp):
            model = build(this, rank, tp)
            if by_layer:
                for index, layer in enumerate(model.layers):
                    torch.save(layer.state_dict(), layer_file(str(folder), index, rank))
            else:
                torch.save({"module": model.state_dict()}, folder / f"mp_rank_{rank:02d}_model_states.pt")
        layout = asdict(Layout(tp, 1, tp, 1, 4, 1, 4))
        store.commit(str(folder.parent), store.Description(7, 896, 1, "fp32", layout, resolved(this)), tokenizer)
        return str(tmp_path / "run")

    return write
