"""The value of the fixture `built` for the data tests, and runs that read its sources."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.config.text import dump_yaml

SEQ_LEN = 64
VOCAB_SIZE = 600
BATCH = 12


@dataclass(frozen=True)
class Built:
    """Paths of a corpus, a tokenizer and the sources built from them."""

    code: str  # patterns of the documents
    prose: str
    tokenizer: str
    shards: Path


def run_on(built: Built, folder: Path, *overrides: str, **data: Any) -> RunConfig:
    """Return a run of 200 steps on both sources, with its run file in `folder`."""
    sources = [{"name": n, "path": str(built.shards / n), "weight": w} for n, w in (("code", 0.7), ("prose", 0.3))]
    run = {
        "name": "run",
        "seed": 7,
        "output_dir": str(folder),
        "deepspeed": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}},
        "model": {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "data": {"tokenizer": built.tokenizer, "seq_len": SEQ_LEN, "sources": sources, **data},
        "training": {"global_batch": BATCH, "steps": 200},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "parallel": {},
    }
    path = folder / "run.yaml"
    path.write_text(dump_yaml(run))
    return load_run(str(path), overrides)


def with_source(run: RunConfig, index: int, **change: Any) -> RunConfig:
    """Return `run` with one of its sources changed."""
    sources = list(run.data.sources)
    sources[index] = replace(sources[index], **change)
    return replace(run, data=replace(run.data, sources=tuple(sources)))
