"""Measures how long tensor-parallel ranks wait for the collectives of decoder layers, and reports it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llama_ds.benchmarks.ranks import check_links, start_ranks
from llama_ds.errors import UserError

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class TensorRequest:
    """Decoder layers in float32 with sequence parallelism, and the links between their ranks."""

    ranks: int
    layers: int
    hidden: int  # heads are of 64, the intermediate size is 8 / 3 of it, rounded up to 64
    rows: int  # in a micro-batch
    seq_len: int
    chunks: list[int]  # values of parallel.tp_chunks, which take turns
    paced_gflops: float | None  # rate at which products are imitated by sleeping, on a busy machine; None: multiply
    deferred: bool  # whether the backward leaves weight gradients for later, as schedules with a split backward do
    rate_mbit: float | None  # bandwidth of a link in each direction; None: loopback
    delay_ms: float
    repeats: int

    @property
    def intermediate(self) -> int:
        return -(-self.hidden * 8 // 3 // 64) * 64

    def check(self) -> None:
        """Refuse what the ranks cannot share.

        Raises:
            UserError: the message names a value that they can.
        """
        if self.ranks < 2:
            raise UserError(f"command line: --ranks {self.ranks} have no collectives; use 2 or more")
        if self.hidden % (64 * self.ranks) or self.intermediate % self.ranks:
            raise UserError(
                f"command line: --ranks {self.ranks} do not divide heads of 64 and intermediate size of --hidden "
                f"{self.hidden}; use a multiple of {192 * self.ranks}"
            )
        check_links(self.rate_mbit, self.delay_ms)
        if len(set(self.chunks)) < len(self.chunks):
            raise UserError(
                f"command line: --chunks {' '.join(map(str, self.chunks))} names one twice; give each number once"
            )
        for chunks in self.chunks:
            if self.seq_len % (self.ranks * chunks):
                raise UserError(
                    f"command line: --seq-len {self.seq_len} is not a multiple of --ranks {self.ranks} * --chunks "
                    f"{chunks}; use {-(-self.seq_len // (self.ranks * chunks)) * self.ranks * chunks}"
                )


def measure(request: TensorRequest, folder: Path) -> dict[str, Any]:
    """Time the layers on ranks, and return the `summary`."""
    module = "llama_ds.benchmarks.tensor.rank"
    start_ranks(module, request, folder, request.ranks, request.rate_mbit, request.delay_ms)
    return summary(request, json.loads((folder / "times.json").read_text()))


def summary(request: TensorRequest, turns: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return, for each number of chunks, medians over the turns of the slowest rank's seconds and the mean waits."""
    whole = turns[str(request.chunks[0])]
    found: dict[str, Any] = {"settings": asdict(request), "cores": os.cpu_count(), "chunks": {}}
    for chunks, times in turns.items():
        one: dict[str, Any] = {}
        for name in PASSES:
            waits = times[f"{name} waits"]
            pairs = zip(waits, whole[f"{name} waits"], strict=True)
            one[name] = {
                "median_s": median(times[name]),
                "exposed_s": median(waits),
                "exposed_of_first": median(own / first for own, first in pairs),
                "turns_s": times[name],
                "turns_exposed_s": waits,
            }
        found["chunks"][chunks] = one
    return found


def table(found: dict[str, Any]) -> str:
    """Return the results as text."""
    of = found["settings"]
    rate = f"links of {of['rate_mbit']:g} Mbit/s and {of['delay_ms']:g} ms" if of["rate_mbit"] else "loopback"
    paced = f"products that sleep at {of['paced_gflops']:g} GFLOP/s, " if of["paced_gflops"] else ""
    lines = [
        f"{of['layers']} decoder layers of hidden size {of['hidden']} on {of['ranks']} tensor-parallel ranks: "
        f"{of['rows']} x {of['seq_len']} tokens, fp32, weight gradients {'deferred' if of['deferred'] else 'at once'}, "
        f"{rate}, {paced}{found['cores']} cores, median of {of['repeats']}"
    ]
    for chunks, passes in found["chunks"].items():
        words = [
            f"{name} {one['median_s'] * 1e3:8.1f} ms, of which {one['exposed_s'] * 1e3:7.1f} ms exposed "
            f"({one['exposed_of_first']:6.1%} of the first)"
            for name, one in passes.items()
        ]
        lines.append(f"{chunks:>3} chunks  " + "; ".join(words))
    return "\n".join(lines)
