"""Analysis of torch profiles: a real A100 trace compared with HolisticTraceAnalysis, and small examples by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama_ds.perf.trace import report
from llama_ds.perf.trace.kernels import devices, monotonic_offset, products
from llama_ds.perf.trace.read import read_profile

REAL = Path(__file__).parent / "data" / "nccl_kernels_a100.json.gz"


def test_kernels_agree_with_holistic_trace_analysis() -> None:
    """The numbers are from HTA 0.6.0: get_temporal_breakdown, get_gpu_kernel_breakdown, get_comm_comp_overlap."""
    found = devices(read_profile(REAL))
    assert found
    assert (found.span, found.span - found.busy, found.compute) == (215394, 141312, 36226)
    assert found.busy - found.compute == 37856  # "non_compute_time"
    alone, with_compute, with_memory = 29509, 483, 142
    assert found.communication == alone + with_compute + with_memory
    assert found.overlap == with_compute
    assert found.memory == 8205 + 856 + 142  # alone, overlapping compute, overlapping communication
    assert round(100 * found.overlap / found.communication, 2) == 1.60  # "comp_comm_overlap_pctg"
    assert found.exposed_kernels == (alone + with_memory) / 215394
    every = sum(time for _, _, time in found.longest)
    kernels = [event for event in read_profile(REAL) if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    assert every == sum(event["dur"] for event in kernels) and sum(n for _, n, _ in found.longest) == len(kernels)
    name, count, time = found.longest[0]
    assert time == max(time for *_, time in found.longest)
    assert (count, time) == (len(own := [e["dur"] for e in kernels if e["name"] == name]), sum(own))
    lines = report._kernels(0, found)
    assert len(lines) == 1 + min(12, len(found.longest)) and f"{count} x {name[:60]}" in lines[1]


def test_kernels_are_attributed_to_the_product_that_launched_them() -> None:
    """The products and their kernels are read off the file by hand; a split-K product has several kernels."""
    found = products(read_profile(REAL), "NVIDIA A100-SXM4-80GB")
    assert found
    taken = {(s.m, s.k, s.n): (s.count, round(s.seconds * 1e6)) for s in found.shapes}
    assert taken == {
        (4096, 100, 64): (1, 14),
        (4096, 2798, 64): (1, 95),
        (4096, 64, 2798): (1, 8 + 98),
        (64, 4096, 2798): (1, 9 + 134),
        (64, 4096, 100): (1, 23 + 13 + 10),
    }
    assert found.flops == 2 * (2 * 4096 * 100 * 64 + 3 * 4096 * 2798 * 64)
    assert found.peak == "NVIDIA A100-SXM4-80GB, fp32"
    assert found.efficiency == pytest.approx(found.flops / 404e-6 / 19.5e12)


def operator(name: str, begin: float, length: float, *dims: list[int], dtype: str = "float") -> dict[str, Any]:
    args = {"Input Dims": [*dims], "Input type": [dtype] * len(dims)}
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 9, "tid": 9, "ts": begin, "dur": length, "args": args}


def test_products_on_a_cpu_are_compared_with_the_best_of_them() -> None:
    events = [
        operator("aten::mm", 0, 10, [2, 3], [3, 5]),
        operator("aten::addmm_", 20, 40, [2, 9], [2, 3], [3, 9]),
        operator("aten::bmm", 70, 20, [4, 2, 3], [4, 3, 5]),  # part of attention, so not counted
        operator("aten::add", 100, 1, [2, 3], [2, 3]),
    ]
    found = products(events, "cpu")
    assert found and not found.peak
    assert found.flops == 60 + 108
    assert found.against == pytest.approx(60 / 10e-6)  # rate of the faster product
    assert found.efficiency == pytest.approx((168 / 50e-6) / (60 / 10e-6))
    assert products([operator("aten::mm", 0, 10)], "cpu") is None  # no shapes, so no products


def test_markers_tie_a_profile_to_the_monotonic_clock() -> None:
    """The profiler's clock shows 500 us when the other shows 2000; one marker is delayed by 40 us."""
    markers = [(2000, 500), (2100, 640), (2200, 700.5)]
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "user_annotation", "name": f"llama_ds clock {at * 1000}", "ts": ts} for at, ts in markers
    ]
    assert monotonic_offset(events) == 1500
    assert monotonic_offset([]) is None
