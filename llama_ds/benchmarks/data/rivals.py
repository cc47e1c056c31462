"""The same work by other libraries: mosaicml-streaming, webdataset, Hugging Face tokenizers and datasets.

This script runs in an interpreter that has them, not necessarily this one, and does not import llama_ds.
`rivals.py REQUEST` executes one request, a JSON object with the name of a task, in a fresh process and prints the
measurement as JSON. The measurements of llama_ds (data/probe.py) use the same timing functions.

Shapes: b rows of a micro-batch, T seq_len; a batch is int32 (b, T + 1).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

PACKAGES = ("mosaicml-streaming", "webdataset", "tokenizers", "datasets", "torch", "numpy")
SHUFFLE_BUFFER = 1000  # rows in webdataset's shuffle buffer
TEXTS_PER_BATCH = 1000  # the default of datasets' map(batched=True)

Request = dict[str, Any]
Batches = Callable[[], Iterable[np.ndarray]]


class Stopwatch:
    """Wall and CPU seconds since its creation; CPU time covers all threads and finished child processes."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_s()

    def read(self) -> dict[str, float]:
        """Return both."""
        return {"seconds": time.perf_counter() - self._wall, "cpu_s": _cpu_s() - self._cpu}


def memory(field: str) -> int:
    """Return memory of this process in bytes: "VmHWM" for the peak, "VmRSS" for the present.

    getrusage's ru_maxrss does not serve: in a fresh process it starts from the parent's memory.
    """
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def digest_of(rows: np.ndarray) -> int:
    """Return a digest of a multiset of rows, independent of their order: a sum of hashes."""
    hashes = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows.astype("<i4"))
    return sum(int.from_bytes(h, "little") for h in hashes) % 2**64


def time_passes(batches: Batches, passes: int) -> dict[str, Any]:
    """Read all batches 1 + `passes` times: the first pass warms up and takes the digest, the others are timed."""
    rows = digest = 0
    for batch in batches():
        rows += len(batch)
        digest = (digest + digest_of(batch)) % 2**64
    timed = []
    for _ in range(passes):
        clock = Stopwatch()
        found = sum(len(batch) for batch in batches())
        timed.append(clock.read())
        if found != rows:
            raise AssertionError(f"a pass read {found} rows, the first pass {rows}")
    return {"rows": rows, "digest": f"{digest:016x}", "passes": timed, "peak_bytes": memory("VmHWM")}


def time_opening(began: float, imported: int, first_batch: Callable[[], object]) -> dict[str, Any]:
    """Time a call that opens a dataset and takes its first batch.

    began: the parent's time.monotonic() before it started this process; imported: memory before the call.
    """
    clock = Stopwatch()
    first_batch()
    return {
        **clock.read(),
        "process_s": time.monotonic() - began,
        "imported_bytes": imported,
        "peak_bytes": memory("VmHWM"),
    }


def stacked(rows: Iterable[np.ndarray], micro_batch: int) -> Iterator[np.ndarray]:
    """Yield rows stacked to micro-batches, as in training."""
    waiting = iter(rows)
    while batch := list(islice(waiting, micro_batch)):
        yield np.stack(batch, dtype=np.int32, casting="same_kind")


