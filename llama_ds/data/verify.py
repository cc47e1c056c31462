"""Verifying a source: every checksum, and every row read with webdataset itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator

import numpy as np

from llama_ds.data.shards import Manifest, Shard, Source, member_name, read_manifest
from llama_ds.errors import UserError


def verify_source(folder: str, progress: Callable[[int], None] = lambda rows: None) -> Manifest:
    """Check all shards of the source in `folder`; `progress` is called with the rows of each shard.

    Raises:
        UserError: a checksum differs, webdataset reads other rows than the reader, or an id is outside the vocabulary.
    """
    manifest = read_manifest(folder)
    for name, split in manifest.splits.items():
        source, first = Source(folder, manifest, name), 0
        for shard, block in zip(split.shards, source.blocks(), strict=True):
            _check_checksum(os.path.join(folder, shard.name), shard)
            _check_rows(os.path.join(folder, shard.name), manifest, block, first)
            first += shard.rows
            progress(shard.rows)
    return manifest


def read_with_webdataset(path: str, extension: str) -> Iterator[tuple[str, bytes]]:
    """Yield (key, content) of the samples that plain webdataset finds in one shard."""
    from webdataset import WebDataset  # here: it imports torch, which readers do without

    for sample in WebDataset(path, shardshuffle=False):
        yield sample["__key__"], sample.get(extension, b"")


def _check_checksum(path: str, shard: Shard) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != shard.sha256:
        raise UserError(
            f"{path}: sha256 is {digest.hexdigest()[:12]}, its manifest says {shard.sha256[:12]}; "
            "the shard was changed, copy it again or rebuild the source with tools/shards.py build"
        )


def _check_rows(path: str, manifest: Manifest, block: np.ndarray, first: int) -> None:
    dtype, seen = np.dtype(manifest.dtype), 0
    _, extension = member_name(0, dtype)
    for key, content in read_with_webdataset(path, extension):
        if seen == len(block) or key != member_name(first + seen, dtype)[0] or content != block[seen].tobytes():
            raise UserError(f"{path}: sample {key} is not row {first + seen} of its manifest; rebuild the source")
        seen += 1
    if seen != len(block):
        raise UserError(f"{path}: webdataset finds {seen} rows, its manifest says {len(block)}; rebuild the source")
    if int(block.max()) >= manifest.vocab_size:
        raise UserError(f"{path}: holds id {block.max()}, outside vocab_size {manifest.vocab_size}; rebuild the source")
