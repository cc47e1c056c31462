"""Start-up cost before the first row: opening sources of 10 to 100,000 shards, and resuming a 1.4T-token run.

Sources are simulated: they have every file that a run reads before it fetches a shard, but no shards. Ours opens the
run (run file, tokenizer, manifest), computes the rows of its first step and looks up their shards' checksums. The
others get the same number of shard names, which refer to the same few files, and read their first micro-batch. Those
files hold fewer rows than our simulated shards (`DataBenchSizes`), which favours mosaicml-streaming, because it
materialises the order of all rows.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from llama_ds.benchmarks.data.bench import OURS, DataBench
from llama_ds.benchmarks.data.processes import Contestant, Result, interleave, median, ours, rival, summary
from llama_ds.benchmarks.data.reading import STREAMING, WEBDATASET, webdataset_request
from llama_ds.benchmarks.data.simulated_data import simulate_source, write_run
from llama_ds.config.run_file import load_run
from llama_ds.config.schema import RunConfig
from llama_ds.data.mixture import save_state
from llama_ds.data.stream import open_data

RESUMED_STEP = 300_000
NEXT_ROWS = 1000  # rows of one rank, computed after resuming
DP_RANK = 19  # arbitrary
DP = 32  # llama_65b.yaml on 2048 GPUs, with pp 8 and tp 8


def prepare(bench: DataBench) -> None:
    """Write the simulated sources."""
    for shards in bench.sizes.opened:
        rows_per_shard = bench.sizes.opened_rows_per_shard
        folder = bench.path(f"opened-{shards}")
        simulate_source(folder, bench.tokenizer, shards * rows_per_shard, rows_per_shard, bench.sizes.seq_len)
        run = {"global_batch": bench.sizes.global_batch, "steps": 100}
        write_run(f"{folder}.yaml", bench.tokenizer, bench.sizes.seq_len, {folder: 1.0}, **run)
        if bench.other_has("mosaicml-streaming"):
            mds = {"from": bench.path("mds"), "folder": bench.path(f"mds-{shards}"), "shards": shards}
            rival(bench.streaming_python, "simulate_mds", **mds).measure()


def contestants(bench: DataBench, shards: int) -> dict[str, Contestant]:
    """Return the contestants that open `shards` shards."""
    steps, micro_batch = 1, bench.sizes.micro_batch
    tars = webdataset_request(bench)
    names = {"repeat_urls": -(-shards // len(tars["urls"]))}
    found = {
        OURS: ours("open_manifest", run=bench.path(f"opened-{shards}.yaml"), steps=steps, micro_batch=micro_batch),
        WEBDATASET: rival(sys.executable, "open_wds", **tars, **names),
    }
    if bench.other_has("mosaicml-streaming"):
        folder = bench.path(f"mds-{shards}")
        limit = {"memory_limit": _memory() // 4 * 3}
        found[STREAMING] = rival(bench.streaming_python, "open_mds", folder=folder, micro_batch=micro_batch, **limit)
    return found


def measure(bench: DataBench) -> dict[str, Any]:
    """Measure all contestants for each number of shards."""
    found: dict[str, Any] = {}
    for shards in bench.sizes.opened:
        results = interleave(contestants(bench, shards), bench.repeats, bench.tick, repeat_slow=False)
        found[str(shards)] = {name: _row(measured) for name, measured in results.items()}
    return found


def measure_resume(bench: DataBench, run_file: str) -> dict[str, Any]:
    """Measure how one rank of `run_file` resumes in mid-run; simulated source sizes give the run's epochs."""
    overrides, shards = _simulate_sources(bench, load_run(run_file))
    run = load_run(run_file, overrides)
    save_state(bench.path("resume", "data.json"), open_data(run).state)
    request = {
        "run": os.path.abspath(run_file), "overrides": overrides, "state": bench.path("resume", "data.json"),
        "step": RESUMED_STEP, "rows": NEXT_ROWS, "dp_rank": DP_RANK, "dp": DP,
    }  # fmt: skip
    results = interleave({OURS: ours("resume", **request)}, bench.repeats, bench.tick)[OURS]
    numbers = ("imported_s", "opened_s", "resumed_s", "next_rows_s")
    sizes = ("imported_bytes", "resumed_bytes", "peak_bytes")
    return {
        "run": os.path.basename(run_file),
        "tokens": run.training.tokens,
        "step": RESUMED_STEP,
        "dp_rank": DP_RANK,
        "dp": DP,
        "sources": len(shards),
        "shards": sum(shards),
        "next_rows": results[0]["next_rows"],
        **{f"median_{number}": median(results, number) for number in (*numbers, *sizes)},
        **{f"max_{number}": max(result[number] for result in results) for number in ("resumed_s", "peak_bytes")},
    }


def _simulate_sources(bench: DataBench, run: RunConfig) -> tuple[list[str], list[int]]:
    """Return run file overrides that point to the simulated sources, and the shard count of each.

    The vocabulary is that of the benchmark's tokenizer; the order of rows does not depend on it.
    """
    total = sum(source.weight for source in run.data.sources)
    overrides = [f"data.tokenizer={bench.tokenizer.path}", f"model.vocab_size={bench.tokenizer.vocab_size}"]
    shards = []
    for i, source in enumerate(run.data.sources):
        read = run.training.steps * run.training.global_batch * source.weight / total
        folder = bench.path("resume", source.name)
        rows = round(read / (source.epochs or 1.0))
        shards.append(simulate_source(folder, bench.tokenizer, rows, 16384, run.data.seq_len))
        overrides.append(f"data.sources.{i}.path={folder}")
    return overrides, shards


def _memory() -> int:
    """Return the physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _row(results: list[Result]) -> dict[str, Any]:
    over = [result for result in results if "over_bytes" in result]
    if over:
        return over[0]
    return {
        "measured": len(results),
        **summary((result["seconds"] for result in results), "s"),
        **summary((result["process_s"] for result in results), "process_s"),
        "median_peak_bytes": median(results, "peak_bytes"),
        "median_imported_bytes": median(results, "imported_bytes"),
    }
