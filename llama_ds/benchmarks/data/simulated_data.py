"""Generates sources, run files and texts for the benchmark."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_ds.config.text import dump_yaml
from llama_ds.data.building.packing import id_dtype
from llama_ds.data.source import tar_rows
from llama_ds.data.source.manifest import SPLITS, Extent, Manifest, Split, checksum_blocks, shard_name, write_manifest
from llama_ds.data.text.corpus import documents
from llama_ds.data.text.tokenizer import Tokenizer

NO_SHA256 = "0" * 64  # placeholder checksum for a simulated shard


def gather_texts(patterns: Sequence[str], path: str, limit_mb: float) -> dict[str, int]:
    """Write up to `limit_mb` of the documents in `patterns` to a JSON Lines file; return their number and size."""
    count = size = 0
    with open(path, "w", encoding="utf-8") as file:
        for document in (document for pattern in patterns for document in documents(pattern)):
            if size >= limit_mb * 1e6:
                break
            file.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
            count, size = count + 1, size + len(document.text.encode())
    return {"documents": count, "text_bytes": size}


def write_rows(folder: str, tokenizer: Tokenizer, rows: np.ndarray, rows_per_shard: int) -> None:
    """Write a source with `rows`, (R, seq_len + 1), without the document index, which runs do not read."""
    width, digests = rows.shape[1], []
    os.makedirs(folder)
    for shard, start in enumerate(range(0, len(rows), rows_per_shard)):
        members = tar_rows.members(start, rows[start : start + rows_per_shard])
        size = tar_rows.shard_bytes(len(members), width - 1, rows.dtype)
        content = members.tobytes().ljust(size, b"\0")
        digests.append(hashlib.sha256(content).hexdigest())
        with open(os.path.join(folder, shard_name("train", shard)), "wb") as file:
            file.write(content)
    splits = {"train": _split(len(rows), width - 1, rows_per_shard), "validation": Split(rows_per_shard, ())}
    _write_lists(folder, tokenizer, width - 1, splits, {"train": digests})


def simulate_source(folder: str, tokenizer: Tokenizer, rows: int, rows_per_shard: int, seq_len: int) -> int:
    """Write manifest and checksums, but no shards, of a source of `rows` training rows; return the shard count."""
    os.makedirs(folder)
    splits = {name: _split(rows // (1, 100)[i], seq_len, rows_per_shard) for i, name in enumerate(SPLITS)}
    digests = {name: [NO_SHA256] * split.shards for name, split in splits.items()}
    _write_lists(folder, tokenizer, seq_len, splits, digests)
    return splits["train"].shards


def write_run(
    path: str, tokenizer: Tokenizer, seq_len: int, weights: Mapping[str, float], global_batch: int, **training: Any
) -> str:
    """Write a run file that mixes source folders by weight, with a minimal model; return `path`."""
    sources = [{"name": os.path.basename(source), "path": source, "weight": w} for source, w in weights.items()]
    run = {
        "name": "benchmark",
        "deepspeed": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}},
        "model": {
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 32,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "data": {"tokenizer": tokenizer.path, "seq_len": seq_len, "sources": sources},
        "training": {"global_batch": global_batch, **training},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "parallel": {},
    }
    with open(path, "w", encoding="utf-8") as file:
        file.write(dump_yaml(run))
    return path


def _split(rows: int, seq_len: int, rows_per_shard: int) -> Split:
    return Split(rows_per_shard, (Extent(rows, rows, rows * seq_len + 1),) if rows else ())


def _write_lists(
    folder: str, tokenizer: Tokenizer, seq_len: int, splits: dict[str, Split], digests: dict[str, list[str]]
) -> None:
    os.makedirs(os.path.join(folder, "index"))
    for split, sha256 in digests.items():
        for name, content in checksum_blocks(split, sha256):
            with open(os.path.join(folder, name), "w", encoding="ascii") as file:
                file.write(content)
    dtype = id_dtype(tokenizer.vocab_size).str
    name = os.path.basename(folder)
    write_manifest(folder, Manifest(name, seq_len, tokenizer.vocab_size, dtype, tokenizer.sha256, 0.01, splits))
