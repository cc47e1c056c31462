"""The analysis of a trace as text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llama_ds.perf.trace.analyse import Analysis
from llama_ds.perf.trace.kernels import Devices, MeasuredProducts
from llama_ds.perf.trace.kinds import COMMUNICATION

_MAX_SHAPES = 3  # matrix shapes to show per rank
_MIN_MS = 0.02  # kinds of communication below this time are not shown
_MAX_PROFILED = 4  # profiled ranks to show
_MAX_KERNELS, _NAME_LENGTH = 12, 70  # kernels of a rank to show, and characters of their names, which C++ makes long


def table(found: dict[str, Analysis]) -> str:
    """Return a table with a line for each named analysis."""
    width = max(map(len, found))
    kinds = [kind for kind in COMMUNICATION if kind != "cp" or any(kind in one.communication for one in found.values())]
    columns = ("compute", "recompute", "bubble", *(f"exposed_{kind}" for kind in kinds), "optimizer", "data")
    heads = [name.removeprefix("exposed_") for name in columns]
    lines = [f"{'':{width}} {'step ms':>9} " + " ".join(f"{head:>{max(7, len(head))}}" for head in heads)]
    for name, analysis in found.items():
        shares = (
            f"{analysis.metrics[column]:{max(7, len(head)) - 1}.1f}%"
            for column, head in zip(columns, heads, strict=True)
        )
        lines.append(f"{name:{width}} {analysis.step_ms:9.1f} " + " ".join(shares))
    return "\n".join(lines)


def report(found: Analysis) -> str:
    """Return a breakdown of the recorded steps' time, the slowest ranks, and a comparison with the ideal schedule."""
    blocks = (_head(found), _time(found), _communication(found), _ideal(found), _ranks(found))
    profiled = [_products(rank, p) for rank, p in list(found.products.items())[:_MAX_PROFILED]]
    profiled += [_kernels(rank, d) for rank, d in list(found.kernels.items())[:_MAX_PROFILED]]
    if (more := len(found.products) - _MAX_PROFILED) > 0:
        profiled.append([f"{more} more ranks were profiled: --json has them"])
    return "\n\n".join("\n".join(lines) for lines in (*blocks, *profiled) if lines)


def as_json(found: Analysis) -> dict[str, Any]:
    """Return the analysis as plain data for JSON."""
    values = asdict(found)
    for rank, products in found.products.items():
        values["products"][rank] |= {key: getattr(products, key) for key in ("flops", "seconds", "efficiency")}
    return values


def _head(found: Analysis) -> list[str]:
    error = found.clock_error_us
    clocks = "on one clock" if error == 0 else f"clocks aligned to {error:.1f} us" if error else "clocks not compared"
    steps = f"{found.steps} step{'s' if found.steps > 1 else ''}"
    return [f"{found.ranks} ranks, {steps} of {found.step_ms:.1f} ms on average; {clocks}"]


def _time(found: Analysis) -> list[str]:
    words = {
        "compute": "forward and backward",
        "recompute": "recompute of layers (policy full)",
        "optimizer": "optimizer",
        "data": "waiting for data",
        "bubble": "waiting for ranks that still compute",
        **{f"exposed_{kind}": f"exposed communication, {kind}: {text}" for kind, text in COMMUNICATION.items()},
        "other": "other",
    }
    lines = ["share of all ranks' time"]
    for name, text in words.items():
        share = found.metrics[name]
        if share is not None and (share >= 0.005 or name in ("compute", "bubble")):
            lines.append(f"  {share:6.2f}%  {text}")
    return lines


def _communication(found: Analysis) -> list[str]:
    if not found.communication:
        return []
    lines = ["communication, ms per rank and step     in flight   exposed    hidden"]
    for kind, times in found.communication.items():
        if max(times.values()) < _MIN_MS:
            continue
        hidden = found.metrics[f"hidden_{kind}"]
        in_flight = f"{times['under_way_ms']:9.2f}" if hidden is not None else f"{'-':>9}"
        share = f"{hidden:8.1f}%" if hidden is not None else f"{'-':>9}"
        lines.append(f"  {kind:37} {in_flight} {times['exposed_ms']:9.2f} {share}")
    return lines


def _ideal(found: Analysis) -> list[str]:
    ideal, metrics = found.ideal, found.metrics
    if len(found.stages) < 2 or not ideal.length:
        return []
    lost = {
        "lost_schedule": "its bubble, with equal stages and free messages",
        "lost_imbalance": "unequal times of the stages",
        "lost_messages": f"messages in transit ({ideal.transit / 1e3:.2f} ms median)",
        "lost_rest": "the rest: variation, and other waits that delay ranks",
    }
    lines = [
        f"against the schedule, simulated with the measured times ({ideal.length / 1e3:.1f} ms, bubble "
        f"{ideal.bubble:.1%}), share of the step lost to"
    ]
    lines += [f"  {metrics[name] or 0.0:6.2f}%  {text}" for name, text in lost.items()]
    if ideal.pass_times:
        lines.append(f"measured times of the stages' passes: parallel.pass_times={list(ideal.pass_times)}")
    return lines


def _ranks(found: Analysis) -> list[str]:
    lines = []
    if len(found.stages) > 1:
        slowest = max(range(len(found.stages)), key=found.stages.__getitem__)
        stages = ", ".join(f"{time:.1f}" for time in found.stages[:16]) + (", .." if len(found.stages) > 16 else "")
        lines.append(
            f"stages compute {stages} ms per step: stage {slowest} is {found.metrics['imbalance']:.1f}% above the mean"
        )
    lines.append("slowest ranks by compute time, and the median of their stage")
    shown = [slow for slow in found.slowest if slow.own_ms > slow.median_ms] or found.slowest[:1]
    return lines + [
        f"  rank {slow.rank:<5} {slow.own_ms:9.1f} ms {slow.median_ms:9.1f} ms  ({slow.place})" for slow in shown
    ]


def _products(rank: int, found: MeasuredProducts) -> list[str]:
    against = f"the peak of {found.peak}" if found.peak else "the best product here, as the device's peak is unknown"
    lines = [
        f"rank {rank}: {sum(s.count for s in found.shapes)} matrix products, {found.flops / 1e9:.1f} GFLOP in "
        f"{found.seconds * 1e3:.1f} ms: {found.flops / max(found.seconds, 1e-12) / 1e9:.1f} GFLOP/s, "
        f"{found.efficiency or 0.0:.0%} of {against}"
    ]
    for shape in found.shapes[:_MAX_SHAPES]:
        lines.append(
            f"  ({shape.m}, {shape.k}) ({shape.k}, {shape.n}) {shape.dtype}, {shape.count} times: "
            f"{shape.seconds * 1e3:.1f} ms, {shape.rate / 1e9:.1f} GFLOP/s"
        )
    return lines


def _kernels(rank: int, found: Devices) -> list[str]:
    hidden = found.overlap / found.communication if found.communication else 0.0
    lines = [
        f"rank {rank}: kernels over {found.span / 1e3:.1f} ms: compute {found.compute / found.span:.1%}, "
        f"communication {found.communication / found.span:.1%} ({hidden:.1%} of it hidden by compute), idle "
        f"{found.idle_kernels:.1%}"
    ]
    for name, count, time in found.longest[:_MAX_KERNELS]:
        lines.append(f"  {time / found.span:6.1%} {time / 1e3:9.2f} ms {count:6} x {name[:_NAME_LENGTH]}")
    return lines
