"""A small tokenizer and its rows, and checkpoints as the ranks of a layout write them."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from written_ranks import MODEL, SEQ_LEN, Write, write_rank

from llama_ds.checkpoint import store
from llama_ds.checkpoint.carried import TOKENIZER
from llama_ds.checkpoint.manifest import Description, write_manifest
from llama_ds.config.run_file import resolved
from llama_ds.config.schema import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from llama_ds.data.building.build import build_source
from llama_ds.data.text.tokenizer import train_tokenizer
from llama_ds.layout.layout import Layout


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
        training=TrainingConfig(4, 10, 10 * 4 * SEQ_LEN, initializer_range=0.1),
        optimizer=OptimizerConfig(lr=1e-3),
        parallel=ParallelConfig(micro_batch=4),
        evaluation=EvaluationConfig(rows=12),
    )


@pytest.fixture
def write(run: RunConfig, tokenizer: str, tmp_path: Path) -> Write:
    def write(
        tp: int,
        by_layer: bool,
        tied: bool = False,
        document_mask: bool = False,
        dtype: str = "fp32",
        model: ModelConfig | None = None,
    ) -> str:
        model = model or replace(run.model, tie_word_embeddings=tied)
        this = replace(run, model=model, data=replace(run.data, document_mask=document_mask))
        folder = tmp_path / "run" / "checkpoints" / store.tag_of(7)
        os.makedirs(folder)
        layout = Layout(tp=tp, micro_batch=4).as_data()
        description = Description(7, 896, 1, dtype, layout, resolved(this), optimizer_steps=7)
        records = [write_rank(this, str(folder), rank, tp, by_layer, dtype) for rank in range(tp)]
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        write_manifest(str(folder), description, records)
        (folder.parent / store.LATEST).write_text(folder.name)
        return str(tmp_path / "run")

    return write
