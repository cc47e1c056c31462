"""Converts the ranks' measurements to the planner's description of the machine, and to tables."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_ds.layout.flops import device_peak
from llama_ds.perf.plan import hardware
from llama_ds.perf.plan.curves import (
    ALL_REDUCE,
    SEND,
    AttentionRates,
    Collective,
    Curves,
    Kernels,
    ProductRates,
    Rate,
    medians,
)
from llama_ds.perf.plan.hardware import MAX_SPREAD, Calibration, Hardware, Links

GIB = 2**30
SOURCES = "measured by tools/machine.py"
SPREAD_RANKS = 8  # fewer ranks do not determine the spread of their speeds
# Placeholders: the planner does not read these values if measured curves exist.
_LINKS = Links(1, 1.0, 1.0, 1.0)
_CALIBRATION = Calibration(0.8, 64.0, 0.6, 0.85, 0.4, 0.3, 0.8, 0.3, 10.0, 1e-3, 1.0, SOURCES)


def begin(path: Path, name: str, slots: int) -> Hardware:
    """Return the description in the file, or an empty one with that name if the file does not exist.

    Raises:
        UserError: the file is not a description of a machine.
    """
    if path.exists():
        found = hardware.load(str(path))
        return replace(found, links=replace(found.links, gpus_per_node=slots))
    links = replace(_LINKS, gpus_per_node=slots)
    return Hardware(name, "", 1.0, 1, 1.0, 1.0, links, _CALIBRATION, peak_tflops=1.0)


def with_computing(machine: Hardware, found: dict[str, Any], power_w: float | None) -> Hardware:
    """Return the machine with the measured compute rates, medians over its ranks."""
    middle = _short(medians(list(found["ranks"].values())))
    products = ProductRates(**middle["products"])
    kernels = {name: Rate(**rate) for name, rate in middle["kernels"].items()}
    measured = Curves(products, AttentionRates(**middle["attention"]), Kernels(**kernels))
    known = device_peak(found["device"], found["dtype"])
    best = max(rate for plane in products.tflops for row in plane for rate in row)
    return replace(
        machine,
        device=found["device"],
        memory_gib=_short(found["memory_bytes"] / GIB),
        bandwidth_gb_s=max(kernels["optimizer"].gb_s),
        power_w=power_w or machine.power_w,
        calibration=replace(machine.calibration, launch_us=middle["launch_us"]),
        dtype=found["dtype"],
        peak_tflops=None if known else best,
        at_once=found["at_once"] if found["at_once"] < machine.links.gpus_per_node else None,
        host_computes=found["host_computes"],
        rank_spread=machine.rank_spread if (spread := spread_of_ranks(found)) is None else spread,
        curves=replace(measured, collectives=machine.curves.collectives if machine.curves else ()),
    )


def with_links(machine: Hardware, found: dict[str, Any]) -> Hardware:
    """Return the machine with the measured collectives, and the links derived from the largest and smallest ones."""
    curves = tuple(
        Collective(one["operation"], one["ranks"], one["nodes"], tuple(one["sizes"]), tuple(map(_us, one["seconds"])))
        for one in found["collectives"]
    )
    calibration, links = machine.calibration, machine.links
    if found["contention"] is not None:
        calibration = replace(calibration, contention=_short(found["contention"]))
    sums = [curve for curve in curves if curve.operation == ALL_REDUCE]
    within = [curve for curve in sums if curve.nodes == 1]
    if within:
        largest = max(within, key=lambda curve: curve.ranks)
        links = replace(links, nvlink_gb_s=_short(largest.bus_gb_s()[-1]), nvlink_latency_us=within[0].us[0])
    between = [curve for curve in sums if curve.nodes > 1 and curve.ranks == links.gpus_per_node]
    if between:  # a ring over all slots of its nodes does not share their links
        largest = max(between, key=lambda curve: curve.nodes)
        calibration = replace(calibration, network=1.0)
        links = replace(links, network_gb_s=_short(largest.bus_gb_s()[-1]))
        sent = [curve for curve in curves if curve.operation == SEND and curve.nodes == 2]
        links = replace(links, network_latency_us=sent[0].us[0]) if sent else links
    measured = replace(machine.curves or Curves(), collectives=curves)
    return replace(machine, links=links, calibration=calibration, curves=measured)


def slow_ranks(found: dict[str, Any], below: float = 0.9) -> list[tuple[int, float]]:
    """Return (rank, rate / median rate) of the ranks whose rate for the largest products is below `below`."""
    return sorted((rank, rate) for rank, rate in _relative_rates(found).items() if rate < below)


def spread_of_ranks(found: dict[str, Any]) -> float | None:
    """Return the relative standard deviation of the ranks' rates for the largest products, None with too few ranks.

    Slow ranks are left out: they are named, to be repaired.
    """
    slow = {rank for rank, _ in slow_ranks(found)}
    rates = [rate for rank, rate in _relative_rates(found).items() if rank not in slow]
    return _short(min(MAX_SPREAD, statistics.stdev(rates))) if len(rates) >= SPREAD_RANKS else None


def _relative_rates(found: dict[str, Any]) -> dict[int, float]:
    rates = {int(rank): one["products"]["tflops"][-1][-1][-1] for rank, one in found["ranks"].items()}
    middle = statistics.median(rates.values())
    return {rank: rate / middle for rank, rate in rates.items()}


def computing_table(machine: Hardware) -> str:
    """Return the measured rates as readable text."""
    assert machine.curves and machine.curves.products and machine.curves.attention and machine.curves.kernels
    products, attention, kernels = machine.curves.products, machine.curves.attention, machine.curves.kernels
    lines = [
        f"{machine.device}, {machine.dtype}: products in TFLOP/s, M = N by K",
        "   M = N " + "".join(f"{k:>9}" for k in products.sizes),
        *(
            f"{m:8} " + "".join(f"{products.tflops[i][i][j]:9.3g}" for j in range(len(products.sizes)))
            for i, m in enumerate(products.sizes)
        ),
        "causal attention in TFLOP/s, forward / backward, head size by sequence length",
        "   heads " + "".join(f"{t:>15}" for t in attention.seq_len),
        *(
            f"{d:8} "
            + "".join(
                f"{attention.forward_tflops[i][j]:8.3g}/{attention.backward_tflops[i][j]:<6.3g}"
                for j in range(len(attention.seq_len))
            )
            for i, d in enumerate(attention.head_dim)
        ),
        "pointwise kernels in GB/s of the traffic of fused kernels, by MB",
        *(
            f"{name:>9} "
            + "".join(f"{size / 1e6:9.3g}: {gb_s:<6.3g}" for size, gb_s in zip(r.bytes, r.gb_s, strict=True))
            for name, r in vars(kernels).items()
        ),
        f"host     {machine.calibration.launch_us:.3g} us per kernel",
    ]
    return "\n".join(lines)


def links_table(machine: Hardware) -> str:
    """Return times and bandwidths in the format of nccl-tests."""
    assert machine.curves
    lines = []
    for curve in machine.curves.collectives:
        where = f"{curve.ranks} ranks on {'one node' if curve.nodes == 1 else f'each of {curve.nodes} nodes'}"
        lines += [f"{curve.operation}, {where}", f"{'bytes':>14} {'us':>12} {'algbw GB/s':>11} {'busbw GB/s':>11}"]
        for size, us, bus in zip(curve.bytes, curve.us, curve.bus_gb_s(), strict=True):
            lines.append(f"{size:14,} {us:12.1f} {size / us / 1e3:11.3f} {bus:11.3f}")
    lines.append(f"each second of an overlapped all-reduce slows products by {machine.calibration.contention:.2f} s")
    return "\n".join(lines)


def _us(seconds: float) -> float:
    return _short(seconds * 1e6)


def _short(value: Any) -> Any:
    """Round floats, also in nested data, to four digits, the precision of the measurements; keep integers."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_short, value))
    return value if isinstance(value, int) else float(f"{value:.4g}")
