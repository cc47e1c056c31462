"""Listing of the sources in a folder, as JSON data and as text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_ds.data.source.manifest import MANIFEST, Manifest
from llama_ds.errors import UserError


def find_sources(path: str) -> list[str]:
    """Return the folders of the sources at `path` or one folder below it, or `path` itself if it is a URL or command.

    Raises:
        UserError: there is no source.
    """
    if "://" in path or path.startswith("pipe:") or os.path.exists(os.path.join(path, MANIFEST)):
        return [path]
    found = sorted(str(file.parent) for file in Path(path).glob(f"*/{MANIFEST}"))
    if not found:
        raise UserError(f"{path}: no {MANIFEST} here or one folder below; build shards with tools/shards.py build")
    return found


def epochs(manifests: Mapping[str, Manifest], rows: int, weights: Mapping[str, float]) -> dict[str, float]:
    """Return the epochs of each source, by name, in a run of `rows` rows; without weights, sources weigh by their rows.

    Raises:
        UserError: the weights name other sources.
    """
    size = {m.source: m.splits["train"].rows for m in manifests.values()}
    if weights and set(weights) != set(size):
        raise UserError(f"--weight names {', '.join(weights)}, the sources are {', '.join(size)}; give each a weight")
    weights = weights or {name: float(n) for name, n in size.items()}
    return {name: rows * weights[name] / sum(weights.values()) / n for name, n in size.items()}


def as_data(folder: str, manifest: Manifest, epochs: float | None) -> dict[str, Any]:
    """Return the description of a source as JSON data."""
    return {
        "folder": folder,
        "source": manifest.source,
        "seq_len": manifest.seq_len,
        "vocab_size": manifest.vocab_size,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "epochs": epochs,
        **{
            name: {
                "rows": split.rows,
                "tokens": split.ids,
                "documents": split.documents,
                "shards": split.shards,
                "bad_shards": list(split.bad),
            }
            for name, split in manifest.splits.items()
        },
    }


def as_line(folder: str, manifest: Manifest, epochs: float | None = None) -> str:
    """Return the description of a source as one line of text."""
    parts = [f"{name} {s.rows} rows, {s.ids} tokens, {s.documents} documents" for name, s in manifest.splits.items()]
    suffix = "" if epochs is None else f", {epochs:.3f} epochs"
    return f"{folder}: seq_len {manifest.seq_len}, vocab {manifest.vocab_size}; " + "; ".join(parts) + suffix
