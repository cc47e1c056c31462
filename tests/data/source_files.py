"""Corpora for builds, and built sources read back with only tarfile and numpy."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_ds.data.source.documents_index import IndexedDocument, parse_documents
from llama_ds.data.source.manifest import Manifest, parse_manifest

SHARDS_TOOL = Path(__file__).resolve().parents[2] / "tools" / "shards.py"


def write_lines(path: Path, texts: Sequence[str], padding: int = 0) -> Path:
    """Write JSON lines with `padding` ignored bytes each, so that little text makes several parts."""
    records = [{"id": "-" * padding, "text": text} for text in texts]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def write_megatron(path: Path, documents: Sequence[Sequence[int]], dtype: str, code: int) -> None:
    """Write NAME.bin and NAME.idx as Megatron-LM's IndexedDatasetBuilder does, with one sequence for each document."""
    ids = [np.array(document, dtype) for document in documents]
    path.write_bytes(b"".join(document.tobytes() for document in ids))
    lengths = np.array([len(document) for document in ids], "<i4")
    offsets = np.cumsum([0, *(document.nbytes for document in ids)][:-1], dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(ids), len(ids) + 1)
    indices = np.arange(len(ids) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + indices.tobytes())


def manifest_of(folder: Path) -> Manifest:
    return parse_manifest((folder / "manifest.json").read_bytes(), str(folder))


def shard_rows(path: Path) -> np.ndarray:
    """Return the rows of a shard of 16-bit ids."""
    with tarfile.open(path) as tar:
        return np.stack([np.frombuffer(tar.extractfile(member).read(), "<u2") for member in tar])  # type: ignore[union-attr]


def streams(folder: Path, split: str) -> list[np.ndarray]:
    """Return the ids of each extent, from all rows of all its shards, without the padding."""
    found, shard = [], 0
    part = manifest_of(folder).splits[split]
    for extent, shards in zip(part.extents, part.extent_shards, strict=True):
        rows = np.concatenate([shard_rows(folder / f"{split}-{shard + i:06d}.tar") for i in range(shards)])
        assert len(rows) == extent.rows
        ids = np.concatenate([rows[:1, 0], rows[:, 1:].ravel()])
        assert (rows[1:, 0] == rows[:-1, -1]).all() and (ids[extent.ids :] == 2).all()  # padded with eos
        found.append(ids[: extent.ids])
        shard += shards
    return found


def index_of(folder: Path, split: str, shard: int) -> list[IndexedDocument]:
    path = folder / "index" / f"{split}-{shard:06d}.documents.gz"
    return parse_documents(path.read_bytes(), str(path))


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start_build(*args: object) -> subprocess.Popen[str]:
    """Start tools/shards.py build in a process group of its own."""
    command = [sys.executable, str(SHARDS_TOOL), "build", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(build: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a build; return its exit status and its stderr."""
    _, errors = build.communicate(timeout=120)
    return build.returncode, errors
