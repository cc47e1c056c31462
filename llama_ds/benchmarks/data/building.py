"""Tokenization speed: our build against sentencepiece's own loop and Hugging Face's tokenizers and datasets.

All encode the same texts with the same vocabulary, with one core per worker. Only ours hashes, splits, packs and writes
shards, checksums and an index; the bare loop that it is compared with writes nothing.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from llama_ds.benchmarks.data.bench import OURS, DataBench
from llama_ds.benchmarks.data.processes import Contestant, Result, interleave, ours, rival, summary
from llama_ds.errors import UserError

BARE = "sentencepiece"
ID_TOLERANCE = 0.001  # relative, for the number of ids: the bare loop encodes U+2581 in texts differently


def contestants(bench: DataBench) -> dict[str, Contestant]:
    """Return the contestants. The number at the end of a name is the number of workers."""
    given = {"texts": bench.texts, "tokenizer": bench.tokenizer.path}
    found = {}
    for workers in (1, 2):  # adjacent, so that load on the machine affects both alike
        found[f"{BARE}_{workers}"] = ours("bare_encode", **given, workers=workers)
        found[f"{OURS}_{workers}"] = ours(
            "build",
            **given,
            workers=workers,
            seq_len=bench.sizes.seq_len,
            folder=bench.path("builds"),
            validation_fraction=bench.sizes.validation_fraction,
        )
    hf = {"texts": bench.texts, "tokenizer_json": bench.tokenizer_json}
    found["hf_tokenizers_1"] = rival(sys.executable, "encode_hf", **hf)
    if bench.other_has("datasets"):
        for workers in (1, 2):
            found[f"hf_datasets_map_{workers}"] = rival(
                bench.streaming_python, "map_hf", **hf, workers=workers, cache=bench.path("mapped.arrow")
            )
    return found


def measure(bench: DataBench) -> dict[str, Any]:
    """Measure all contestants."""
    found = interleave(contestants(bench), bench.repeats, bench.tick)
    ids = found[f"{OURS}_1"][0]["ids"]
    for name, results in found.items():
        for result in results:
            if abs(result["ids"] - ids) > ID_TOLERANCE * ids:
                raise UserError(
                    f"{name} encoded the texts as {result['ids']} ids and llama_ds as {ids}, so their speeds are not "
                    "comparable; leave texts with the character U+2581 out of --corpus"
                )
    rows = {name: _row(results, ids, _workers(name)) for name, results in found.items()}
    return {
        "documents": bench.documents,
        "text_bytes": bench.text_bytes,
        "text_ids": ids,
        "contestants": rows,
        # Above 1: ours is faster with the same number of workers. Each is the median of the per-turn ratios, because
        # the speed of a shared machine varies between turns; by wall time, and by CPU time, which is less noisy.
        "speed_over": _speeds(found, "seconds"),
        "cpu_speed_over": _speeds(found, "cpu_s"),
    }


def _workers(name: str) -> int:
    return int(name.rpartition("_")[2])


def _row(results: list[Result], ids: int, workers: int) -> dict[str, Any]:
    seconds = summary((result["seconds"] for result in results), "s")
    cpu = summary((result["cpu_s"] for result in results), "cpu_s")
    return {
        "workers": workers,
        **seconds,
        **cpu,
        "tokens_per_s_per_core": ids / seconds["median_s"] / workers,
        "tokens_per_cpu_s": ids / cpu["median_cpu_s"],
        **summary((result["peak_bytes"] for result in results), "peak_bytes"),
    }


def _speeds(found: dict[str, list[Result]], time: str) -> dict[str, float]:
    return {
        name: statistics.median(
            result[time] / own[time] for result, own in zip(results, found[f"{OURS}_{_workers(name)}"], strict=True)
        )
        for name, results in found.items()
        if not name.startswith(OURS)
    }
