"""Read speed of one process for shuffled rows: ours, mosaicml-streaming and webdataset on the same rows.

Each reader is one process without workers or threads, reads from the page cache and yields micro-batches of ids. A
digest proves that all read the same rows. Our shards' checksums are checked before and timed separately, because the
others check none.
"""

from __future__ import annotations

import os
import statistics
import sys
from typing import Any

import numpy as np

from llama_ds.benchmarks.data.bench import OURS, DataBench
from llama_ds.benchmarks.data.processes import Contestant, Result, interleave, ours, rival, summary
from llama_ds.benchmarks.data.rivals import digest_of
from llama_ds.benchmarks.data.simulated_data import write_rows, write_run
from llama_ds.data.building.packing import id_dtype
from llama_ds.data.source import tar_rows
from llama_ds.data.source.manifest import shard_name

STREAMING, WEBDATASET = "mosaicml_streaming", "webdataset"


def prepare(bench: DataBench) -> str:
    """Write rows of random ids as our source (which webdataset reads too) and as MDS; return their digest."""
    sizes = bench.sizes
    dtype = id_dtype(bench.tokenizer.vocab_size)
    shape = (sizes.rows, sizes.seq_len + 1)
    rows = np.random.default_rng(0).integers(0, bench.tokenizer.vocab_size, shape, dtype)
    write_rows(bench.path("rows"), bench.tokenizer, rows, sizes.rows // sizes.shards)
    write_run(_run(bench), bench.tokenizer, sizes.seq_len, {bench.path("rows"): 1.0}, sizes.global_batch, steps=100)
    if bench.other_has("mosaicml-streaming"):
        np.save(bench.path("rows.npy"), rows)
        write = {"rows": bench.path("rows.npy"), "folder": bench.path("mds"), "shards": sizes.shards}
        rival(bench.streaming_python, "write_mds", **write).measure()
    return f"{digest_of(rows):016x}"


def webdataset_request(bench: DataBench) -> dict[str, Any]:
    """Return the description of our shards for webdataset."""
    dtype = id_dtype(bench.tokenizer.vocab_size)
    return {
        "urls": [bench.path("rows", shard_name("train", shard)) for shard in range(bench.sizes.shards)],
        "extension": tar_rows.extension(dtype),
        "dtype": dtype.str,
        "micro_batch": bench.sizes.micro_batch,
    }


def contestants(bench: DataBench) -> dict[str, Contestant]:
    """Return the contestants."""
    sizes = bench.sizes
    shape = {"micro_batch": sizes.micro_batch, "passes": sizes.passes}
    own = {"run": _run(bench), "steps": sizes.rows // sizes.global_batch, **shape}
    found = {
        f"{OURS}_reader": ours("read_reader", **own),
        f"{OURS}_source": ours("read_source", **own),
        WEBDATASET: rival(sys.executable, "read_wds", **webdataset_request(bench), passes=sizes.passes),
    }
    if bench.other_has("mosaicml-streaming"):
        found[STREAMING] = rival(bench.streaming_python, "read_mds", folder=bench.path("mds"), **shape)
    return found


def measure(bench: DataBench, digest: str) -> dict[str, Any]:
    """Measure all contestants, and check that each read the rows with the given digest."""
    found = interleave(contestants(bench), bench.repeats, bench.tick)
    for name, results in found.items():
        for result in results:
            if (result["rows"], result["digest"]) != (bench.sizes.rows, digest):
                raise AssertionError(f"{name} read other rows: {result['rows']}, {result['digest']} for {digest}")
    rows = {name: _row(bench, results) for name, results in found.items()}
    reader, checks = rows[f"{OURS}_reader"], [result["check"] for result in found[f"{OURS}_reader"]]
    check_s = statistics.median(check["seconds"] for check in checks)
    return {
        "rows": bench.sizes.rows,
        "shards": bench.sizes.shards,
        "seq_len": bench.sizes.seq_len,
        "micro_batch": bench.sizes.micro_batch,
        "digest": digest,
        "contestants": rows,
        "check": {
            "median_s": check_s,
            "bytes_per_s": checks[0]["bytes"] / check_s,
            "bytes_per_cpu_s": checks[0]["bytes"] / statistics.median(check["cpu_s"] for check in checks),
            # Rate of an epoch: a pass plus the check of every shard.
            "tokens_per_s": bench.sizes.rows * bench.sizes.seq_len / (reader["median_s"] + check_s),
        },
        "speed_over": _speeds(rows, "tokens_per_s"),
        "cpu_speed_over": _speeds(rows, "tokens_per_cpu_s"),
    }


def _run(bench: DataBench) -> str:
    return os.path.join(bench.folder, "read.yaml")


def _row(bench: DataBench, results: list[Result]) -> dict[str, Any]:
    passes = [timed for result in results for timed in result["passes"]]
    seconds = summary((timed["seconds"] for timed in passes), "s")
    cpu = summary((timed["cpu_s"] for timed in passes), "cpu_s")
    tokens = bench.sizes.rows * bench.sizes.seq_len
    return {
        **seconds,
        **cpu,
        "rows_per_s": bench.sizes.rows / seconds["median_s"],
        "tokens_per_s": tokens / seconds["median_s"],
        "tokens_per_cpu_s": tokens / cpu["median_cpu_s"],
        **summary((result["peak_bytes"] for result in results), "peak_bytes"),
    }


def _speeds(rows: dict[str, dict[str, Any]], rate: str) -> dict[str, float]:
    """Return the speedup of our reader over each rival; unlike our bare source it stacks batches, as the rivals do."""
    own = rows[f"{OURS}_reader"][rate]
    return {name: own / row[rate] for name, row in rows.items() if not name.startswith(OURS)}
