"""Analysis of a torch profile: rates of matrix products and, on CUDA, compute and exposed communication kernels.

An operator's FLOPs follow from the shapes of its inputs. Its time is its own duration on a CPU; on CUDA it is that of
the kernels it launched, which are matched by the correlation id of launch and kernel.
"""

from __future__ import annotations

import re
import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from llama_ds.job.trace_format import MARKER
from llama_ds.layout.flops import device_peak
from llama_ds.perf.trace.spans import common, merged, total

Profiled = dict[str, Any]  # an event of a profile; ts and dur are in microseconds

# Positions of the two matrices among an operator's inputs. Batched products are excluded: on a CPU they belong to
# attention, which is a fused kernel elsewhere.
_PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_COMMUNICATION = re.compile(r"nccl|rccl", re.IGNORECASE)
_MEMORY = ("gpu_memcpy", "gpu_memset")
_DTYPES = {"c10::BFloat16": "bf16", "c10::Half": "fp16", "float": "fp32"}


@dataclass(frozen=True)
class Shape:
    """All matrix products of one shape: (M, K) times (K, N)."""

    dtype: str
    m: int
    k: int
    n: int
    count: int
    seconds: float

    @property
    def flops(self) -> float:
        """FLOPs of all these products; a multiply-add is two."""
        return 2.0 * self.m * self.k * self.n * self.count

    @property
    def rate(self) -> float:
        """Rate in FLOP/s."""
        return self.flops / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class MeasuredProducts:
    """All matrix products of a rank."""

    shapes: list[Shape]  # sorted by time, longest first
    against: float  # reference rate in FLOP/s
    peak: str  # device and dtype of the reference peak; "" if it is unknown and the best shape's rate is used

    @property
    def flops(self) -> float:
        """FLOPs of all products."""
        return sum(shape.flops for shape in self.shapes)

    @property
    def seconds(self) -> float:
        """Time of all products."""
        return sum(shape.seconds for shape in self.shapes)

    @property
    def efficiency(self) -> float | None:
        """Achieved rate over the reference rate."""
        return self.flops / self.seconds / self.against if self.seconds and self.against else None


@dataclass(frozen=True)
class Devices:
    """Kernel time on a rank's device, in microseconds; concurrent kernels count once."""

    span: float  # time from the begin of the first kernel to the end of the last
    busy: float
    compute: float
    communication: float
    overlap: float  # communication that overlaps compute kernels
    memory: float  # memcpy and memset
    longest: list[tuple[str, int, float]]  # name, number and added times of the kernels of a name, longest first

    @property
    def exposed_kernels(self) -> float:
        """Share of the span with communication but no compute kernel."""
        return (self.communication - self.overlap) / self.span

    @property
    def idle_kernels(self) -> float:
        """Share of the span without any kernel."""
        return 1 - self.busy / self.span


def products(events: Sequence[Profiled], device: str) -> MeasuredProducts | None:
    """Return the matrix products of a profile, or None without recorded shapes; `device` is the device name."""
    found = [
        event
        for event in events
        if event.get("ph") == "X" and event.get("name") in _PRODUCTS and _sizes(event) is not None
    ]
    seconds = _on_device(events, found) if any(event.get("cat") == "kernel" for event in events) else None
    taken: dict[tuple[str, int, int, int], list[float]] = defaultdict(list)
    for i, event in enumerate(found):
        m, k, n = _sizes(event) or (0, 0, 0)
        time = seconds[i] if seconds else float(event.get("dur", 0)) / 1e6
        taken[_dtype(event), m, k, n].append(time)
    if not taken:
        return None
    shapes = [Shape(*key, len(times), sum(times)) for key, times in taken.items()]
    shapes.sort(key=lambda shape: -shape.seconds)
    dtype = shapes[0].dtype
    peak = device_peak(device, dtype)
    best = max(2.0 * prod(key[1:]) / max(statistics.median(times), 1e-9) for key, times in taken.items())
    return MeasuredProducts(shapes, peak or best, f"{device}, {dtype}" if peak else "")


def devices(events: Iterable[Profiled]) -> Devices | None:
    """Return the kernel times of a profile, or None if it has no kernels, as on a CPU."""
    spans: dict[str, list[tuple[float, float]]] = {"compute": [], "communication": [], "memory": []}
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") not in _DEVICE or event.get("ph") != "X":
            continue
        kind = "memory" if event["cat"] in _MEMORY else "compute"
        kind = "communication" if _COMMUNICATION.match(str(event["name"])) else kind
        begin = float(event["ts"])
        spans[kind].append((begin, begin + float(event.get("dur", 0))))
        times[str(event["name"])].append(float(event.get("dur", 0)))
    every = merged(span for found in spans.values() for span in found)
    if not every:
        return None
    compute, communication = merged(spans["compute"]), merged(spans["communication"])
    return Devices(
        span=every[-1][1] - every[0][0],
        busy=total(every),
        compute=total(compute),
        communication=total(communication),
        overlap=common(compute, communication),
        memory=total(spans["memory"]),
        longest=sorted(((name, len(each), sum(each)) for name, each in times.items()), key=lambda one: -one[2]),
    )


def monotonic_offset(events: Iterable[Profiled]) -> float | None:
    """Return the offset from a profile's times to the rank's monotonic clock, in microseconds; None without markers.

    A marker's name has its start time on the monotonic clock. The marker with the shortest delay determines the offset.
    """
    found = [
        int(name.removeprefix(MARKER)) / 1e3 - float(event["ts"])
        for event in events
        if event.get("cat") == "user_annotation" and (name := str(event.get("name", ""))).startswith(MARKER)
    ]
    return max(found, default=None)


def _sizes(event: Profiled) -> tuple[int, int, int] | None:
    """Return (M, K, N) from an operator's inputs, or None if the profile has no shapes."""
    dims = event.get("args", {}).get("Input Dims")
    first, second = _PRODUCTS[event["name"]]
    if not dims or len(dims) <= second or not (dims[first] and dims[second]):
        return None
    return *dims[first], dims[second][-1]


def _dtype(event: Profiled) -> str:
    types = event["args"].get("Input type") or []
    first = _PRODUCTS[event["name"]][0]
    return _DTYPES.get(types[first], types[first]) if first < len(types) else "fp32"


def _on_device(events: Sequence[Profiled], operators: Sequence[Profiled]) -> list[float]:
    """Return the kernel time in seconds of each of `operators`."""
    by_thread: dict[tuple[Any, Any], list[tuple[float, float, int]]] = defaultdict(list)
    for i, event in enumerate(operators):
        begin = float(event["ts"])
        by_thread[event["pid"], event["tid"]].append((begin, begin + float(event.get("dur", 0)), i))
    for found in by_thread.values():
        found.sort()
    operator_of: dict[int, int] = {}  # operator index by correlation id
    for event in events:
        correlation = event.get("args", {}).get("correlation") if event.get("cat") in _LAUNCHES else None
        found = by_thread.get((event.get("pid"), event.get("tid")), [])
        if correlation is None or not found:
            continue
        begin, end, i = found[bisect_right(found, (float(event["ts"]), float("inf"), 0)) - 1]
        if begin <= float(event["ts"]) <= end:
            operator_of[correlation] = i
    seconds = [0.0] * len(operators)
    for event in events:
        if event.get("cat") == "kernel" and (i := operator_of.get(event["args"].get("correlation"), -1)) >= 0:
            seconds[i] += float(event.get("dur", 0)) / 1e6
    return seconds


_LAUNCHES = ("cuda_runtime", "cuda_driver")