def versions(request: Request) -> dict[str, Any]:
    """Return the version of each package, "" if it is not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return {**found, "python": sys.version.split()[0]}


def write_mds(request: Request) -> dict[str, Any]:
    """Write the rows of a .npy file as a dataset of mosaicml-streaming, in about as many shards as `shards`."""
    from streaming import MDSWriter  # type: ignore[import-not-found]

    rows = np.load(request["rows"], mmap_mode="r")
    column = f"ndarray:{rows.dtype.name}:{rows.shape[1]}"  # a fixed shape and dtype decode fastest
    size = -(-len(rows) // request["shards"]) * (rows.shape[1] * rows.itemsize + 4) + 1024
    with MDSWriter(out=request["folder"], columns={"ids": column}, size_limit=size) as out:
        for row in rows:
            out.write({"ids": row})
    return {"shards": sum(name.endswith(".mds") for name in os.listdir(request["folder"]))}


def _mds(request: Request) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(
        local=request["folder"], shuffle=True, shuffle_seed=0, batch_size=request["micro_batch"], num_canonical_nodes=1
    )


def _mds_rows(dataset: Any) -> Iterator[np.ndarray]:
    return (sample["ids"] for sample in dataset)


def read_mds(request: Request) -> dict[str, Any]:
    """Read a local StreamingDataset, shuffled."""
    dataset = _mds(request)
    return time_passes(lambda: stacked(_mds_rows(dataset), request["micro_batch"]), request["passes"])


def open_mds(request: Request) -> dict[str, Any]:
    """Open a local StreamingDataset and take its first micro-batch, within `memory_limit` bytes."""
    import streaming  # noqa: F401

    resource.setrlimit(resource.RLIMIT_DATA, (request["memory_limit"],) * 2)
    try:
        return time_opening(
            request["began"], memory("VmRSS"), lambda: next(stacked(_mds_rows(_mds(request)), request["micro_batch"]))
        )
    except MemoryError:
        return {"over_bytes": request["memory_limit"]}


def simulate_mds(request: Request) -> dict[str, Any]:
    """Create a dataset of `shards` shards from a smaller one: an index, and symlinks to the same few files."""
    with open(os.path.join(request["from"], "index.json"), encoding="utf-8") as file:
        index = json.load(file)
    written = index["shards"]
    os.makedirs(request["folder"], exist_ok=True)
    shards = []
    for number in range(request["shards"]):
        like = written[number % (len(written) - 1 or 1)]  # without the last, which may be shorter
        name = f"shard.{number:06d}.mds"
        os.symlink(os.path.join(request["from"], like["raw_data"]["basename"]), os.path.join(request["folder"], name))
        shards.append({**like, "raw_data": {**like["raw_data"], "basename": name}})
    with open(os.path.join(request["folder"], "index.json"), "w", encoding="utf-8") as file:
        json.dump({**index, "shards": shards}, file)
    return {"shards": len(shards)}


def _wds(request: Request) -> Any:
    import webdataset

    urls = request["urls"] * request.get("repeat_urls", 1)
    return webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(SHUFFLE_BUFFER)


def _wds_rows(dataset: Any, extension: str, dtype: str) -> Iterator[np.ndarray]:
    return (np.frombuffer(sample[extension], dtype) for sample in dataset)


def read_wds(request: Request) -> dict[str, Any]:
    """Read tars with webdataset, with shuffled shards and a shuffle buffer for rows."""
    dataset, form = _wds(request), (request["extension"], request["dtype"])
    return time_passes(lambda: stacked(_wds_rows(dataset, *form), request["micro_batch"]), request["passes"])


def open_wds(request: Request) -> dict[str, Any]:
    """Open tars with webdataset and take the first micro-batch."""
    import webdataset  # noqa: F401

    form = (request["extension"], request["dtype"])
    return time_opening(
        request["began"],
        memory("VmRSS"),
        lambda: next(stacked(_wds_rows(_wds(request), *form), request["micro_batch"])),
    )


def encode_hf(request: Request) -> dict[str, Any]:
    """Encode texts with Hugging Face's tokenizers, in batches of the size that datasets' map uses."""
    from tokenizers import Tokenizer

    tokenizer, texts = Tokenizer.from_file(request["tokenizer_json"]), _texts(request["texts"])
    clock, ids = Stopwatch(), 0
    for start in range(0, len(texts), TEXTS_PER_BATCH):
        encoded = tokenizer.encode_batch(texts[start : start + TEXTS_PER_BATCH], add_special_tokens=False)
        ids += sum(len(e.ids) for e in encoded)
    return {**clock.read(), "ids": ids, "peak_bytes": memory("VmHWM")}


def map_hf(request: Request) -> dict[str, Any]:
    """Encode texts the usual Hugging Face way: Dataset.map(batched=True) with a cache file."""
    from datasets import Dataset
    from tokenizers import Tokenizer

    tokenizer, texts = Tokenizer.from_file(request["tokenizer_json"]), _texts(request["texts"])

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [e.ids for e in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]}

    dataset = Dataset.from_dict({"text": texts})
    workers = request["workers"] if request["workers"] > 1 else None  # None: in this process
    size, cache = min(TEXTS_PER_BATCH, -(-len(texts) // request["workers"])), request["cache"] + f".{os.getpid()}"
    clock = Stopwatch()
    found = dataset.map(
        encode, batched=True, batch_size=size, num_proc=workers, remove_columns=["text"], cache_file_name=cache
    )
    read = clock.read()
    return {**read, "ids": sum(len(ids) for ids in found["ids"]), "peak_bytes": memory("VmHWM")}


def _texts(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def _cpu_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


TASKS = (versions, write_mds, simulate_mds, read_mds, open_mds, read_wds, open_wds, encode_hf, map_hf)


def run(tasks: Iterable[Callable[[Request], dict[str, Any]]], text: str) -> int:
    """Execute the JSON request `text` and print its result as the last line."""
    request = json.loads(text)
    task = next(task for task in tasks if task.__name__ == request["task"])
    print(json.dumps(task(request)), flush=True)
    return 0


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, because its files shadow other modules
    sys.exit(run(TASKS, sys.argv[1]))
