"""llama_ds's tasks in the data benchmark, each in a fresh process: `python -m llama_ds.benchmarks.data.probe REQUEST`.

Shapes: b rows of a micro-batch, T seq_len; a batch is (b, T + 1).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sized
from multiprocessing import get_context
from typing import Any

import numpy as np

from llama_ds.benchmarks.data.rivals import Request, Stopwatch, memory, run, time_opening, time_passes


def bare_encode(request: Request) -> dict[str, Any]:
    """Encode texts with bare calls of the library of the tokenizer's kind."""
    encode = _library(request["tokenizer"])
    with open(request["texts"], encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    clock = Stopwatch()
    ids = _sum_over_workers(lambda part: _encode(encode, part), texts, request["workers"])
    return {**clock.read(), "ids": ids, "peak_bytes": memory("VmHWM")}


def _library(path: str) -> Callable[[str], Sized]:
    from llama_ds.data.text.sentencepiece_model import SentencepieceModel
    from llama_ds.data.text.tiktoken_ranks import TiktokenRanks
    from llama_ds.data.text.tokenizer import Tokenizer

    vocabulary: Any = Tokenizer(path).vocabulary
    if isinstance(vocabulary, SentencepieceModel):
        return vocabulary._model.encode
    if isinstance(vocabulary, TiktokenRanks):
        return vocabulary._encoding.encode_ordinary
    return lambda text: vocabulary._tokenizer.encode(text, add_special_tokens=False).ids


def _encode(encode: Callable[[str], Sized], texts: list[str]) -> int:
    ids = 0
    for text in texts:
        ids += len(encode(text))
    return ids


def _sum_over_workers(work: Callable[[list[str]], int], texts: list[str], workers: int) -> int:
    """Return the sum of `work` over `workers` forked processes with a part of the texts each; 1: this process."""
    if workers == 1:
        return work(texts)
    context = get_context("fork")
    results = context.SimpleQueue()
    parts = [texts[worker::workers] for worker in range(workers)]
    processes = [context.Process(target=lambda part=part: results.put(work(part))) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"an encoder process ended with exit code {process.exitcode}")
    return sum(results.get() for _ in processes)


def build(request: Request) -> dict[str, Any]:
    """Build a source from a JSON Lines file on disk to shards, checksums and manifest on disk."""
    from llama_ds.data.building.build import build_source
    from llama_ds.data.text.tokenizer import Tokenizer

    out = os.path.join(request["folder"], str(os.getpid()))
    clock = Stopwatch()
    manifest = build_source(
        "built", request["texts"], request["tokenizer"], out, request["seq_len"], request["validation_fraction"],
        workers=request["workers"],
    )  # fmt: skip
    read = clock.read()
    marks = Tokenizer(request["tokenizer"]).marks.count
    ids = sum(split.ids - marks * split.documents for split in manifest.splits.values())  # without bos and eos
    return {**read, "ids": ids, "peak_bytes": memory("VmHWM")}


def read_reader(request: Request) -> dict[str, Any]:
    """Read micro-batches as training does: Order, checked shards, Reader.batches()."""
    from llama_ds.config.run_file import load_run
    from llama_ds.data.stream import Reader, open_data

    data = open_data(load_run(request["run"]))
    share, epoch = (0, 1, request["micro_batch"]), request["steps"]
    reader, clock = Reader(data, range(0), *share), Stopwatch()
    if bad := reader.find_bad(0, epoch):  # a pass needs every shard
        raise AssertionError(f"damaged: {bad}")
    check = clock.read()
    reader.close()
    passed = iter(range(request["passes"] + 1))

    def batches() -> Iterator[np.ndarray]:
        first = next(passed) * epoch
        reader = Reader(data, range(first, first + epoch), *share)  # the files of the sources stay open
        yield from reader.batches()
        reader.close()

    found = time_passes(batches, request["passes"])
    source = data.sources.train[0]
    size = sum(source.shard_bytes(shard) for shard in range(source.geometry.shards))
    return {**found, "check": {**check, "bytes": size}}


def read_source(request: Request) -> dict[str, Any]:
    """Read the same rows in the same order with Source.read, unconverted, as stored in the shards."""
    from llama_ds.config.run_file import load_run
    from llama_ds.data.stream import open_data

    data, b = open_data(load_run(request["run"])), request["micro_batch"]
    source = data.sources.train[0]

    def batches() -> Iterator[np.ndarray]:
        for step in range(request["steps"]):
            rows = data.order.at(step).row
            for start in range(0, len(rows), b):
                yield source.read(rows[start : start + b])

    return time_passes(batches, request["passes"])


def open_manifest(request: Request) -> dict[str, Any]:
    """Open a run and compute the rows and checksums that its first step needs; no shard is read."""
    from llama_ds.config.run_file import load_run
    from llama_ds.data.stream import Reader, open_data

    def first_step() -> None:
        data = open_data(load_run(request["run"]))
        reader = Reader(data, range(request["steps"]), 0, 1, request["micro_batch"])
        _look_up_checksums(data, data.order.at(0))
        reader.close()

    return time_opening(request["began"], memory("VmRSS"), first_step)


def resume(request: Request) -> dict[str, Any]:
    """Resume one data-parallel rank in mid-run; return times since the process start, and memory."""
    from llama_ds.config.run_file import load_run
    from llama_ds.data.mixture import state_from_json
    from llama_ds.data.stream import open_data

    began, step, share = request["began"], request["step"], (request["dp_rank"], request["dp"])
    imported = {"imported_s": time.monotonic() - began, "imported_bytes": memory("VmRSS")}
    run_ = load_run(request["run"], request["overrides"])
    with open(request["state"], encoding="utf-8") as file:
        past = state_from_json(json.load(file), request["state"])
    data = open_data(run_, past, step, request["state"])
    fingerprint = data.fingerprint
    opened_s = time.monotonic() - began
    first = data.order.at(step, *share)
    _look_up_checksums(data, first)
    resumed = {"opened_s": opened_s, "resumed_s": time.monotonic() - began, "resumed_bytes": memory("VmHWM")}
    clock, rows = Stopwatch(), 0
    while rows < request["rows"]:
        step += 1
        rows += len(data.order.at(step, *share).row)
    return {
        **imported, **resumed, "next_rows": rows, "next_rows_s": clock.read()["seconds"],
        "peak_bytes": memory("VmHWM"), "first_row": int(first.row[0]), "fingerprint": fingerprint,
    }  # fmt: skip


def _look_up_checksums(data: Any, rows: Any) -> None:
    """Look up the checksums of the shards with `rows`; a real step would then fetch and check these shards."""
    from llama_ds.data.source.manifest import checksum_of, checksums_name

    for index in np.unique(rows.source).tolist():
        source = data.sources.train[index]
        shards, _ = source.geometry.locate(rows.row[rows.source == index])
        for shard in np.unique(shards).tolist():
            if checksum_of(source.store.read(checksums_name("train", shard)), "train", shard) is None:
                raise AssertionError(f"{source.store.location}: no checksum of shard {shard}")


TASKS = (bare_encode, build, read_reader, read_source, open_manifest, resume)

if __name__ == "__main__":
    sys.exit(run(TASKS, sys.argv[1]))
