"""Measures the methods of context parallelism on ranks, and reports them."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_ds.benchmarks.context.request import ContextRequest
from llama_ds.benchmarks.ranks import start_ranks
from llama_ds.layout.cp_traffic import cp_traffic, sent_bytes

ELEMENT_BYTES = 4


def measure(request: ContextRequest, folder: Path) -> dict[str, Any]:
    """Return the median seconds of each method and row length, the share of waiting, and the bytes of a rank."""
    start_ranks("llama_ds.benchmarks.context.rank", request, folder, request.ranks, request.rate_mbit, request.delay_ms)
    times = json.loads((folder / "times.json").read_text())
    found: dict[str, Any] = {"settings": asdict(request), "cores": os.cpu_count(), "attention": {}}
    for tokens, methods in times.items():
        for method, one in methods.items():
            sizes = request.methods[method]
            traffic = cp_traffic(sizes, int(tokens) // request.ranks, request.heads, request.kv_heads, request.head_dim)
            found["attention"].setdefault(tokens, {})[method] = {
                "median_s": statistics.median(one["seconds"]),
                "min_s": min(one["seconds"]),
                "max_s": max(one["seconds"]),
                "exposed": statistics.median(w / s for w, s in zip(one["waited"], one["seconds"], strict=True)),
                "sent_bytes": sum(sent_bytes(sizes, traffic, ELEMENT_BYTES)),
            }
    return found


def table(found: dict[str, Any]) -> str:
    """Return the results as text."""
    settings = found["settings"]
    rate = f"links of {settings['rate_mbit']:g} Mbit/s" if settings["rate_mbit"] else "loopback"
    lines = [
        f"attention of a row, forward and backward, on {settings['ranks']} ranks: {settings['heads']} query and "
        f"{settings['kv_heads']} key-value heads of {settings['head_dim']}, fp32, {rate}, {found['cores']} cores, "
        f"median of {settings['repeats']}"
    ]
    for tokens, methods in found["attention"].items():
        for method, one in methods.items():
            lines.append(
                f"{tokens:>7} tokens  {method:13} {one['median_s'] * 1e3:9.1f} ms, of which {one['exposed']:.1%} waits "
                f"for messages; {one['sent_bytes'] / 2**20:.2f} MiB sent by a rank"
            )
    return "\n".join(lines)
