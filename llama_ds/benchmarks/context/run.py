"""Measures the methods of context parallelism on ranks, and reports them."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_ds.benchmarks.context.predict import exposed_seconds
from llama_ds.benchmarks.context.request import ELEMENT_BYTES, ContextRequest
from llama_ds.benchmarks.ranks import start_ranks
from llama_ds.layout.cp_traffic import cp_traffic, sent_bytes


def measure(request: ContextRequest, folder: Path) -> dict[str, Any]:
    """Return medians of each method and row length beside what was predicted of them, and the bytes of a rank."""
    start_ranks(
        "llama_ds.benchmarks.context.rank",
        request,
        folder,
        request.ranks,
        request.rate_mbit,
        request.delay_ms,
        request.node_ranks,
    )
    times = json.loads((folder / "times.json").read_text())
    found: dict[str, Any] = {"settings": asdict(request), "cores": os.cpu_count(), "attention": {}}
    for tokens, methods in times.items():
        for method, one in methods.items():
            found["attention"].setdefault(tokens, {})[method] = _result(request, method, int(tokens), one)
    return found


def _result(request: ContextRequest, method: str, tokens: int, times: dict[str, list[float]]) -> dict[str, Any]:
    sizes = request.methods[method]
    traffic = cp_traffic(sizes, tokens // request.ranks, request.heads, request.kv_heads, request.head_dim)
    forward, backward = statistics.median(times["forward"]), statistics.median(times["backward"])
    exposed = exposed_seconds(request, sizes, tokens, forward, backward)
    return {
        "median_s": statistics.median(times["seconds"]),
        "min_s": min(times["seconds"]),
        "max_s": max(times["seconds"]),
        "exposed": statistics.median(w / s for w, s in zip(times["waited"], times["seconds"], strict=True)),
        "computing_s": forward + backward,
        "predicted_s": None if exposed is None else forward + backward + exposed,
        "predicted_exposed": None if exposed is None else exposed / (forward + backward + exposed),
        "sent_bytes": sum(sent_bytes(sizes, traffic, ELEMENT_BYTES)),
    }


def table(found: dict[str, Any]) -> str:
    """Return the results as text."""
    settings = found["settings"]
    rate = f"links of {settings['rate_mbit']:g} Mbit/s" if settings["rate_mbit"] else "loopback"
    if settings["rate_mbit"] and settings["node_ranks"] > 1:
        rate += f" between nodes of {settings['node_ranks']} ranks"
    lines = [
        f"attention of a row, forward and backward, on {settings['ranks']} ranks: {settings['heads']} query and "
        f"{settings['kv_heads']} key-value heads of {settings['head_dim']}, fp32, {rate}, {found['cores']} cores, "
        f"median of {settings['repeats']}"
    ]
    for tokens, methods in found["attention"].items():
        for method, one in methods.items():
            predicted = ""
            if one["predicted_s"] is not None:
                predicted = f" (predicted {one['predicted_s'] * 1e3:.1f} ms, {one['predicted_exposed']:.1%})"
            lines.append(
                f"{tokens:>7} tokens  {method:13} {one['median_s'] * 1e3:9.1f} ms, of which {one['exposed']:.1%} waits "
                f"for messages{predicted}; {one['computing_s'] * 1e3:.1f} ms without messages; "
                f"{one['sent_bytes'] / 2**20:.2f} MiB sent by a rank"
            )
    return "\n".join(lines)
