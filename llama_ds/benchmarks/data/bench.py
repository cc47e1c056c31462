"""Definitions shared by all parts of the data benchmark: sizes, file locations and other interpreters."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from llama_ds.data.text.tokenizer import Tokenizer

OURS = "llama_ds"


@dataclass(frozen=True)
class DataBenchSizes:
    """Problem sizes."""

    corpus_mb: float = 30.0
    vocab_size: int = 4096
    validation_fraction: float = 0.01
    seq_len: int = 2048
    rows: int = 16384  # rows read in a pass; a multiple of global_batch and of shards
    shards: int = 8  # number of shards for these rows
    global_batch: int = 256  # rows per step of the run that reads them
    micro_batch: int = 8
    passes: int = 3  # timed passes over the rows in a process
    opened: tuple[int, ...] = (10, 1000, 100_000)  # numbers of shards in the manifests that are opened
    opened_rows_per_shard: int = 16384


QUICK = DataBenchSizes(0.3, 600, 0.0, 64, 512, 4, 64, 8, 1, (10, 1000), 1024)


@dataclass(frozen=True)
class DataBench:
    """A prepared benchmark."""

    folder: str  # output folder
    texts: str  # JSON Lines file
    documents: int
    text_bytes: int
    tokenizer: Tokenizer
    tokenizer_json: str  # the same tokenizer in Hugging Face's format
    sizes: DataBenchSizes
    repeats: int
    streaming_python: str  # interpreter with mosaicml-streaming and optionally datasets; "": none
    versions: dict[str, dict[str, str]]  # package versions "here" and of "streaming_python"
    tick: Callable[[str], object] = lambda name: None  # called with the name of the next measurement

    def path(self, *names: str) -> str:
        """Return the path of a file of the benchmark."""
        return os.path.join(self.folder, *names)

    def other_has(self, package: str) -> bool:
        """Return whether `streaming_python` has a package."""
        return bool(self.versions.get("streaming_python", {}).get(package))
